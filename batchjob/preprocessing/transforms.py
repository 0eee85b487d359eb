"""First half of the preprocessing, on the host: decode, resize and crop in uint8, or the user's own transform."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch.nn.functional import interpolate, pad

from batchjob.errors import ImageError, InvalidJob
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
from batchjob.types import PreparedImage
from batchjob.user_code import load_target

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

    Attributes:
        size: Height and width of every result; None where they depend on the image.

    Raises:
        InvalidJob: `preprocess.transform` cannot be loaded.
    """

    def __init__(self, preprocess: Preprocess, folder: Path | None = None) -> None:
        self._preprocess, self._folder = preprocess, folder or Path()
        self.size = compute_output_size(preprocess)
        self._user_transform = self._load_user_transform()

    @property
    def min_size(self) -> int | tuple[int, int] | None:
        """Pixels of the image that the resize needs: shorter side, or height and width; None if it needs all."""
        if self._user_transform is not None or self._preprocess.interpolation == "nearest":
            return None
        return self._preprocess.resize

    def __call__(self, pixels: np.ndarray) -> torch.Tensor:
        """Resize and crop one image.

        Args:
            pixels: uint8 `[h, w, c]`.

        Returns:
            uint8 `[c, h, w]`; or the result of the user's transform, which gets uint8 `[3, h, w]`.

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

    def __getstate__(self) -> tuple[Preprocess, Path]:
        return self._preprocess, self._folder

    def __setstate__(self, state: tuple[Preprocess, Path]) -> None:
        self.__init__(*state)  # type: ignore[misc]

    def _apply(self, pixels: np.ndarray, resize: _ResizeFn, upright_size: tuple[int, ...]) -> torch.Tensor:
        image = torch.from_numpy(pixels).permute(2, 0, 1)
        if self._user_transform is not None:
            return _call_user_transform(self._user_transform, image)
        height, width = upright_size
        image = _resize_center_crop(image, (height, width), self._preprocess, resize)
        return image if self._preprocess.pad is None else _pad_to_multiple(image, self._preprocess.pad)

    def _load_user_transform(self) -> Callable[[torch.Tensor], Any] | None:
        target = self._preprocess.transform
        if target is None:
            return None
        transform = load_target(target, self._folder)
        if not callable(transform):
            raise InvalidJob(
                f"preprocess.transform: {target} is a {type(transform).__name__}; name a function that takes a uint8 "
                "tensor [3, height, width] and returns what the model gets"
            )
        return transform  # type: ignore[no-any-return]


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


def _resize_in_float(
    image: torch.Tensor, size: tuple[int, int], box: CropBox, interpolation: Interpolation
) -> torch.Tensor:
    """Resize in a few large steps, which suits a GPU, and leave the result in float32."""
    top, left, height, width = box
    values = image[None].float()
    if tuple(values.shape[2:]) != size:
        values = interpolate(values, size=size, mode=interpolation, align_corners=False, antialias=True)
    return values[0, :, top : top + height, left : left + width]


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


def _call_user_transform(transform: Callable[[torch.Tensor], Any], image: torch.Tensor) -> torch.Tensor:
    try:
        result = transform(image)
    except MemoryError:
        raise ImageError("transform", "memory", "there was not enough memory to transform it") from None
    except Exception as error:  # noqa: BLE001 - the user's function failed on this image, which becomes an error row
        raise ImageError("transform", type(error).__name__, str(error) or type(error).__name__) from None
    if not isinstance(result, torch.Tensor):
        raise ImageError("transform", "type", f"preprocess.transform returned a {type(result).__name__}, not a tensor")
    if result.dtype == torch.uint8:
        return result.detach()
    if not result.is_floating_point():
        raise ImageError("transform", "type", f"preprocess.transform returned {result.dtype}, neither uint8 nor float")
    return result.detach().float()
