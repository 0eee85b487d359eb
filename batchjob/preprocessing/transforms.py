"""First half of the preprocessing, on the host: decode, resize and crop in uint8, or the user's own transform."""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch.nn.functional import pad

from batchjob.errors import ImageError
from batchjob.preprocessing.decode import DecodedImage, decode
from batchjob.preprocessing.geometry import (
    CropBox,
    center_crop_box,
    compute_output_size,
    compute_resized_size,
    to_pair,
)
from batchjob.preprocessing.resize import Interpolation, resize_and_crop, resize_and_crop_uint8
from batchjob.preprocessing.settings import DecodeSettings, Preprocess
from batchjob.preprocessing.user_transform import TransformInput, UserTransform
from batchjob.types import PreparedImage

__all__ = ["ImageTransform", "ResizeCrop"]

# A resize by the shorter side turns a 1x5000 sliver into 256x1280000 pixels. Such an image is refused before that.
MAX_RESIZED_PIXELS = 32 * 1024 * 1024

_ResizeFn = Callable[[torch.Tensor, tuple[int, int], CropBox, Interpolation], torch.Tensor]


@dataclass(frozen=True)
class ImageTransform:
    """Encoded image to tensor: the work of a loader process on each image. Picklable.

    Attributes:
        settings: Limits of the decoder, and the exactness of its pixels.
        resize_crop: Resize and crop, or the job's own transform.
        gray: Decode to one channel in place of three.
        apply_exif: Turn the image upright, following its EXIF orientation.
    """

    settings: DecodeSettings
    resize_crop: ResizeCrop
    gray: bool
    apply_exif: bool

    def __call__(self, data: bytes) -> PreparedImage:
        """Decode and transform one encoded image. Raises ImageError."""
        decoded = self.decode(data)
        return PreparedImage(self.transform(decoded), decoded.width, decoded.height, decoded.axes_swapped)

    def with_transform_input(self, image_kind: TransformInput) -> ImageTransform:
        """Return the same transform, with the user's own for another kind of image."""
        return replace(self, resize_crop=self.resize_crop.with_transform_input(image_kind))

    def decode(self, data: bytes) -> DecodedImage:
        """Decode one image to the pixels that `transform` takes. Raises ImageError."""
        return decode(data, self.settings, "gray" if self.gray else "rgb", self.apply_exif, self.resize_crop.min_size)

    def transform(self, decoded: DecodedImage) -> torch.Tensor:
        """Resize and crop a decoded image to the tensor that goes into the batch. Raises ImageError."""
        if self.settings.mode == "exact":
            return self.resize_crop(decoded.pixels)
        return self.resize_crop.resize_fast(decoded.pixels, decoded.upright_size, decoded.scale_denominator)


class ResizeCrop:
    """Resize and centre crop with the bits of torchvision's presets on uint8 tensors; or the user's own transform.

    Picklable: loader processes get it and load a user's transform again there.

    Args:
        preprocess: Merged settings.
        folder: Folder of the job file, in which `preprocess.transform` is looked up; the working directory if None.
        function: The user's transform, where the model brings it; None loads the one that `preprocess` names.

    Attributes:
        size: Height and width of every result; None where they depend on the image.
        user_transform: The user's own transform; None if there is none.

    Raises:
        InvalidJob: `preprocess.transform` cannot be loaded.
    """

    def __init__(
        self, preprocess: Preprocess, folder: Path | None = None, function: Callable[[Any], Any] | None = None
    ) -> None:
        self._preprocess = preprocess
        self.size = compute_output_size(preprocess)
        self.user_transform: UserTransform | None = None
        if preprocess.transform is not None:
            image_kind = None if preprocess.transform_input == "auto" else preprocess.transform_input
            self.user_transform = UserTransform(preprocess.transform, folder or Path(), image_kind, function)

    @property
    def min_size(self) -> int | tuple[int, int] | None:
        """Pixels of the image that the resize needs: shorter side, or height and width; None if it needs all."""
        if self.user_transform is not None or self._preprocess.interpolation == "nearest":
            return None
        return self._preprocess.resize

    def __call__(self, pixels: np.ndarray) -> torch.Tensor:
        """Resize and crop one image.

        Args:
            pixels: uint8 `[h, w, c]`.

        Returns:
            uint8 `[c, h, w]`; or the result of the user's transform.

        Raises:
            ImageError: Stage `transform`: the user's transform failed, or the image is too narrow to resize.
        """
        return self._apply(pixels, resize_and_crop, pixels.shape[:2])

    def resize_fast(self, pixels: np.ndarray, upright_size: tuple[int, int], scale_denominator: int) -> torch.Tensor:
        """Resize and crop one image in integers; from the same pixels at most one level of 255 away from `__call__`.

        Args:
            pixels: uint8 `[h, w, c]`, maybe decoded at a reduced size.
            upright_size: Height and width of the full-size image.
            scale_denominator: Factor by which the decoder reduced the image: 1, 2, 4 or 8.

        Raises:
            ImageError: See `__call__`.
        """
        resize = partial(resize_and_crop_uint8, scale_denominator=scale_denominator, full_size=upright_size)
        return self._apply(pixels, resize, upright_size)

    def with_transform_input(self, image_kind: TransformInput) -> ResizeCrop:
        """Return the same steps, with the user's transform for another kind of image."""
        result = copy.copy(self)
        if self.user_transform is not None:
            result.user_transform = self.user_transform.with_input(image_kind)
        return result

    def _apply(self, pixels: np.ndarray, resize: _ResizeFn, upright_size: tuple[int, ...]) -> torch.Tensor:
        image = torch.from_numpy(pixels).permute(2, 0, 1)
        if self.user_transform is not None:
            return self.user_transform(image)
        height, width = upright_size
        image = _resize_center_crop(image, (height, width), self._preprocess, resize)
        return image if self._preprocess.pad is None else _pad_to_multiple(image, self._preprocess.pad)


def _resize_center_crop(
    image: torch.Tensor, upright_size: tuple[int, int], preprocess: Preprocess, resize: _ResizeFn
) -> torch.Tensor:
    """Resize and centre crop one image `[c, h, w]` with the given resize function."""
    height, width = upright_size
    _refuse_sliver(preprocess.resize, width, height)
    size = compute_resized_size(preprocess.resize, height, width)
    crop = None if preprocess.crop is None else to_pair(preprocess.crop)
    box = center_crop_box(size, crop)
    if preprocess.interpolation == "nearest":
        image = _resize_nearest(image, size)[:, box[0] : box[0] + box[2], box[1] : box[1] + box[3]]
    else:
        image = resize(image, size, box, preprocess.interpolation)
    return image if crop is None or tuple(image.shape[1:]) == crop else _pad_to_crop(image, crop)


def _refuse_sliver(resize: int | tuple[int, int] | None, width: int, height: int) -> None:
    if isinstance(resize, int):
        pixels = resize * resize * max(height, width) // min(height, width)
        if pixels > MAX_RESIZED_PIXELS:
            message = f"{width}x{height} is too narrow: with a shorter side of {resize} it would have {pixels:,} pixels"
            raise ImageError("transform", "too_large", message)


# torchvision takes seconds to import. Most jobs need none of it, so the two functions below import it when called.


def _resize_nearest(image: torch.Tensor, size: tuple[int, int]) -> torch.Tensor:
    from torchvision.transforms import InterpolationMode, functional

    return functional.resize(image, list(size), interpolation=InterpolationMode.NEAREST)  # type: ignore[no-any-return]


def _pad_to_crop(image: torch.Tensor, crop: tuple[int, int]) -> torch.Tensor:
    """Put an image that is smaller than the crop into the middle of black."""
    from torchvision.transforms import functional

    return functional.center_crop(image, list(crop))  # type: ignore[no-any-return]


def _pad_to_multiple(image: torch.Tensor, multiple: int) -> torch.Tensor:
    """Add black on the right and at the bottom, up to the next multiple of so many pixels."""
    height, width = image.shape[-2:]
    return pad(image, (0, -width % multiple, 0, -height % multiple))
