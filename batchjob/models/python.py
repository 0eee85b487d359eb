"""`type: python`: a function beside the job file that returns a model and, optionally, its preprocessing."""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from pydantic import Field, ValidationError

from batchjob.errors import InvalidJob
from batchjob.functions.function_target import FunctionTarget
from batchjob.models.architecture import call_target
from batchjob.models.loaded_model import LoadedModel, detect_input_kind, isolated_torch_state, prepare_for_inference
from batchjob.models.output_selection import OutputSelection, select_output
from batchjob.models.torchvision_weights import convert_preset
from batchjob.models.weights import hash_state_dict
from batchjob.preprocessing.settings import Preprocess
from batchjob.settings import Target
from batchjob.text import with_article
from batchjob.user_code import list_argument_files, list_names, list_sources, load_target, source_digest

if TYPE_CHECKING:
    from torch import nn

    from batchjob.storage.reader import Reader

__all__ = ["PythonModel"]

_RETURN_TYPES = "a torch.nn.Module, or a pair of it and its preprocessing"


class PythonModel(OutputSelection):
    """Model that the user's own code builds and loads.

    In Python, the target may be the function itself. One that a module holds is kept by its name; one of a script or
    notebook by value, with its source and the values that it captures in the fingerprint.

    Attributes:
        target: `module:attribute` beside the job file. It returns an `nn.Module`, or a pair `(module, preprocessing)`
            where preprocessing is a dict with the keys of the job's `preprocess`, torchvision's
            `weights.transforms()`, or a transform: a `Compose`, or a function of the same file, from an image to a
            tensor, as `preprocess.transform`.
        arguments: Keyword arguments of the function.

    Example:
        `PythonModel(target=build, arguments={"width": 64})`
    """

    type: Literal["python"] = "python"
    target: Target
    arguments: dict[str, Any] = Field(default_factory=dict)

    @property
    def title(self) -> str:
        """Name in the column `model_id`, before the digest."""
        return self.target

    def check(self, reader: Reader, folder: Path) -> None:  # noqa: ARG002 - all formats share this signature
        """Check, without torch, that the user's module exists.

        Raises:
            InvalidJob: It does not exist, or does not parse.
        """
        source_digest(self.target, folder)

    def list_files(self, reader: Reader, folder: Path) -> list[str]:  # noqa: ARG002
        """Return the URIs of the sources of the target, and of the files that its arguments name."""
        return [*map(str, [*list_sources(self.target, folder), *list_argument_files(self.arguments, folder)])]

    def load(self, reader: Reader, folder: Path) -> LoadedModel:  # noqa: ARG002
        """Call the function. The digest covers its source and the state dict of the module it returns.

        Raises:
            InvalidJob: There is no such function, it raised an exception, or it returned something else.
            Unavailable: It raised a network error.
        """
        with isolated_torch_state():
            returned = call_target(self.target, folder, "model.target", self.arguments)
            module, preprocessing = self._split_pair(returned)
            preprocess, transform = self._convert_preprocessing(preprocessing, folder)
            module = prepare_for_inference(module, f"model.target: {self.target}")
        digests = f"{source_digest(self.target, folder)} {hash_state_dict(module)}"
        return LoadedModel(
            select_output(module, self.output),
            preprocess,
            labels=None,
            digest=hashlib.sha256(digests.encode()).hexdigest(),
            input_kind=detect_input_kind(module),
            transform=transform,
        )

    def _split_pair(self, returned: Any) -> tuple[nn.Module, Any]:
        import torch

        is_pair = isinstance(returned, tuple) and len(returned) == 2
        module, preprocessing = returned if is_pair else (returned, None)
        if isinstance(module, torch.nn.Module):
            return module, preprocessing
        if returned is None:
            raise InvalidJob(f"model.target: {self.target} returned None (no return?); it must return {_RETURN_TYPES}")
        raise InvalidJob(
            f"model.target: {self.target} returned {with_article(type(returned).__name__)}; "
            f"it must return {_RETURN_TYPES}"
        )

    def _convert_preprocessing(
        self, preprocessing: Any, folder: Path
    ) -> tuple[Preprocess | None, Callable[[Any], Any] | None]:
        """Return the settings, and the transform itself where no name in the module leads to it."""
        if preprocessing is None or isinstance(preprocessing, Preprocess):
            return preprocessing, None
        if isinstance(preprocessing, dict):
            return self._validate_preprocess(preprocessing), None
        preset = convert_preset(preprocessing)
        if preset is not None:
            return preset, None
        if not callable(preprocessing) or isinstance(preprocessing, type):
            raise InvalidJob(
                f"model.target: {self.target} returned {with_article(type(preprocessing).__name__)} as preprocessing; "
                f"it must be a dict with keys of 'preprocess' ({', '.join(Preprocess.model_fields)}), "
                "weights.transforms(), a Compose, or a function of the same file"
            )
        target = self._find_target(preprocessing, folder)
        if target is not None:
            return Preprocess(transform=target), None
        # The target stands for the transform that it makes, in settings and digest.
        return Preprocess(transform=self.target), preprocessing

    def _validate_preprocess(self, preprocessing: dict[Any, Any]) -> Preprocess:
        if callable(preprocessing.get("transform")):
            raise InvalidJob(
                f"model.target: {self.target} returned preprocessing with a transform among its keys; return the "
                "transform itself in place of the dict"
            )
        try:
            return Preprocess.model_validate(preprocessing)
        except ValidationError as error:
            faults = "; ".join(f"{'.'.join(map(str, fault['loc']))}: {fault['msg']}" for fault in error.errors())
            raise InvalidJob(
                f"model.target: {self.target} returned preprocessing that is not valid: {faults}; "
                f"its keys are those of 'preprocess': {', '.join(Preprocess.model_fields)}"
            ) from error

    def _find_target(self, transform: Callable[[Any], Any], folder: Path) -> str | None:
        """Find the `module:attribute` by which loader processes import a transform; None if it has none."""
        if isinstance(self.target, FunctionTarget):
            return None
        module = self.target.partition(":")[0]
        own_name = getattr(transform, "__name__", None)
        names = [own_name] if isinstance(own_name, str) and own_name.isidentifier() else list_names(module, folder)
        for target in (f"{module}:{name}" for name in names):
            with suppress(InvalidJob):
                if load_target(target, folder) is transform:
                    return target
        return None
