"""Weights published by torchvision: names, labels and preprocessing, and the files from a mirror, cache or the web."""

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
    """One set of weights that torchvision publishes for a model.

    Attributes:
        name: Full name, such as `ResNet50_Weights.IMAGENET1K_V2`.
        url: Address of the file.
        preprocess: Preprocessing they were trained with; None if it is not resize, crop and normalise.
        labels: Class names by class id; None if there are none.
        arguments: Keyword arguments of the architecture that these weights need.
    """

    name: str
    url: str
    preprocess: Preprocess | None
    labels: tuple[str, ...] | None
    arguments: dict[str, Any]

    @property
    def file_name(self) -> str:
        """Last part of the address: "resnet50-11ad3fa6.pth"."""
        return self.url.rsplit("/", 1)[1]


def find_weights_by_name(model: str, weights: str) -> PublishedWeights:
    """Find the published weights of a model by name.

    Args:
        model: Name of the model: "resnet50".
        weights: `DEFAULT`, `IMAGENET1K_V2` or `ResNet50_Weights.IMAGENET1K_V2`.

    Raises:
        InvalidJob: There are none of this name. The message gives the most similar name, or all names.
    """
    from torchvision.models import get_model_weights

    members = get_model_weights(model)
    prefix, _, name = weights.rpartition(".")
    if name in members.__members__ and prefix in {"", members.__name__}:
        return _describe_weights(model, members[name])
    names = list(members.__members__)
    similar = difflib.get_close_matches(name.upper(), names, n=1)
    hint = f"did you mean {similar[0]}?" if similar else f"there are {', '.join(names)}"
    raise InvalidJob(f"model.weights: torchvision's {model} has no weights {weights!r}; {hint} A file has a '/' in it")


def find_weights_by_file(model: str, file_name: str) -> PublishedWeights | None:
    """Find the weights of a model that are published under a file name; None if there are none."""
    from torchvision.models import get_model_weights

    candidates = (_describe_weights(model, member) for member in get_model_weights(model))
    return next((weights for weights in candidates if weights.file_name == file_name), None)


def convert_preset(transforms: Any) -> Preprocess | None:
    """Convert a torchvision preset to settings.

    Supported are the presets of classification, of detection (which leave all to the model) and of segmentation (which
    make images of different sizes, predicted in groups of one size).

    Args:
        transforms: Return value of `weights.transforms()`, or any other object.

    Returns:
        The settings; None if the object is no such preset.
    """
    from torchvision.transforms._presets import ImageClassification, ObjectDetection, SemanticSegmentation

    if isinstance(transforms, ObjectDetection):
        return Preprocess(resize=None, crop=None, mean=None, std=None, channels="rgb", scale="unit")
    if not isinstance(transforms, ImageClassification | SemanticSegmentation) or not transforms.antialias:
        return None
    interpolation = transforms.interpolation.value
    if interpolation not in {"nearest", "bilinear", "bicubic"}:
        return None
    crops = isinstance(transforms, ImageClassification)
    return Preprocess(
        resize=_unwrap_size(transforms.resize_size) if transforms.resize_size is not None else None,
        crop=_unwrap_size(transforms.crop_size) if crops else None,
        interpolation=interpolation,
        mean=tuple(transforms.mean),
        std=tuple(transforms.std),
        channels="rgb",
        scale="unit",
        sizes="one" if crops else "group",
    )


def fetch_weights(weights: PublishedWeights, reader: Reader, mirror: str | None) -> tuple[bytes, str]:
    """Fetch a published file from the mirror if there is one, else from torch's cache, else from the web.

    Args:
        weights: Weights to fetch.
        reader: Reader of the mirror.
        mirror: Folder with published files under their own names; None if the job states none.

    Returns:
        The content of the file, and the path or address it came from.

    Raises:
        InvalidJob: The file is not in the mirror, or is not the published one.
        Unavailable: The file is not in the cache, and its server cannot be reached. The message says how to provide it.
    """
    import torch

    if mirror is not None:
        uri = f"{mirror.rstrip('/')}/{weights.file_name}"
        data = read_file(reader, uri, f"model.mirror, for {weights.name} as published at {weights.url}")
        return _verify_published(data, weights, uri), uri
    cached = Path(torch.hub.get_dir()) / "checkpoints" / weights.file_name
    if cached.is_file():
        return _verify_published(cached.read_bytes(), weights, str(cached)), str(cached)
    data = _verify_published(_download(weights, cached.parent), weights, weights.url)
    _write_cache(data, cached)
    return data, weights.url


def _describe_weights(model: str, member: Any) -> PublishedWeights:
    labels = member.meta.get("categories")
    arguments: dict[str, Any] = {"num_classes": len(labels)} if labels else {}
    if model in {"googlenet", "inception_v3"}:
        arguments |= {"transform_input": True, "aux_logits": True}
    elif model.startswith("vit_"):
        arguments["image_size"] = member.meta["min_size"][0]
    elif model.startswith("maxvit"):
        arguments["input_size"] = tuple(member.meta["min_size"])
    return PublishedWeights(
        name=f"{type(member).__name__}.{member.name}",
        url=member.url,
        preprocess=convert_preset(member.transforms()),
        labels=tuple(labels) if labels else None,
        arguments=arguments,
    )


def _unwrap_size(size: list[Any]) -> int | tuple[int, int]:
    """Convert the size of a preset: [256] → 256 (shorter side), [(224, 320)] and [224, 320] → (224, 320)."""
    inner = size[0] if len(size) == 1 else size
    return int(inner) if isinstance(inner, int) else (int(inner[0]), int(inner[-1]))


def _verify_published(data: bytes, weights: PublishedWeights, source: str) -> bytes:
    # A published file name ends with the first hexadecimal digits of its SHA-256: resnet50-11ad3fa6.pth.
    prefix = re.search(r"-([0-9a-f]{8,})\.", weights.file_name)
    digest = hashlib.sha256(data).hexdigest()
    if prefix and not digest.startswith(prefix[1]):
        raise InvalidJob(
            f"{source} is not what torchvision published as {weights.file_name}: its sha256 starts "
            f"{digest[: len(prefix[1])]}; copy it again from {weights.url}"
        )
    return data


def _download(weights: PublishedWeights, cache: Path) -> bytes:
    problem = (
        f"the weights {weights.name} ({weights.file_name}) are not in {cache} and cannot be had from {weights.url}"
    )
    advice = "fetch the file elsewhere and set model.mirror to the folder that holds it, or model.weights to its path"
    # Not by torch.hub, which has no time-out in a network that drops packets, and which prints to stdout.
    try:
        with urlopen(weights.url, timeout=_CONNECT_SECONDS) as response:  # noqa: S310 - torchvision's own https
            data: bytes = response.read()
            return data
    except HTTPError as error:
        error_type = Unavailable if error.code == 429 or error.code >= 500 else InvalidJob
        raise error_type(f"{problem} (HTTP {error.code}): {advice}") from error
    except (URLError, OSError, HTTPException) as error:
        raise Unavailable(f"{problem} ({getattr(error, 'reason', error)}): {advice}") from error


def _write_cache(data: bytes, path: Path) -> None:
    """Write a file to torch's cache, atomically. A cache that cannot be written costs the next worker a download."""
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.NamedTemporaryFile(dir=path.parent, prefix=f"{path.name}.", delete=False) as file:
            file.write(data)
        Path(file.name).replace(path)
    except OSError as error:
        _log.info("%s could not be kept for later: %s", path, error)
