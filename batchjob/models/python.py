"""`type: python`: a function beside the job file that returns a model and, optionally, its preprocessing."""

from __future__ import annotations

import hashlib
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from pydantic import Field, ValidationError

from batchjob.errors import InvalidJob
from batchjob.models.architecture import call_target
from batchjob.models.loaded_model import LoadedModel, detect_input_kind, isolated_torch_state, prepare_for_inference
from batchjob.models.output_selection import OutputSelection, select_output
from batchjob.models.torchvision_weights import convert_preset
from batchjob.models.weights import hash_state_dict
from batchjob.preprocessing.settings import Preprocess
from batchjob.settings import Target
from batchjob.user_code import load_target, source_digest

if TYPE_CHECKING:
    from torch import nn

    from batchjob.storage.reader import Reader

__all__ = ["PythonModel"]

_RETURN_TYPES = "a torch.nn.Module, or a pair of it and its preprocessing"


class PythonModel(OutputSelection):
    """Model that the user's own code builds and loads.

    Attributes:
        target: `module:function` beside the job file. It returns an `nn.Module`, or a pair `(module, preprocessing)`
            where preprocessing is a dict with the keys of the job's `preprocess`, torchvision's
            `weights.transforms()`, or a function of the same file from uint8 `[3, h, w]` to a tensor.
        arguments: Keyword arguments of the function.
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

    def load(self, reader: Reader, folder: Path) -> LoadedModel:  # noqa: ARG002
        """Call the function. The digest covers its source and the state dict of the module it returns.

        Raises:
            InvalidJob: There is no such function, it raised an exception, or it returned something else.
            Unavailable: It raised a network error.
        """
        with isolated_torch_state():
            returned = call_target(self.target, folder, "model.target", self.arguments)
            module, preprocessing = self._split_pair(returned)
            preprocess = None if preprocessing is None else self._convert_preprocessing(preprocessing, folder)
            module = prepare_for_inference(module, f"model.target: {self.target}")
        digests = f"{source_digest(self.target, folder)} {hash_state_dict(module)}"
        return LoadedModel(
            select_output(module, self.output),
            preprocess,
            labels=None,
            digest=hashlib.sha256(digests.encode()).hexdigest(),
            input_kind=detect_input_kind(module),
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
            f"model.target: {self.target} returned a {type(returned).__name__}; it must return {_RETURN_TYPES}"
        )

    def _convert_preprocessing(self, preprocessing: Any, folder: Path) -> Preprocess:
        if isinstance(preprocessing, Preprocess):
            return preprocessing
        if isinstance(preprocessing, dict):
            return self._validate_preprocess(preprocessing)
        preset = convert_preset(preprocessing)
        if preset is not None:
            return preset
        target = self._find_target(preprocessing, folder)
        if target is not None:
            return Preprocess(transform=target)
        raise InvalidJob(
            f"model.target: {self.target} returned a {type(preprocessing).__name__} as preprocessing; it must be "
            f"a dict with keys of 'preprocess' ({', '.join(Preprocess.model_fields)}), weights.transforms(), "
            "or a function of the same file"
        )

    def _validate_preprocess(self, preprocessing: dict[Any, Any]) -> Preprocess:
        try:
            return Preprocess.model_validate(preprocessing)
        except ValidationError as error:
            faults = "; ".join(f"{'.'.join(map(str, fault['loc']))}: {fault['msg']}" for fault in error.errors())
            raise InvalidJob(
                f"model.target: {self.target} returned preprocessing that is not valid: {faults}; "
                f"its keys are those of 'preprocess': {', '.join(Preprocess.model_fields)}"
            ) from error

    def _find_target(self, function: Any, folder: Path) -> str | None:
        """Find the `module:function` by which loader processes import a transform; None if it has none."""
        name = getattr(function, "__name__", None)
        if not callable(function) or not isinstance(name, str) or not name.isidentifier():
            return None
        target = f"{self.target.partition(':')[0]}:{name}"
        try:
            return target if load_target(target, folder) is function else None
        except InvalidJob:
            return None
