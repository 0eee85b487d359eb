"""Convert an image processor of transformers to preprocessing settings, and verify the result on test images."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any, Literal

from batchjob.preprocessing.settings import Preprocess

if TYPE_CHECKING:
    import torch

__all__ = ["convert_image_processor"]

_log = logging.getLogger(__name__)
# PIL.Image.Resampling, the numbers in which image processors state interpolation.
_INTERPOLATIONS: dict[int, Literal["nearest", "bilinear", "bicubic"]] = {0: "nearest", 2: "bilinear", 3: "bicubic"}
# Height and width of the test images. The last is so long that a limit on the longer side would show.
_TEST_SIZES = [(60, 90), (130, 72), (40, 260)]


def convert_image_processor(processor: Any, where: str) -> Preprocess | None:
    """Convert an image processor to settings that do the same.

    The configuration of a processor does not state all that it does: ConvNeXT, for example, crops to a fraction of the
    size. Settings are therefore accepted only if they turn three images of noise into the processor's output.

    Two differences may remain: one grey level in a resized pixel, and one pixel in the position of a centre crop. Where
    the margin is odd, transformers rounds down and torchvision rounds half to even.

    Args:
        processor: Object returned by `AutoImageProcessor.from_pretrained`.
        where: Job key and model, for the log.

    Returns:
        The settings; None, after a warning in the log, if no settings do the same.
    """
    images = [_make_noise(height, width) for height, width in _TEST_SIZES]
    try:
        outputs = [processor(images=[image.numpy()], return_tensors="pt")["pixel_values"][0] for image in images]
    except Exception as error:  # noqa: BLE001 - a processor of something other than single images
        _log.warning("%s: its image processor does not take single images (%s)", where, error)
        return None
    for preprocess in _list_candidates(processor):
        if all(_matches(preprocess, image, output) for image, output in zip(images, outputs, strict=True)):
            return preprocess
    _log.warning(
        "%s: 'preprocess' has no words for what its %s does (size %s)",
        where,
        type(processor).__name__,
        getattr(processor, "size", None),
    )
    return None


def _list_candidates(processor: Any) -> Iterator[Preprocess]:
    """Yield settings that the processor may stand for, first those that its configuration states literally."""
    values = _convert_values(processor)
    if values is None:
        return
    size = _parse_size(getattr(processor, "size", None)) if getattr(processor, "do_resize", None) else {}
    crop = _get_height_width(_parse_size(getattr(processor, "crop_size", None)))
    if not getattr(processor, "do_center_crop", None):
        crop = None
    height_width, shorter_side = _get_height_width(size), size.get("shortest_edge")
    crop_fraction = getattr(processor, "crop_pct", None) or 1
    steps: list[tuple[Any, Any]] = [(height_width if height_width is not None else shorter_side, crop)]
    if shorter_side:
        steps += [
            (int(shorter_side / crop_fraction), shorter_side),  # ConvNeXT, below 384
            ((shorter_side, shorter_side), None),  # ConvNeXT, from 384 on
            (int(shorter_side / crop_fraction), crop),  # PoolFormer
            (int(shorter_side * 256 / 224), crop),  # LeViT
        ]
    for resize, centre_crop in steps:
        yield values.model_copy(update={"resize": resize, "crop": centre_crop})


def _convert_values(processor: Any) -> Preprocess | None:
    """Convert interpolation, scale, mean and standard deviation; None if settings cannot express them."""
    resample = getattr(processor, "resample", None)
    interpolation = _INTERPOLATIONS.get(int(resample)) if resample is not None else "bilinear"
    if interpolation is None:
        return None
    factor = float(processor.rescale_factor) if getattr(processor, "do_rescale", None) else 1.0
    scale: Literal["unit", "none"] = "unit" if abs(factor * 255 - 1) < 1e-6 else "none"
    mean: tuple[float, ...] | None = None
    std: tuple[float, ...] | None = None
    if getattr(processor, "do_normalize", None):
        mean, std = _convert_moments(processor.image_mean), _convert_moments(processor.image_std)
    elif scale == "none" and factor != 1:
        mean, std = (0.0,) * 3, (1.0,) * 3
    if scale == "none" and mean and std:
        # Another factor than 1/255 goes into mean and std: (x · factor - mean) / std = (x - mean / factor) / (std /
        # factor). Example: factor 1/127.5, mean 1, std 1 → mean 127.5, std 127.5.
        mean, std = tuple(value / factor for value in mean), tuple(value / factor for value in std)
    channels: Literal["rgb", "bgr"] = "bgr" if getattr(processor, "do_flip_channel_order", None) else "rgb"
    return Preprocess(
        resize=None, crop=None, interpolation=interpolation, mean=mean, std=std, channels=channels, scale=scale
    )


def _convert_moments(values: Any) -> tuple[float, ...]:
    return tuple(map(float, values)) if isinstance(values, list | tuple) else (float(values),) * 3


def _parse_size(size: Any) -> dict[str, int]:
    if isinstance(size, int):
        return {"height": size, "width": size}
    keys = ("height", "width", "shortest_edge")
    values = {key: size.get(key) if isinstance(size, dict) else getattr(size, key, None) for key in keys}
    return {key: value for key, value in values.items() if isinstance(value, int)}


def _get_height_width(size: dict[str, int]) -> tuple[int, int] | None:
    return (size["height"], size["width"]) if {"height", "width"} <= size.keys() else None


def _make_noise(height: int, width: int) -> torch.Tensor:
    """Make a smooth uint8 image `[3, height, width]`, the same on every call."""
    import torch

    generator = torch.Generator().manual_seed(height)
    coarse = torch.rand(1, 3, height // 4, width // 4, generator=generator) * 255
    fine = torch.nn.functional.interpolate(coarse, (height, width), mode="bilinear")
    return fine[0].round().to(torch.uint8)


def _matches(preprocess: Preprocess, image: torch.Tensor, expected: torch.Tensor) -> bool:
    """Compare the settings' output for an image with the processor's; they may differ by two grey levels."""
    import torch
    from torchvision.transforms import InterpolationMode, functional

    pixels = image
    if preprocess.resize is not None:
        size = [preprocess.resize] if isinstance(preprocess.resize, int) else list(preprocess.resize)
        pixels = functional.resize(pixels, size, InterpolationMode(preprocess.interpolation), antialias=True)
    if preprocess.crop is not None:
        crop = (preprocess.crop,) * 2 if isinstance(preprocess.crop, int) else preprocess.crop
        # Not center_crop: with an odd margin this crops where transformers does.
        top, left = ((before - after) // 2 for before, after in zip(pixels.shape[-2:], crop, strict=True))
        if top < 0 or left < 0:
            pixels = functional.center_crop(pixels, list(crop))
        else:
            pixels = pixels[:, top : top + crop[0], left : left + crop[1]]
    if pixels.shape != expected.shape:
        return False
    grey_level = 1.0 / 255 if preprocess.scale == "unit" else 1.0
    values = pixels.flip(0).float() if preprocess.channels == "bgr" else pixels.float()
    values = values * grey_level
    if preprocess.mean is not None and preprocess.std is not None:
        values = functional.normalize(values, list(preprocess.mean), list(preprocess.std))
        grey_level /= min(preprocess.std)
    return bool((values - torch.as_tensor(expected)).abs().max() <= 2.01 * grey_level)
