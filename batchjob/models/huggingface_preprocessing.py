"""What an image processor of transformers does, as preprocessing settings; tried out before it is believed."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any, Literal

from batchjob.preprocessing.settings import Preprocess

if TYPE_CHECKING:
    import torch

__all__ = ["convert_image_processor"]

_log = logging.getLogger(__name__)
_INTERPOLATION: dict[int, Literal["nearest", "bilinear", "bicubic"]] = {0: "nearest", 2: "bilinear", 3: "bicubic"}
_TRIED = [(60, 90), (130, 72), (40, 260)]  # height and width: one so long that a limit on the longer side shows


def convert_image_processor(processor: Any, where: str) -> Preprocess | None:
    """The settings that do what the image processor does; None, with a line in the log, where there are none.

    Processors follow rules of their own that their configuration does not tell (ConvNeXT crops to a part of the size),
    so settings count only where they turn three images of noise into what the processor makes of them. Two things may
    still differ: a resized pixel by one grey level, and a centre crop may lie one pixel beside (where the rest is odd,
    transformers rounds down and torchvision to even).

    Args:
        processor: from `AutoImageProcessor`.
        where: what it belongs to, for the log.
    """
    images = [_noise(height, width) for height, width in _TRIED]
    try:
        wanted = [processor(images=[image.numpy()], return_tensors="pt")["pixel_values"][0] for image in images]
    except Exception as error:  # noqa: BLE001 - a processor of something else than single images
        _log.warning("%s: its image processor does not take single images (%s)", where, error)
        return None
    for preprocess in _candidates(processor):
        if all(_agree(preprocess, image, want) for image, want in zip(images, wanted, strict=True)):
            return preprocess
    _log.warning(
        "%s: 'preprocess' has no words for what its %s does (size %s)",
        where,
        type(processor).__name__,
        getattr(processor, "size", None),
    )
    return None


def _candidates(processor: Any) -> Iterator[Preprocess]:
    """What it might do, the plain reading of its configuration first."""
    values = _values(processor)
    if values is None:
        return
    size = _sizes(getattr(processor, "size", None)) if getattr(processor, "do_resize", None) else {}
    crop = _pair(_sizes(getattr(processor, "crop_size", None)))
    if not getattr(processor, "do_center_crop", None):
        crop = None
    pair, edge = _pair(size), size.get("shortest_edge")
    share = getattr(processor, "crop_pct", None) or 1
    readings: list[tuple[Any, Any]] = [(pair if pair is not None else edge, crop)]
    if edge:
        readings += [
            (int(edge / share), edge),  # ConvNeXT, below 384
            ((edge, edge), None),  # ConvNeXT, from there on
            (int(edge / share), crop),  # PoolFormer
            (int(edge * 256 / 224), crop),  # LeViT
        ]
    for resize, cropped in readings:
        yield values.model_copy(update={"resize": resize, "crop": cropped})


def _values(processor: Any) -> Preprocess | None:
    """Interpolation, scale and moments; None where they cannot be said."""
    resample = getattr(processor, "resample", None)
    interpolation = _INTERPOLATION.get(int(resample)) if resample is not None else "bilinear"
    if interpolation is None:
        return None
    factor = float(processor.rescale_factor) if getattr(processor, "do_rescale", None) else 1.0
    scale: Literal["unit", "none"] = "unit" if abs(factor * 255 - 1) < 1e-6 else "none"
    mean: tuple[float, ...] | None = None
    std: tuple[float, ...] | None = None
    if getattr(processor, "do_normalize", None):
        mean, std = _moments(processor.image_mean), _moments(processor.image_std)
    elif scale == "none" and factor != 1:
        mean, std = (0.0,) * 3, (1.0,) * 3
    if scale == "none" and mean and std:  # what is divided by another number than 255 goes into the moments
        mean, std = tuple(value / factor for value in mean), tuple(value / factor for value in std)
    channels: Literal["rgb", "bgr"] = "bgr" if getattr(processor, "do_flip_channel_order", None) else "rgb"
    return Preprocess(
        resize=None, crop=None, interpolation=interpolation, mean=mean, std=std, channels=channels, scale=scale
    )


def _moments(values: Any) -> tuple[float, ...]:
    return tuple(map(float, values)) if isinstance(values, list | tuple) else (float(values),) * 3


def _sizes(size: Any) -> dict[str, int]:
    if isinstance(size, int):
        return {"height": size, "width": size}
    names = ("height", "width", "shortest_edge")
    found = {name: size.get(name) if isinstance(size, dict) else getattr(size, name, None) for name in names}
    return {name: value for name, value in found.items() if isinstance(value, int)}


def _pair(size: dict[str, int]) -> int | tuple[int, int] | None:
    return (size["height"], size["width"]) if {"height", "width"} <= size.keys() else None


def _noise(height: int, width: int) -> torch.Tensor:
    """Soft noise, uint8 `[3, height, width]`, always the same."""
    import torch

    own = torch.Generator().manual_seed(height)
    coarse = torch.rand(1, 3, height // 4, width // 4, generator=own) * 255
    fine = torch.nn.functional.interpolate(coarse, (height, width), mode="bilinear")
    return fine[0].round().to(torch.uint8)


def _agree(preprocess: Preprocess, image: torch.Tensor, wanted: torch.Tensor) -> bool:
    """Whether the settings make the same of an image, two grey levels apart at most."""
    import torch
    from torchvision.transforms import InterpolationMode, functional

    values = image
    if preprocess.resize is not None:
        size = [preprocess.resize] if isinstance(preprocess.resize, int) else list(preprocess.resize)
        values = functional.resize(values, size, InterpolationMode(preprocess.interpolation), antialias=True)
    if preprocess.crop is not None:
        crop = (preprocess.crop,) * 2 if isinstance(preprocess.crop, int) else preprocess.crop
        # Not center_crop: an odd rest is cut here as transformers cuts it.
        top, left = ((have - keep) // 2 for have, keep in zip(values.shape[-2:], crop, strict=True))
        if top < 0 or left < 0:
            values = functional.center_crop(values, list(crop))
        else:
            values = values[:, top : top + crop[0], left : left + crop[1]]
    if values.shape != wanted.shape:
        return False
    step = 1.0 / 255 if preprocess.scale == "unit" else 1.0
    made = values.flip(0).float() if preprocess.channels == "bgr" else values.float()
    made = made * step
    if preprocess.mean is not None and preprocess.std is not None:
        made = functional.normalize(made, list(preprocess.mean), list(preprocess.std))
        step /= min(preprocess.std)
    return bool((made - torch.as_tensor(wanted)).abs().max() <= 2.01 * step)
