"""`type: python`: a function beside the job file that returns the model and, if it likes, its preprocessing."""

from __future__ import annotations

import hashlib
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from pydantic import Field, ValidationError

from batchjob.errors import InvalidJob
from batchjob.models.architecture import call_target, detect_input_kind, isolated_torch_state, prepare_for_inference
from batchjob.models.loaded_model import LoadedModel
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

_WANTED = "a torch.nn.Module, or a pair of it and its preprocessing"


class PythonModel(OutputSelection):
    """A model that the user's own code builds and fills.

    Attributes:
        target: `module:function` beside the job file. It returns an `nn.Module`, or a pair `(module, preprocessing)`
            where preprocessing is a dict with the keys of the job's `preprocess`, torchvision's
            `weights.transforms()`, or a function of the same file from uint8 `[3, h, w]` to a tensor.
        arguments: its keyword arguments.
    """

    type: Literal["python"] = "python"
    target: Target
    arguments: dict[str, Any] = Field(default_factory=dict)

    @property
    def title(self) -> str:
        """What `model_id` calls it, before the digest."""
        return self.target

    def check(self, reader: Reader, base: Path) -> None:  # noqa: ARG002 - one face for all formats
        """Looks without torch whether the module is there. Raises InvalidJob."""
        source_digest(self.target, base)

    def load(self, reader: Reader, base: Path) -> LoadedModel:  # noqa: ARG002
        """Calls the function. The digest covers its source and the state it returned.

        Raises:
            InvalidJob: no such function, it raised, or it returned something else.
            Unavailable: it raised a network fault.
        """
        with isolated_torch_state():
            returned = call_target(self.target, base, "model.target", self.arguments)
            module, own = self._split(returned)
            preprocess = None if own is None else self._preprocess(own, base)
            module = prepare_for_inference(module, f"model.target: {self.target}")
        parts = f"{source_digest(self.target, base)} {hash_state_dict(module)}"
        digest = hashlib.sha256(parts.encode()).hexdigest()
        return LoadedModel(select_output(module, self.output), preprocess, None, digest, detect_input_kind(module))

    def _split(self, returned: Any) -> tuple[nn.Module, Any]:
        import torch

        module, own = returned if isinstance(returned, tuple) and len(returned) == 2 else (returned, None)
        if isinstance(module, torch.nn.Module):
            return module, own
        if returned is None:
            raise InvalidJob(f"model.target: {self.target} returned None (no return?); it must return {_WANTED}")
        raise InvalidJob(f"model.target: {self.target} returned a {type(returned).__name__}; it must return {_WANTED}")

    def _preprocess(self, own: Any, base: Path) -> Preprocess:
        if isinstance(own, Preprocess):
            return own
        if isinstance(own, dict):
            return self._checked(own)
        known = convert_preset(own)
        if known is not None:
            return known
        target = self._target_of(own, base)
        if target is not None:
            return Preprocess(transform=target)
        raise InvalidJob(
            f"model.target: {self.target} returned a {type(own).__name__} as preprocessing; it must be "
            f"a dict with keys of 'preprocess' ({', '.join(Preprocess.model_fields)}), weights.transforms(), "
            "or a function of the same file"
        )

    def _checked(self, own: dict[Any, Any]) -> Preprocess:
        try:
            return Preprocess.model_validate(own)
        except ValidationError as error:
            said = "; ".join(f"{'.'.join(map(str, fault['loc']))}: {fault['msg']}" for fault in error.errors())
            raise InvalidJob(
                f"model.target: {self.target} returned preprocessing that is not valid: {said}; "
                f"its keys are those of 'preprocess': {', '.join(Preprocess.model_fields)}"
            ) from error

    def _target_of(self, own: Any, base: Path) -> str | None:
        """A function goes to loader processes by its name, so it must stand in the file under that name."""
        name = getattr(own, "__name__", None)
        if not callable(own) or not isinstance(name, str) or not name.isidentifier():
            return None
        target = f"{self.target.partition(':')[0]}:{name}"
        try:
            return target if load_target(target, base) is own else None
        except InvalidJob:
            return None
