"""`type: timm`: a model of timm by name, with published weights, a file of one's own, or random ones."""

from __future__ import annotations

import difflib
import logging
import math
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, Self

from pydantic import Field, model_validator

from batchjob.errors import InvalidJob
from batchjob.models.architecture import isolated_torch_state, prepare_for_inference
from batchjob.models.huggingface_hub import convert_hub_error, silence_hub_libraries
from batchjob.models.loaded_model import LoadedModel
from batchjob.models.output_selection import OutputSelection, select_output
from batchjob.models.trusted_file import WeightsFile, verify_digest
from batchjob.models.weights import check_file_exists, hash_state_dict, load_weights, parse_state_dict, read_file
from batchjob.preprocessing.settings import Preprocess
from batchjob.settings import Uri
from batchjob.system import require_packages

if TYPE_CHECKING:
    from torch import nn

    from batchjob.storage.reader import Reader

__all__ = ["TimmModel"]

_log = logging.getLogger(__name__)
_OWN = ("num_classes", "pretrained")
_BEHIND = ("cache_dir", "checkpoint_path", "pretrained_cfg", "pretrained_cfg_overlay")


class TimmModel(WeightsFile, OutputSelection):
    """A model of timm. It brings its evaluation preprocessing, and ImageNet's labels where it knows those classes.

    Attributes:
        name: as `timm.list_models` gives it, with the tag of the weights where there are several
            (`resnet50.a1_in1k`): the tag also says how images are prepared.
        weights: a `.safetensors` or `.pth` file, wherever it lies.
        pretrained: the published weights of that name, from the Hugging Face Hub (or the mirror that HF_ENDPOINT
            names) or its local cache.
        num_classes: of the last layer, for weights of one's own; 0 leaves it out, so that features come out.
        arguments: more keyword arguments for `timm.create_model`.
        seed: random weights from this seed instead, for tests.
    """

    type: Literal["timm"] = "timm"
    name: str
    weights: Uri | None = None
    pretrained: bool = False
    num_classes: int | None = Field(default=None, ge=0)
    arguments: dict[str, Any] = Field(default_factory=dict)
    seed: int | None = Field(default=None, ge=0, lt=2**63)

    @model_validator(mode="after")
    def _one_of(self) -> Self:
        given = [self.weights is not None, self.pretrained, self.seed is not None]
        if sum(given) != 1:
            raise ValueError("one of weights (a file), pretrained: true and seed (random weights) must be given")
        if self.sha256 is not None and self.weights is None:
            raise ValueError("sha256 is that of a file; name the file under weights")
        for key in self.arguments:
            if key in _OWN:
                raise ValueError(f"{key} does not belong in arguments; write model.{key}")
            if key in _BEHIND:
                raise ValueError(f"{key} in arguments is not taken; name a file under model.weights")
        if self.name.startswith("local-dir:"):
            raise ValueError("name is one of timm's; give the name, and the file in that folder under weights")
        return self

    @property
    def title(self) -> str:
        """What `model_id` calls it, before the digest."""
        return self.name

    def check(self, reader: Reader, base: Path) -> None:  # noqa: ARG002 - one face for all formats
        """Looks without torch whether timm and the file are there. Raises InvalidJob, Unavailable."""
        require_packages("timm", "timm", "timm")
        if self.weights is not None:
            check_file_exists(reader, self.weights, "model.weights")

    def load(self, reader: Reader, base: Path) -> LoadedModel:  # noqa: ARG002
        """Builds and fills the model.

        Raises:
            InvalidJob: no timm, unknown name, weights that do not fit, another digest, a file that is not there.
            Unavailable: published weights are not in the cache, and there is no way out.
        """
        require_packages("timm", "timm", "timm")
        if self.weights is None:
            module = self._built(self.seed or 0)
            digest = hash_state_dict(module)
        else:
            data = read_file(reader, self.weights, "model.weights")
            digest = verify_digest(data, self.weights, self.sha256)
            module = self._filled(data, self.weights)
        preprocess, labels = self._preprocess(module), self._labels(module)
        return LoadedModel(select_output(module, self.output), preprocess, labels, digest)

    def _built(self, seed: int = 0) -> nn.Module:
        import timm

        given = dict(self.arguments)
        if self.num_classes is not None:
            given["num_classes"] = self.num_classes
        if ":" not in self.name:
            self._check_name()
        try:
            with silence_hub_libraries(), isolated_torch_state(seed):
                module: nn.Module = timm.create_model(self.name, pretrained=self.pretrained, **given)
                return prepare_for_inference(module, "model.name")
        except (TypeError, ValueError, KeyError, AssertionError, RuntimeError, OSError) as error:
            advice = "fetch the file elsewhere and set model.weights to its path"
            fault = convert_hub_error(error, f"timm's {self.name}", advice)
            if fault is not None:
                raise fault from error
            raise InvalidJob(
                f"model.name: timm's {self.name} cannot be built with {given}: {_brief(error)}; "
                "correct model.arguments or model.num_classes"
            ) from error

    def _check_name(self) -> None:
        """Also that the published weights know as many classes: timm would make up the last layer, and say nothing."""
        import timm

        name, _, tag = self.name.partition(".")
        if not timm.is_model(name):
            near = difflib.get_close_matches(name, timm.list_models(), n=4, cutoff=0.5)
            hint = f"did you mean {' or '.join(near)}?" if near else "timm.list_models() lists them"
            raise InvalidJob(f"model.name: timm has no model named {name!r}; {hint}")
        tags = [known.partition(".")[2] for known in timm.list_pretrained(f"{name}.*")]
        if tag and tag not in tags:
            listed = ", ".join(tags) or "none"
            raise InvalidJob(f"model.name: timm's {name} has no weights tagged {tag!r}; there are {listed}")
        published = timm.get_pretrained_cfg(self.name)
        classes = getattr(published, "num_classes", None)
        if self.pretrained and not tags:
            raise InvalidJob(f"model.pretrained: timm publishes no weights of {name}; give a file under model.weights")
        if self.pretrained and self.num_classes not in {None, 0, classes}:
            raise InvalidJob(
                f"model.num_classes is {self.num_classes}, but the published {self.name} knows {classes} classes; "
                "leave num_classes out, or give the file of weights trained for yours under model.weights"
            )

    def _filled(self, data: bytes, place: str) -> nn.Module:
        module = self._built()
        with isolated_torch_state():
            state = parse_state_dict(data, place)
            load_weights(
                module,
                _without_head(state, module) if self.num_classes == 0 else state,
                where=f"model.weights: {place} does not fit timm's {self.name}",
                advice="correct model.name, model.num_classes or model.arguments",
            )
        return module

    def _preprocess(self, module: nn.Module) -> Preprocess | None:
        """timm's evaluation transform as settings; None, with a line in the log, where they cannot say it."""
        from timm.data import config as timm_data

        resolve: Any = timm_data.resolve_model_data_config
        size = self.arguments.get("img_size")
        channels = self.arguments.get("in_chans", 3)
        sides = tuple(size) if isinstance(size, list | tuple) else (size, size)
        config = resolve(module, args={"input_size": (channels, *sides)} if size else {})
        height, width = config["input_size"][-2:]
        resize = tuple(math.floor(side / config["crop_pct"]) for side in (height, width))
        mode = config["crop_mode"]
        said = None
        if channels != 3:
            said = f"{channels} channels"
        elif mode == "border" or (mode != "squash" and height != width):
            said = f"crop mode {mode} to {height}x{width}"
        elif config["interpolation"] not in {"nearest", "bilinear", "bicubic"}:
            said = f"interpolation {config['interpolation']}"
        if said is not None:
            _log.warning("timm prepares images for %s with %s, for which 'preprocess' has no words", self.name, said)
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

    def _labels(self, module: nn.Module) -> tuple[str, ...] | None:
        """Its own where it has some; ImageNet's where the weights are known to be of its 1000 classes."""
        from timm.data.imagenet_info import ImageNetInfo

        config: dict[str, Any] = getattr(module, "pretrained_cfg", None) or {}
        classes = getattr(module, "num_classes", None)
        own = config.get("label_names")
        if own and len(own) == classes:
            return tuple(map(str, own))
        named = self.weights is None or "." in self.name  # a file may be of 1000 classes of the user's own
        if named and classes == 1000 and "in1k" in str(config.get("tag")):
            return tuple(ImageNetInfo("imagenet-1k").label_descriptions())
        return None


def _without_head(state: dict[str, Any], module: nn.Module) -> dict[str, Any]:
    """The state without the last layer, which a model for features has not got."""
    config: Any = getattr(module, "pretrained_cfg", None) or {}
    heads = config.get("classifier") or ()
    names = (heads,) if isinstance(heads, str) else tuple(heads)
    known = module.state_dict()
    return {key: value for key, value in state.items() if key in known or not any(f"{name}." in key for name in names)}


def _brief(error: Exception) -> str:
    return f"{type(error).__name__}: {' '.join(str(error).split())[:300]}"
