"""The nouns: frozen data that the rooms hand to each other. No behaviour beyond reading and writing themselves."""

from __future__ import annotations

from dataclasses import dataclass

from batchjob.preprocessing.resize import CropBox
from batchjob.preprocessing.settings import Preprocess
from batchjob.types import ImageInfo

__all__ = ["ImageGeometry", "compute_image_geometry"]


@dataclass(frozen=True, slots=True)
class ImageGeometry:
    """Where the model's input lies in its image: `x` of the image is `(x of the input + left) / scale_x`.

    Attributes:
        width: of the image as it stands upright, in pixels; `height` likewise.
        input_width: of what the model gets, padding left out; `input_height` likewise.
        scale_x: input pixels for one of the image; `scale_y` likewise.
        left: input pixels that the crop cut off, negative where it padded; `top` likewise.
        pad_right: input pixels that `preprocess.pad` put on the right; `pad_below` likewise.
    """

    width: int
    height: int
    input_width: int
    input_height: int
    scale_x: float = 1.0
    scale_y: float = 1.0
    left: float = 0.0
    top: float = 0.0
    pad_right: int = 0
    pad_below: int = 0


def _fixed_size(preprocess: Preprocess) -> tuple[int, int] | None:
    if preprocess.transform is not None:
        return None
    size = preprocess.crop
    if size is None:
        size = preprocess.resize if isinstance(preprocess.resize, tuple) else None
    if size is None:
        return None
    height, width = (size, size) if isinstance(size, int) else size
    multiple = preprocess.pad or 1
    return height + -height % multiple, width + -width % multiple


def _box(size: tuple[int, int], crop: tuple[int, int] | None) -> CropBox:
    """What the centre crop leaves; everything where it must pad."""
    if crop is None or crop[0] > size[0] or crop[1] > size[1]:
        return 0, 0, *size
    return int(_cut(size[0], crop[0])), int(_cut(size[1], crop[1])), *crop


def compute_image_geometry(preprocess: Preprocess, info: ImageInfo) -> ImageGeometry:
    """Where the model's input lies in an image that was prepared so. A user's own transform is not seen through.

    Args:
        preprocess: merged, as `Geometry` got it.
        facts: of a good image, so with width and height.
    """
    width, height = info.width or 1, info.height or 1
    if info.axes_swapped:
        width, height = height, width
    if preprocess.transform is not None:
        return ImageGeometry(width, height, width, height)
    wide, high = _resized_size(preprocess.resize, width, height)
    scale_x, scale_y = wide / width, high / height
    left = top = 0.0
    if preprocess.crop is not None:
        crop_high, crop_wide = (preprocess.crop,) * 2 if isinstance(preprocess.crop, int) else preprocess.crop
        left, top = _cut(wide, crop_wide), _cut(high, crop_high)
        wide, high = crop_wide, crop_high
    multiple = preprocess.pad or 1
    return ImageGeometry(width, height, wide, high, scale_x, scale_y, left, top, -wide % multiple, -high % multiple)


def _resized_size(resize: int | tuple[int, int] | None, width: int, height: int) -> tuple[int, int]:
    """Width and height after the resize, as torchvision computes them."""
    if resize is None:
        return width, height
    if not isinstance(resize, int):
        return resize[1], resize[0]
    short, long = min(width, height), max(width, height)
    longer = int(resize * long / short)
    return (resize, longer) if width <= height else (longer, resize)


def _cut(size: int, crop: int) -> float:
    """What torchvision's centre crop cuts off on the left or above; where the image is smaller it pads."""
    return -float((crop - size) // 2) if crop > size else float(round((size - crop) / 2.0))
