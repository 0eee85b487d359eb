"""`type: timm`: a timm model by name, with published weights, the user's own file, or random weights."""

from __future__ import annotations

import difflib
import logging
import math
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, Self

from pydantic import Field, model_validator

from batchjob.errors import InvalidJob
from batchjob.models.class_layers import find_timm_layers
from batchjob.models.huggingface_hub import convert_hub_error, silence_hub_libraries
from batchjob.models.loaded_model import (
    LoadedModel,
    describe_random_weights,
    isolated_torch_state,
    prepare_for_inference,
)
from batchjob.models.output_selection import OutputSelection, select_output
from batchjob.models.state_dict_selection import StateDictSelection
from batchjob.models.trusted_file import StateDictFile, verify_digest
from batchjob.models.weights import LoadedWeights, check_file_exists, hash_state_dict, load_weights, read_file
from batchjob.preprocessing.settings import Preprocess
from batchjob.settings import Uri
from batchjob.system import require_packages

if TYPE_CHECKING:
    from torch import nn

    from batchjob.storage.reader import Reader

__all__ = ["TimmModel"]

_log = logging.getLogger(__name__)
# Arguments of `timm.create_model` with a job key of their own, and those that would load weights unseen by the job.
_JOB_KEYS = ("num_classes", "pretrained")
# Keys of a checkpoint in the order in which timm's own `load_checkpoint` looks for them.
_CHECKPOINT_KEYS = ("state_dict_ema", "model_ema", "state_dict", "model")
_WEIGHTS_ARGUMENTS = ("cache_dir", "checkpoint_path", "pretrained_cfg", "pretrained_cfg_overlay")


class TimmModel(StateDictFile, OutputSelection):
    """Model of timm. It brings its evaluation preprocessing, and ImageNet's labels if it was trained for them.

    Attributes:
        name: Name in `timm.list_models()`, with the tag of the weights if there are several (`resnet50.a1_in1k`); the
            preprocessing depends on the tag, too.
        weights: Local path or URI of a `.safetensors` or `.pth` file.
        pretrained: True for the published weights of that name, from the Hugging Face Hub (or the mirror in
            HF_ENDPOINT) or its local cache.
        num_classes: Number of classes of the last layer, for weights of your own; 0 removes that layer, so that the
            model returns features.
        arguments: Further keyword arguments of `timm.create_model`.
        seed: Seed of random weights, for tests.
    """

    type: Literal["timm"] = "timm"
    name: str
    weights: Uri | None = None
    pretrained: bool = False
    num_classes: int | None = Field(default=None, ge=0)
    arguments: dict[str, Any] = Field(default_factory=dict)
    seed: int | None = Field(default=None, ge=0, lt=2**63)

    @model_validator(mode="after")
    def _check_weights_source(self) -> Self:
        sources = [self.weights is not None, self.pretrained, self.seed is not None]
        if sum(sources) != 1:
            raise ValueError("one of weights (a file), pretrained: true and seed (random weights) must be given")
        if self.sha256 is not None and self.weights is None:
            raise ValueError("sha256 is that of a file; name the file under weights")
        # Plans of earlier versions prefer plain weights, whether or not the job names a file.
        if self.weights is None and self.selection not in (StateDictSelection(), StateDictSelection(prefer="plain")):
            raise ValueError("checkpoint is a place in a file; name the file under weights")
        for key in self.arguments:
            if key in _JOB_KEYS:
                raise ValueError(f"{key} does not belong in arguments; write model.{key}")
            if key in _WEIGHTS_ARGUMENTS:
                raise ValueError(f"{key} in arguments is not taken; name a file under model.weights")
        if self.name.startswith("local-dir:"):
            raise ValueError("name is one of timm's; give the name, and the file in that folder under weights")
        return self

    @property
    def title(self) -> str:
        """Name in the column `model_id`, before the digest."""
        return self.name

    def check(self, reader: Reader, folder: Path) -> None:  # noqa: ARG002 - all formats share this signature
        """Check, without torch, that timm is installed and the file exists.

        Raises:
            InvalidJob: One of these is not so.
            Unavailable: The store cannot be reached.
        """
        require_packages("timm", model_type="timm", extra="timm")
        if self.weights is not None:
            check_file_exists(reader, self.weights, "model.weights")

    def list_files(self, reader: Reader, folder: Path) -> list[str]:  # noqa: ARG002
        """Return the URI of the weights, if they are the user's own file."""
        return [] if self.weights is None else [self.weights]

    def load(self, reader: Reader, folder: Path) -> LoadedModel:  # noqa: ARG002
        """Build the model and load its weights.

        Raises:
            InvalidJob: timm is not installed, the name is unknown, the file does not exist, or the weights do not fit
                or have another digest.
            Unavailable: Published weights are not in the cache, and the Hub cannot be reached.
        """
        require_packages("timm", model_type="timm", extra="timm")
        if self.weights is None:
            module = self._build_module(self.seed or 0)
            digest, notes = hash_state_dict(module), describe_random_weights(self.seed)
        else:
            data = read_file(reader, self.weights, "model.weights")
            digest = verify_digest(data, self.weights, self.sha256)
            module = self._build_module()
            loaded = self._load_file(module, data, self.weights)
            digest, notes = loaded.complete_digest(digest), loaded.notes
        preprocess, labels = self._make_preprocess(module), self._find_labels(module)
        headless = f"timm's {self.name} was built without its last layer (model.num_classes: 0)"
        return LoadedModel(
            select_output(module, self.output),
            preprocess,
            labels,
            digest,
            class_layers=find_timm_layers(module) if self.output is None else (),
            gives_features=headless if self.num_classes == 0 else None,
            notes=notes,
        )

    def _build_module(self, seed: int = 0) -> nn.Module:
        import timm

        keywords = dict(self.arguments)
        if self.num_classes is not None:
            keywords["num_classes"] = self.num_classes
        if ":" not in self.name:
            self._check_name()
        try:
            with silence_hub_libraries(), isolated_torch_state(seed):
                module: nn.Module = timm.create_model(self.name, pretrained=self.pretrained, **keywords)
                return prepare_for_inference(module, "model.name")
        except (TypeError, ValueError, KeyError, AssertionError, RuntimeError, OSError) as error:
            advice = "fetch the file elsewhere and set model.weights to its path"
            hub_error = convert_hub_error(error, f"timm's {self.name}", advice)
            if hub_error is not None:
                raise hub_error from error
            reason = f"{type(error).__name__}: {' '.join(str(error).split())[:300]}"
            raise InvalidJob(
                f"model.name: timm's {self.name} cannot be built with {keywords}: {reason}; "
                "correct model.arguments or model.num_classes"
            ) from error

    def _check_name(self) -> None:
        """Check name, tag and number of classes.

        The number of classes is checked here because timm itself would, without a warning, replace the last layer of
        published weights by a random one of another size.
        """
        import timm

        name, _, tag = self.name.partition(".")
        if not timm.is_model(name):
            similar = difflib.get_close_matches(name, timm.list_models(), n=4, cutoff=0.5)
            hint = f"did you mean {' or '.join(similar)}?" if similar else "timm.list_models() lists them"
            raise InvalidJob(f"model.name: timm has no model named {name!r}; {hint}")
        tags = [pretrained.partition(".")[2] for pretrained in timm.list_pretrained(f"{name}.*")]
        if tag and tag not in tags:
            tag_list = ", ".join(tags) or "none"
            raise InvalidJob(f"model.name: timm's {name} has no weights tagged {tag!r}; there are {tag_list}")
        published = timm.get_pretrained_cfg(self.name)
        classes = getattr(published, "num_classes", None)
        if self.pretrained and not tags:
            raise InvalidJob(f"model.pretrained: timm publishes no weights of {name}; give a file under model.weights")
        if self.pretrained and self.num_classes not in {None, 0, classes}:
            raise InvalidJob(
                f"model.num_classes is {self.num_classes}, but the published {self.name} knows {classes} classes; "
                "leave num_classes out, or give the file of weights trained for yours under model.weights"
            )

    def _load_file(self, module: nn.Module, data: bytes, uri: str) -> LoadedWeights:
        known = module.state_dict()
        heads = _list_heads(module) if self.num_classes == 0 else ()
        with isolated_torch_state():
            return load_weights(
                module,
                data,
                uri,
                self.selection,
                model=f"timm's {self.name}",
                advice="correct model.name, model.num_classes or model.arguments",
                first_keys=_CHECKPOINT_KEYS,
                # The model was built without its last layer.
                is_ignored=lambda key: key not in known and any(f"{head}." in key for head in heads),
            )

    def _make_preprocess(self, module: nn.Module) -> Preprocess | None:
        """Convert timm's evaluation transform to settings; log and return None if settings cannot express it."""
        from timm.data import config as timm_data

        resolve: Any = timm_data.resolve_model_data_config
        size = self.arguments.get("img_size")
        channels = self.arguments.get("in_chans", 3)
        sides = tuple(size) if isinstance(size, list | tuple) else (size, size)
        config = resolve(module, args={"input_size": (channels, *sides)} if size else {})
        height, width = config["input_size"][-2:]
        # timm resizes to the input size divided by crop_pct, then crops. Example: 224 / 0.875 → 256.
        resize = tuple(math.floor(side / config["crop_pct"]) for side in (height, width))
        mode = config["crop_mode"]
        unsupported = None
        if channels != 3:
            unsupported = f"{channels} channels"
        elif mode == "border" or (mode != "squash" and height != width):
            unsupported = f"crop mode {mode} to {height}x{width}"
        elif config["interpolation"] not in {"nearest", "bilinear", "bicubic"}:
            unsupported = f"interpolation {config['interpolation']}"
        if unsupported is not None:
            _log.warning(
                "timm prepares images for %s with %s, for which 'preprocess' has no words", self.name, unsupported
            )
            return None
        return Preprocess(
            resize=(resize[0], resize[1]) if mode == "squash" else resize[0],
            crop=(height, width) if height != width else height,
            interpolation=config["interpolation"],
            mean=tuple(config["mean"]),
            std=tuple(config["std"]),
            channels="rgb",
            scale="unit",
        )

    def _find_labels(self, module: nn.Module) -> tuple[str, ...] | None:
        """Find the model's own labels, or ImageNet's if the weights are known to be of its 1000 classes."""
        from timm.data.imagenet_info import ImageNetInfo

        config: dict[str, Any] = getattr(module, "pretrained_cfg", None) or {}
        classes = getattr(module, "num_classes", None)
        own_labels = config.get("label_names")
        if own_labels and len(own_labels) == classes:
            return tuple(map(str, own_labels))
        # A file under a name without a tag may have been trained on another 1000 classes.
        has_tag = self.weights is None or "." in self.name
        if has_tag and classes == 1000 and "in1k" in str(config.get("tag")):
            return tuple(ImageNetInfo("imagenet-1k").label_descriptions())
        return None


def _list_heads(module: nn.Module) -> tuple[str, ...]:
    """List the names of the last layers."""
    config: Any = getattr(module, "pretrained_cfg", None) or {}
    classifier = config.get("classifier") or ()
    return (classifier,) if isinstance(classifier, str) else tuple(classifier)
