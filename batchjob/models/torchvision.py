"""`type: torchvision`: a torchvision model by name, with published weights, the user's own file, or random weights."""

from __future__ import annotations

import re
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal, Self

from pydantic import Field, ValidatorFunctionWrapHandler, WrapValidator, model_validator

from batchjob.errors import InvalidJob, StorageError
from batchjob.models.architecture import build_torchvision, check_torchvision_name
from batchjob.models.class_layers import find_torchvision_layers
from batchjob.models.loaded_model import (
    LoadedModel,
    describe_random_weights,
    detect_input_kind,
    isolated_torch_state,
    prepare_for_inference,
)
from batchjob.models.output_selection import OutputSelection, select_output
from batchjob.models.torchvision_weights import (
    PublishedWeights,
    fetch_weights,
    find_weights_by_file,
    find_weights_by_name,
)
from batchjob.models.trusted_file import StateDictFile, verify_digest
from batchjob.models.weights import check_file_exists, hash_state_dict, load_weights, read_file
from batchjob.preprocessing.settings import Preprocess
from batchjob.settings import Uri

if TYPE_CHECKING:
    from torch import nn

    from batchjob.storage.reader import Reader

__all__ = ["TorchvisionModel"]

# `weights` with one of these is a file; anything else is a published name.
_FILE_PATTERN = re.compile(r"/|\.(pt|pth|th|bin|ckpt|tar|safetensors)$")
# Weights of detectors that were trained with batch norms of epsilon 0. Their files do not state it.
_WITHOUT_EPSILON = {
    f"{model}_Weights.COCO_V1"
    for model in (
        "FasterRCNN_ResNet50_FPN",
        "KeypointRCNN_ResNet50_FPN",
        "MaskRCNN_ResNet50_FPN",
        "RetinaNet_ResNet50_FPN",
    )
}
_OLD_DENSENET_KEY = re.compile(r"(denselayer\d+\.(?:norm|conv))\.([12])\.")


def _resolve_unless_name(value: Any, resolve: ValidatorFunctionWrapHandler) -> Any:
    return str(value) if isinstance(value, str) and value and not _FILE_PATTERN.search(value) else resolve(value)


class TorchvisionModel(StateDictFile, OutputSelection):
    """Model of torchvision for classification, detection or segmentation.

    Attributes:
        name: Name in `torchvision.models.list_models()`.
        weights: Published name (`IMAGENET1K_V2`, `DEFAULT`), or a local path or URI (with a `/` or a suffix such as
            `.pth`). A file under its published file name brings labels and preprocessing, too.
        num_classes: Number of classes of the last layer, for weights of your own; null for torchvision's number.
            Detectors count the background as a class.
        arguments: Further keyword arguments of torchvision's function, such as `box_score_thresh`.
        seed: Seed of random weights, for tests; labels and preprocessing are those of the default weights.
        mirror: Folder with published weight files under their own names; with it nothing is downloaded.
    """

    type: Literal["torchvision"] = "torchvision"
    name: str
    weights: Annotated[Uri, WrapValidator(_resolve_unless_name)] | None = None
    num_classes: int | None = Field(default=None, ge=1)
    arguments: dict[str, Any] = Field(default_factory=dict)
    seed: int | None = Field(default=None, ge=0, lt=2**63)
    mirror: Uri | None = None

    @model_validator(mode="after")
    def _check_weights_source(self) -> Self:
        if self.weights is None and self.seed is None:
            raise ValueError("weights must be given: DEFAULT, a published name or a file (or seed, for random ones)")
        if self.weights is not None and self.seed is not None:
            raise ValueError("weights and seed exclude each other; leave one out")
        return self

    @property
    def title(self) -> str:
        """Name in the column `model_id`, before the digest."""
        return self.name

    def check(self, reader: Reader, folder: Path) -> None:  # noqa: ARG002 - all formats share this signature
        """Check, without torch, that the file exists, or that the mirror is not empty.

        Raises:
            InvalidJob: One of these is not so.
            Unavailable: The store cannot be reached.
        """
        if self._has_file:
            check_file_exists(reader, str(self.weights), "model.weights")
        elif self.mirror is not None:
            try:
                first = next(iter(reader.list(self.mirror)), None)
            except StorageError as error:
                raise InvalidJob(f"model.mirror: {self.mirror} cannot be listed: {error.message}") from error
            if first is None:
                raise InvalidJob(f"model.mirror: {self.mirror} is empty; put the published weight files there")

    def list_files(self, reader: Reader, folder: Path) -> list[str]:  # noqa: ARG002
        """Return the URI of the weights, if they are the user's own file."""
        return [str(self.weights)] if self._has_file else []

    def load(self, reader: Reader, folder: Path) -> LoadedModel:  # noqa: ARG002
        """Build the model and load its weights.

        Raises:
            InvalidJob: The model or the weights are unknown, the file does not exist, or the weights do not fit or have
                another digest.
            Unavailable: Published weights must be downloaded, and their server cannot be reached.
        """
        check_torchvision_name(self.name, "model.name")
        if self.weights is None:
            return self._load_random()
        if not self._has_file:
            published = find_weights_by_name(self.name, self.weights)
            data, source = fetch_weights(published, reader, self.mirror)
            return self._load_file(data, source, published)
        return self._load_file(
            read_file(reader, self.weights, "model.weights"),
            self.weights,
            find_weights_by_file(self.name, self.weights.rsplit("/", 1)[-1]),
        )

    @property
    def _has_file(self) -> bool:
        return self.weights is not None and bool(_FILE_PATTERN.search(self.weights))

    def _load_random(self) -> LoadedModel:
        published = find_weights_by_name(self.name, "DEFAULT")
        arguments: dict[str, Any] = {} if self.num_classes is None else {"num_classes": self.num_classes}
        if self.name in {"googlenet", "inception_v3"}:
            arguments["init_weights"] = True
        module = self._build_module(arguments, self.seed or 0)
        labels = published.labels if self.num_classes in {None, len(published.labels or ())} else None
        notes = describe_random_weights(self.seed)
        return self._wrap_module(module, published.preprocess, labels, hash_state_dict(module), notes)

    def _load_file(self, data: bytes, uri: str, published: PublishedWeights | None) -> LoadedModel:
        digest = verify_digest(data, uri, self.sha256)
        arguments = dict(published.arguments) if published else {}
        if self.num_classes is not None:
            if arguments.get("num_classes", self.num_classes) != self.num_classes and published:
                raise InvalidJob(
                    f"model.num_classes is {self.num_classes}, but {published.name} knows {arguments['num_classes']} "
                    "classes; leave num_classes out, or give the file of weights trained for yours"
                )
            arguments["num_classes"] = self.num_classes
        module = self._build_module(arguments)
        with isolated_torch_state():
            loaded = load_weights(
                module,
                data,
                uri,
                self.selection,
                model=f"torchvision's {self.name}",
                advice="correct model.name or model.num_classes, or use type checkpoint for another architecture",
                rename=self._rename_key,
                is_ignored=self._is_unused_key,
            )
        digest = loaded.complete_digest(digest)
        _remove_auxiliary_heads(module)
        if published is None:
            return self._wrap_module(module, None, None, digest, loaded.notes)
        _restore_batch_norm_epsilon(module, published.name)
        return self._wrap_module(module, published.preprocess, published.labels, digest, loaded.notes)

    def _wrap_module(
        self,
        module: nn.Module,
        preprocess: Preprocess | None,
        labels: tuple[str, ...] | None,
        digest: str,
        notes: tuple[str, ...],
    ) -> LoadedModel:
        return LoadedModel(
            select_output(module, self.output),
            preprocess,
            labels,
            digest,
            input_kind=detect_input_kind(module),
            class_layers=find_torchvision_layers(module) if self.output is None else (),
            notes=notes,
        )

    def _build_module(self, arguments: dict[str, Any], seed: int = 0) -> nn.Module:
        with isolated_torch_state(seed):
            module = build_torchvision(self.name, "model.name", arguments | self.arguments)
            return prepare_for_inference(module, "model.name")

    def _rename_key(self, key: str) -> str:
        """Convert a key of a published file to that of today's architecture."""
        # Densenets were published with keys such as `norm.1`, which names of modules no longer allow.
        # Example: "denseblock1.denselayer1.norm.1.weight" → "denseblock1.denselayer1.norm1.weight".
        return _OLD_DENSENET_KEY.sub(r"\1\2.", key) if self.name.startswith("densenet") else key

    def _is_unused_key(self, key: str) -> bool:
        """Return True for keys of the second head of segmentation models, which only training uses."""
        has_second_head = self.name.startswith(("fcn_", "deeplabv3_")) and not self.arguments.get("aux_loss")
        return has_second_head and "aux_classifier." in key


def _restore_batch_norm_epsilon(module: nn.Module, weights: str) -> None:
    import torch

    if weights in _WITHOUT_EPSILON:
        for layer in module.modules():
            if isinstance(layer, torch.nn.BatchNorm2d):
                layer.eps = 0.0


def _remove_auxiliary_heads(module: nn.Module) -> None:
    """Remove the heads that GoogLeNet and Inception use only in training, which saves their memory on each device."""
    for head in ("aux1", "aux2", "AuxLogits"):
        if getattr(module, head, None) is not None:
            setattr(module, head, None)
            setattr(module, "aux_logits", False)  # noqa: B010 - torch types every attribute as tensor or module
