"""torchvision's published weights: their names, labels and preprocessing, and their files from mirror, cache or web."""

from __future__ import annotations

import difflib
import hashlib
import logging
import re
import tempfile
from dataclasses import dataclass
from http.client import HTTPException
from pathlib import Path
from typing import TYPE_CHECKING, Any
from urllib.error import HTTPError, URLError
from urllib.request import urlopen

from batchjob.errors import InvalidJob, Unavailable
from batchjob.models.weights import read_file
from batchjob.preprocessing.settings import Preprocess

if TYPE_CHECKING:
    from batchjob.storage.reader import Reader

__all__ = ["PublishedWeights", "convert_preset", "fetch_weights", "find_weights_by_file", "find_weights_by_name"]

_log = logging.getLogger(__name__)
_CONNECT_SECONDS = 10


@dataclass(frozen=True)
class PublishedWeights:
    """One set of weights that torchvision publishes.

    Attributes:
        name: full name, such as `ResNet50_Weights.IMAGENET1K_V2`.
        url: where torchvision says its file lies.
        preprocess: its own transforms, or None where they are not resize, crop and normalise.
        labels: class names by id, or None.
        arguments: what the architecture must be built with for these weights.
    """

    name: str
    url: str
    preprocess: Preprocess | None
    labels: tuple[str, ...] | None
    arguments: dict[str, Any]

    @property
    def file_name(self) -> str:
        return self.url.rsplit("/", 1)[1]


def find_weights_by_name(model: str, weights: str) -> PublishedWeights:
    """`DEFAULT`, `IMAGENET1K_V2` or `ResNet50_Weights.IMAGENET1K_V2` of one model. Raises InvalidJob (which exist)."""
    from torchvision.models import get_model_weights

    members = get_model_weights(model)
    prefix, _, short = weights.rpartition(".")
    if short in members.__members__ and prefix in {"", members.__name__}:
        return _published(model, members[short])
    names = list(members.__members__)
    near = difflib.get_close_matches(short.upper(), names, n=1)
    hint = f"did you mean {near[0]}?" if near else f"there are {', '.join(names)}"
    raise InvalidJob(f"model.weights: torchvision's {model} has no weights {weights!r}; {hint} A file has a '/' in it")


def find_weights_by_file(model: str, file: str) -> PublishedWeights | None:
    """The published weights of `model` that come in a file of this name, if any."""
    from torchvision.models import get_model_weights

    found = (_published(model, member) for member in get_model_weights(model))
    return next((weights for weights in found if weights.file_name == file), None)


def _published(model: str, member: Any) -> PublishedWeights:
    labels = member.meta.get("categories")
    arguments: dict[str, Any] = {"num_classes": len(labels)} if labels else {}
    if model in {"googlenet", "inception_v3"}:
        arguments |= {"transform_input": True, "aux_logits": True}
    elif model.startswith("vit_"):
        arguments["image_size"] = member.meta["min_size"][0]
    elif model.startswith("maxvit"):
        arguments["input_size"] = tuple(member.meta["min_size"])
    name = f"{type(member).__name__}.{member.name}"
    return PublishedWeights(
        name, member.url, convert_preset(member.transforms()), tuple(labels) if labels else None, arguments
    )


def convert_preset(transforms: Any) -> Preprocess | None:
    """What a torchvision preset (`weights.transforms()`) does, as settings; None for those that do anything else.

    Presets of classification, detection (which leave everything to the model) and segmentation (which make images of
    different sizes, so that these are predicted by size).
    """
    from torchvision.transforms._presets import ImageClassification, ObjectDetection, SemanticSegmentation

    if isinstance(transforms, ObjectDetection):
        return Preprocess(resize=None, crop=None, mean=None, std=None, channels="rgb", scale="unit")
    if not isinstance(transforms, ImageClassification | SemanticSegmentation) or not transforms.antialias:
        return None
    interpolation = transforms.interpolation.value
    if interpolation not in {"nearest", "bilinear", "bicubic"}:
        return None
    cropped = isinstance(transforms, ImageClassification)
    return Preprocess(
        resize=_size(transforms.resize_size) if transforms.resize_size is not None else None,
        crop=_size(transforms.crop_size) if cropped else None,
        interpolation=interpolation,
        mean=tuple(transforms.mean),
        std=tuple(transforms.std),
        channels="rgb",
        scale="unit",
        sizes="one" if cropped else "group",
    )


def _size(size: list[Any]) -> int | tuple[int, int]:
    """`[256]` is the shorter side; a preset given a pair holds it once more wrapped."""
    inner = size[0] if len(size) == 1 else size
    return int(inner) if isinstance(inner, int) else (int(inner[0]), int(inner[-1]))


def fetch_weights(weights: PublishedWeights, reader: Reader, mirror: str | None) -> tuple[bytes, str]:
    """The file's bytes and where they came from: the mirror where there is one, else torch's cache, else the web.

    Raises:
        InvalidJob: not in the mirror, or not the published bytes.
        Unavailable: not in the cache and no way out; the sentence says how to bring the file.
    """
    import torch

    if mirror is not None:
        place = f"{mirror.rstrip('/')}/{weights.file_name}"
        data = read_file(reader, place, f"model.mirror, for {weights.name} as published at {weights.url}")
        return _verified(data, weights, place), place
    cached = Path(torch.hub.get_dir()) / "checkpoints" / weights.file_name
    if cached.is_file():
        return _verified(cached.read_bytes(), weights, str(cached)), str(cached)
    data = _verified(_download(weights, cached.parent), weights, weights.url)
    _keep(data, cached)
    return data, weights.url


def _verified(data: bytes, weights: PublishedWeights, place: str) -> bytes:
    """Published names end in the first digits of their content's sha256."""
    said = re.search(r"-([0-9a-f]{8,})\.", weights.file_name)
    found = hashlib.sha256(data).hexdigest()
    if said and not found.startswith(said[1]):
        raise InvalidJob(
            f"{place} is not what torchvision published as {weights.file_name}: its sha256 starts "
            f"{found[: len(said[1])]}; "
            f"copy it again from {weights.url}"
        )
    return data


def _download(weights: PublishedWeights, cache: Path) -> bytes:
    """Own loop and not torch.hub's: that waits for ever on a network that swallows packets, and prints to stdout."""
    wanted = f"the weights {weights.name} ({weights.file_name}) are not in {cache} and cannot be had from {weights.url}"
    advice = "fetch the file elsewhere and set model.mirror to the folder that holds it, or model.weights to its path"
    try:
        with urlopen(weights.url, timeout=_CONNECT_SECONDS) as answer:  # noqa: S310 - torchvision's own https
            data: bytes = answer.read()
            return data
    except HTTPError as error:
        kind = Unavailable if error.code == 429 or error.code >= 500 else InvalidJob
        raise kind(f"{wanted} (HTTP {error.code}): {advice}") from error
    except (URLError, OSError, HTTPException) as error:
        raise Unavailable(f"{wanted} ({getattr(error, 'reason', error)}): {advice}") from error


def _keep(data: bytes, path: Path) -> None:
    """Into torch's cache, whole or not at all."""
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.NamedTemporaryFile(dir=path.parent, prefix=f"{path.name}.", delete=False) as spool:
            spool.write(data)
        Path(spool.name).replace(path)
    except OSError as error:  # a read-only cache costs the next worker its own download, nothing else
        _log.info("%s could not be kept for later: %s", path, error)
