"""`type: torchvision`: a model by name, with published weights, a file of one's own, or random ones."""

from __future__ import annotations

import re
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal, Self

from pydantic import Field, ValidatorFunctionWrapHandler, WrapValidator, model_validator

from batchjob.errors import InvalidJob, StorageError
from batchjob.models.architecture import (
    build_torchvision,
    check_torchvision_name,
    detect_input_kind,
    isolated_torch_state,
    prepare_for_inference,
)
from batchjob.models.loaded_model import LoadedModel
from batchjob.models.output_selection import OutputSelection, select_output
from batchjob.models.torchvision_weights import (
    PublishedWeights,
    fetch_weights,
    find_weights_by_file,
    find_weights_by_name,
)
from batchjob.models.trusted_file import WeightsFile, verify_digest
from batchjob.models.weights import check_file_exists, hash_state_dict, load_weights, parse_state_dict, read_file
from batchjob.settings import Uri

if TYPE_CHECKING:
    import torch
    from torch import nn

    from batchjob.preprocessing.settings import Preprocess
    from batchjob.storage.reader import Reader

__all__ = ["TorchvisionModel"]

_FILE = re.compile(r"/|\.(pt|pth|th|bin|ckpt|tar|safetensors)$")
_NO_EPSILON = {
    f"{model}_Weights.COCO_V1"
    for model in (
        "FasterRCNN_ResNet50_FPN",
        "KeypointRCNN_ResNet50_FPN",
        "MaskRCNN_ResNet50_FPN",
        "RetinaNet_ResNet50_FPN",
    )
}
_OLD_DENSENET = re.compile(r"(denselayer\d+\.(?:norm|conv))\.([12])\.")


def _name_or_uri(value: Any, resolve: ValidatorFunctionWrapHandler) -> Any:
    return str(value) if isinstance(value, str) and value and not _FILE.search(value) else resolve(value)


class TorchvisionModel(WeightsFile, OutputSelection):
    """A model of torchvision for classification, detection or segmentation.

    Attributes:
        name: as `torchvision.models.list_models` gives it.
        weights: a published name (`IMAGENET1K_V2`, `DEFAULT`), or a file or URI (it has a `/` or a suffix such as
            `.pth`). A file that carries a published name brings its labels and preprocessing too.
        num_classes: of the last layer, for weights of one's own; torchvision's number where not given. Detectors count
            the background too.
        arguments: more keyword arguments of torchvision's function, such as `box_score_thresh`.
        seed: random weights from this seed instead, for tests; labels and preprocessing are the default weights'.
        mirror: folder that holds published weight files under their own names; then nothing is downloaded.
    """

    type: Literal["torchvision"] = "torchvision"
    name: str
    weights: Annotated[Uri, WrapValidator(_name_or_uri)] | None = None
    num_classes: int | None = Field(default=None, ge=1)
    arguments: dict[str, Any] = Field(default_factory=dict)
    seed: int | None = Field(default=None, ge=0, lt=2**63)
    mirror: Uri | None = None

    @model_validator(mode="after")
    def _one_of(self) -> Self:
        if self.weights is None and self.seed is None:
            raise ValueError("weights must be given: DEFAULT, a published name or a file (or seed, for random ones)")
        if self.weights is not None and self.seed is not None:
            raise ValueError("weights and seed exclude each other; leave one out")
        return self

    @property
    def title(self) -> str:
        """What `model_id` calls it, before the digest."""
        return self.name

    def check(self, reader: Reader, base: Path) -> None:  # noqa: ARG002 - one face for all formats
        """Looks without torch whether the files are there. Raises InvalidJob, Unavailable."""
        if self._is_file:
            check_file_exists(reader, str(self.weights), "model.weights")
        elif self.mirror is not None:
            try:
                filled = next(iter(reader.list(self.mirror)), None)
            except StorageError as error:
                raise InvalidJob(f"model.mirror: {self.mirror} cannot be listed: {error.message}") from error
            if filled is None:
                raise InvalidJob(f"model.mirror: {self.mirror} is empty; put the published weight files there")

    def load(self, reader: Reader, base: Path) -> LoadedModel:  # noqa: ARG002
        """Builds and fills the model.

        Raises:
            InvalidJob: unknown model or weights, weights that do not fit, a file that is not there.
            Unavailable: published weights are to be downloaded and there is no way out.
        """
        check_torchvision_name(self.name, "model.name")
        if self.weights is None:
            return self._random()
        if not self._is_file:
            published = find_weights_by_name(self.name, self.weights)
            data, place = fetch_weights(published, reader, self.mirror)
            return self._filled(data, place, published)
        return self._filled(
            read_file(reader, self.weights, "model.weights"),
            self.weights,
            find_weights_by_file(self.name, self.weights.rsplit("/", 1)[-1]),
        )

    @property
    def _is_file(self) -> bool:
        return self.weights is not None and bool(_FILE.search(self.weights))

    def _random(self) -> LoadedModel:
        published = find_weights_by_name(self.name, "DEFAULT")
        arguments: dict[str, Any] = {} if self.num_classes is None else {"num_classes": self.num_classes}
        if self.name in {"googlenet", "inception_v3"}:
            arguments["init_weights"] = True
        module = self._built(arguments, self.seed or 0)
        labels = published.labels if self.num_classes in {None, len(published.labels or ())} else None
        return self._loaded(module, published.preprocess, labels, hash_state_dict(module))

    def _filled(self, data: bytes, place: str, published: PublishedWeights | None) -> LoadedModel:
        digest = verify_digest(data, place, self.sha256)
        arguments = dict(published.arguments) if published else {}
        if self.num_classes is not None:
            if arguments.get("num_classes", self.num_classes) != self.num_classes and published:
                raise InvalidJob(
                    f"model.num_classes is {self.num_classes}, but {published.name} knows {arguments['num_classes']} "
                    "classes; leave num_classes out, or give the file of weights trained for yours"
                )
            arguments["num_classes"] = self.num_classes
        module = self._built(arguments)
        with isolated_torch_state():
            state = parse_state_dict(data, place)
            load_weights(
                module,
                self._renamed(state),
                where=f"model.weights: {place} does not fit torchvision's {self.name}",
                advice="correct model.name or model.num_classes, or use type checkpoint for another architecture",
            )
        _drop_auxiliary(module)
        if published is None:
            return self._loaded(module, None, None, digest)
        _as_trained(module, published.name)
        return self._loaded(module, published.preprocess, published.labels, digest)

    def _loaded(
        self, module: nn.Module, preprocess: Preprocess | None, labels: tuple[str, ...] | None, digest: str
    ) -> LoadedModel:
        return LoadedModel(select_output(module, self.output), preprocess, labels, digest, detect_input_kind(module))

    def _built(self, arguments: dict[str, Any], seed: int = 0) -> nn.Module:
        with isolated_torch_state(seed):
            return prepare_for_inference(
                build_torchvision(self.name, "model.name", arguments | self.arguments), "model.name"
            )

    def _renamed(self, state: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        """The state as today's architecture, built for inference, knows it."""
        if self.name.startswith("densenet"):
            # They were published with keys such as `norm.1`, which module names no longer allow.
            return {_OLD_DENSENET.sub(r"\1\2.", key): value for key, value in state.items()}
        if self.name.startswith(("fcn_", "deeplabv3_")) and not self.arguments.get("aux_loss"):
            # A second head, only for training.
            return {key: value for key, value in state.items() if "aux_classifier." not in key}
        return state


def _as_trained(module: nn.Module, weights: str) -> None:
    """Some detectors were trained with batch norms that add no epsilon, which their files do not say."""
    import torch

    if weights in _NO_EPSILON:
        for part in module.modules():
            if isinstance(part, torch.nn.BatchNorm2d):
                part.eps = 0.0


def _drop_auxiliary(module: nn.Module) -> None:
    """The heads that GoogLeNet and Inception only train with: no need to carry them to every device."""
    for head in ("aux1", "aux2", "AuxLogits"):
        if getattr(module, head, None) is not None:
            setattr(module, head, None)
            setattr(module, "aux_logits", False)  # noqa: B010 - torch types every attribute as tensor or module
