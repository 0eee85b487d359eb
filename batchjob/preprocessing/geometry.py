"""Sizes after resize, centre crop and padding, computed as torchvision does, and the map from model input to image.

This file imports no torch: tasks and output read it to place boxes and masks in the original image.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from batchjob.preprocessing.settings import Preprocess
from batchjob.types import ImageInfo

__all__ = [
    "CropBox",
    "ImageGeometry",
    "center_crop_box",
    "compute_image_geometry",
    "compute_output_size",
    "compute_resized_size",
    "to_pair",
]

CropBox = tuple[int, int, int, int]
"""Top, left, height and width, in pixels."""


@dataclass(frozen=True, slots=True)
class ImageGeometry:
    """Place of the model's input in its image: `x` of the image is `(x of the input + left) / scale_x`.

    Example: a 500x375 photograph (width x height), resized to 341x256 and cropped to 224x224, has `scale_x` 341 / 500
    and `left` 58. Column 10 of the input is column (10 + 58) / 0.682 = 99.7 of the photograph.

    Attributes:
        width: Width of the upright image, in pixels.
        height: Height of the upright image, in pixels.
        input_width: Width of the model's input without padding, in pixels.
        input_height: Height of the model's input without padding, in pixels.
        scale_x: Input pixels for each pixel of the image, horizontally.
        scale_y: Input pixels for each pixel of the image, vertically.
        left: Input pixels that the crop removed on the left; negative where it padded.
        top: Input pixels that the crop removed at the top; negative where it padded.
        pad_right: Input pixels that `preprocess.pad` added on the right.
        pad_below: Input pixels that `preprocess.pad` added at the bottom.
        uri: Location of the image, as its row has it; set for the user's own task only, like the next one.
        passthrough: Values of the passthrough columns by name.
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
    uri: str = ""
    passthrough: Mapping[str, Any] = field(default_factory=dict, hash=False)


def compute_image_geometry(preprocess: Preprocess, info: ImageInfo) -> ImageGeometry:
    """Compute the place of the model's input in an image prepared with these settings.

    A user's own transform is opaque: its input then counts as the whole image, unscaled.

    Args:
        preprocess: Merged settings, the ones that `ResizeCrop` got.
        info: Info of a good image, which has a width and a height.
    """
    width, height = info.width or 1, info.height or 1
    if info.axes_swapped:
        width, height = height, width
    if preprocess.transform is not None:
        return ImageGeometry(width, height, width, height)
    input_height, input_width = compute_resized_size(preprocess.resize, height, width)
    scale_x, scale_y = input_width / width, input_height / height
    left = top = 0.0
    if preprocess.crop is not None:
        crop_height, crop_width = to_pair(preprocess.crop)
        left, top = _crop_offset(input_width, crop_width), _crop_offset(input_height, crop_height)
        input_width, input_height = crop_width, crop_height
    multiple = preprocess.pad or 1
    return ImageGeometry(
        width,
        height,
        input_width,
        input_height,
        scale_x,
        scale_y,
        left,
        top,
        pad_right=-input_width % multiple,
        pad_below=-input_height % multiple,
    )


def compute_output_size(preprocess: Preprocess) -> tuple[int, int] | None:
    """Compute the height and width that every image gets; None where they depend on the image."""
    if preprocess.transform is not None:
        return None
    size = preprocess.crop
    if size is None:
        size = preprocess.resize if isinstance(preprocess.resize, tuple) else None
    if size is None:
        return None
    height, width = to_pair(size)
    multiple = preprocess.pad or 1
    return height + -height % multiple, width + -width % multiple


def compute_resized_size(resize: int | tuple[int, int] | None, height: int, width: int) -> tuple[int, int]:
    """Compute height and width after the resize, rounded as torchvision rounds them.

    Example: `resize=256` makes 375x500 (height x width) 256x341, because int(256 * 500 / 375) is 341.
    """
    if resize is None:
        return height, width
    if not isinstance(resize, int):
        return resize
    longer = int(resize * max(height, width) / min(height, width))
    return (longer, resize) if width <= height else (resize, longer)


def center_crop_box(size: tuple[int, int], crop: tuple[int, int] | None) -> CropBox:
    """Compute the part of a resized image that the centre crop keeps; the whole image where the crop must pad.

    Example: a 224x224 crop of 256x341 keeps the box (16, 58, 224, 224).
    """
    if crop is None or crop[0] > size[0] or crop[1] > size[1]:
        return 0, 0, *size
    return int(_crop_offset(size[0], crop[0])), int(_crop_offset(size[1], crop[1])), *crop


def to_pair(size: int | tuple[int, int]) -> tuple[int, int]:
    """Expand the side of a square to height and width."""
    return (size, size) if isinstance(size, int) else size


def _crop_offset(size: int, crop: int) -> float:
    """Compute the pixels that torchvision's `center_crop` removes at the left or top; negative where it pads.

    Examples: a crop of 224 out of 341 removes round(58.5) = 58; a crop of 224 out of 101 pads (224 - 101) // 2 = 61.
    """
    return -float((crop - size) // 2) if crop > size else float(round((size - crop) / 2.0))
