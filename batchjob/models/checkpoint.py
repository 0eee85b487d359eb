"""`type: checkpoint`: a file of weights, loaded into an architecture that the job names."""

from __future__ import annotations

import hashlib
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from pydantic import Field

from batchjob.errors import InvalidJob
from batchjob.models.architecture import build_torchvision, call_target, has_parameter
from batchjob.models.class_layers import find_torchvision_layers
from batchjob.models.loaded_model import LoadedModel, detect_input_kind, isolated_torch_state, prepare_for_inference
from batchjob.models.output_selection import OutputSelection, select_output
from batchjob.models.trusted_file import StateDictFile, verify_digest
from batchjob.models.weights import check_file_exists, load_weights, read_file
from batchjob.settings import Architecture, Uri
from batchjob.text import with_article
from batchjob.user_code import list_argument_files, list_sources, load_target, source_digest

if TYPE_CHECKING:
    from torch import nn

    from batchjob.storage.reader import Reader

__all__ = ["CheckpointModel"]


class CheckpointModel(StateDictFile, OutputSelection):
    """Weights from a file, loaded into an architecture.

    Attributes:
        architecture: Name of a torchvision model, or `module:attribute` beside the job file; in Python also a function.
        weights: Local path or URI of a `.pt`, `.pth`, `.th` or `.safetensors` file; it may have been saved on any
            device.
        num_classes: Number of classes, for an architecture that has a parameter of this name.
        arguments: Further keyword arguments of the architecture.
        strict: False allows keys that only the file or only the model has; a tensor of another shape is always an
            error.
    """

    type: Literal["checkpoint"] = "checkpoint"
    architecture: Architecture
    weights: Uri
    num_classes: int | None = Field(default=None, ge=1)
    arguments: dict[str, Any] = Field(default_factory=dict)
    strict: bool = True

    @property
    def title(self) -> str:
        """Name in the column `model_id`, before the digest."""
        return self.architecture

    def check(self, reader: Reader, folder: Path) -> None:
        """Check, without torch, that the files exist.

        Raises:
            InvalidJob: The weights or the user's module do not exist.
            Unavailable: The store cannot be reached.
        """
        if ":" in self.architecture:
            source_digest(self.architecture, folder)
        check_file_exists(reader, self.weights, "model.weights")

    def list_files(self, reader: Reader, folder: Path) -> list[str]:  # noqa: ARG002
        """Return the URIs of the weights and of the sources of the user's architecture."""
        sources = list_sources(self.architecture, folder) if ":" in self.architecture else []
        return [self.weights, *map(str, [*sources, *list_argument_files(self.arguments, folder)])]

    def load(self, reader: Reader, folder: Path) -> LoadedModel:
        """Build the architecture and load the weights. A checkpoint brings neither preprocessing nor labels.

        Raises:
            InvalidJob: A file does not exist, the architecture is unknown, or the weights do not fit it, hold code or
                have another digest.
            Unavailable: The store cannot be reached.
        """
        data = read_file(reader, self.weights, "model.weights")
        digest = verify_digest(data, self.weights, self.sha256)
        with isolated_torch_state():
            module = self._build_module(folder)
            loaded = load_weights(
                module,
                data,
                self.weights,
                self.selection,
                model=self.architecture,
                advice="correct model.architecture, model.num_classes or model.arguments"
                + (", or set model.strict: false to let missing and unknown keys pass" if self.strict else ""),
                strict=self.strict,
                takes_num_classes=self._takes_num_classes(folder),
            )
            del data
        digest = loaded.complete_digest(digest)
        if ":" in self.architecture:
            digest = hashlib.sha256(f"{digest} {source_digest(self.architecture, folder)}".encode()).hexdigest()
        module = prepare_for_inference(module, "model.architecture")
        is_torchvision = ":" not in self.architecture and self.output is None
        return LoadedModel(
            select_output(module, self.output),
            preprocess=None,
            labels=None,
            digest=digest,
            input_kind=detect_input_kind(module),
            class_layers=find_torchvision_layers(module) if is_torchvision else (),
            notes=loaded.notes,
        )

    def _takes_num_classes(self, folder: Path) -> bool:
        import torch

        if ":" not in self.architecture:
            return True
        target = load_target(self.architecture, folder)
        return not isinstance(target, torch.nn.Module) and has_parameter(target, "num_classes")

    def _build_module(self, folder: Path) -> nn.Module:
        import torch

        if ":" not in self.architecture:
            classes = {} if self.num_classes is None else {"num_classes": self.num_classes}
            return build_torchvision(self.architecture, "model.architecture", classes | self.arguments)
        module = call_target(self.architecture, folder, "model.architecture", self.arguments, self.num_classes)
        if not isinstance(module, torch.nn.Module):
            raise InvalidJob(
                f"model.architecture: {self.architecture} returned {with_article(type(module).__name__)}; "
                "it must return a torch.nn.Module"
            )
        return module
