"""Decoded pixels to what the model gets: geometry on the host on uint8, float and normalisation on the device."""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from batchjob.errors import ImageError, InvalidJob
from batchjob.preprocessing.decode import DecodedImage, decode
from batchjob.preprocessing.geometry import _box, _fixed_size, _resized_size
from batchjob.preprocessing.resize import CropBox, Interpolation, resize_and_crop, resize_and_crop_uint8
from batchjob.preprocessing.settings import DecodeSettings, Preprocess
from batchjob.types import PreparedImage
from batchjob.user_code import load_target

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    import numpy as np
    import torch

    Resample = Callable[[torch.Tensor, tuple[int, int], CropBox, Interpolation], torch.Tensor]

__all__ = ["ImageTransform", "ResizeCrop"]

# A resize by the shorter side makes a 1x5000 sliver 256x1280000: such an image is refused, not tried.
MAX_RESIZED_PIXELS = 32 * 1024 * 1024


class ResizeCrop:
    """Resize and centre crop as torchvision's presets do them on uint8 tensors, bit for bit; or the user's transform.

    Picklable: loader processes get it, a user's transform is looked up again there.

    Args:
        preprocess: what to do.
        base: folder of the job file, where `preprocess.transform` is looked up.

    Attributes:
        size: `(height, width)` that every image comes out in, or None where the images decide.

    Raises:
        InvalidJob: `preprocess.transform` cannot be loaded.
    """

    def __init__(self, preprocess: Preprocess, folder: Path | None = None) -> None:
        self._preprocess, self._base = preprocess, folder or Path()
        self.size = _fixed_size(preprocess)
        self._transform = self._load()

    @property
    def min_size(self) -> int | tuple[int, int] | None:
        """Pixels that it needs of an image (shorter side, or height and width); None where it needs them all."""
        if self._transform is not None or self._preprocess.interpolation == "nearest":
            return None
        return self._preprocess.resize

    def __call__(self, pixels: np.ndarray) -> torch.Tensor:
        """One image, uint8 `[h, w, c]` to uint8 `[c, h, w]`, or to whatever the user's transform makes of `[3, h, w]`.

        Raises:
            ImageFault: stage `transform`: the user's function failed, or the image is too narrow to resize.
        """
        return self._made(pixels, resize_and_crop, pixels.shape[:2])

    def resize_fast(self, pixels: np.ndarray, upright_size: tuple[int, int], scale_denominator: int) -> torch.Tensor:
        """The same, but that a level of 255 may be between this and torchvision's.

        Args:
            pixels: the image.
            upright: its height and width before it was decoded smaller.
            shrunk: how many times smaller.

        Raises:
            ImageFault: likewise.
        """
        return self._made(
            pixels,
            partial(resize_and_crop_uint8, scale_denominator=scale_denominator, full_size=upright_size),
            upright_size,
        )

    def resize_on_device(self, images: Sequence[torch.Tensor]) -> torch.Tensor:
        """The same for images that a device has decoded, computed there: as `fast` in what it promises.

        Args:
            images: uint8 `[c, h, w]` each; as many as can be float at once.

        Returns:
            uint8 `[n, c, height, width]`, of `size`.
        """
        import torch

        upright = [(int(image.shape[1]), int(image.shape[2])) for image in images]
        made = [_placed(*one, self._preprocess, _resized) for one in zip(images, upright, strict=True)]
        return torch.stack(made).clamp_(0, 255).round_().to(torch.uint8)

    def resized_pixels(self, upright_size: tuple[int, int]) -> int:
        """How many there would be between resize and crop, of an image of that height and width."""
        wide, high = _resized_size(self._preprocess.resize, upright_size[1], upright_size[0])
        return wide * high

    def _made(self, pixels: np.ndarray, resize: Resample, upright: tuple[int, ...]) -> torch.Tensor:
        import torch

        image = torch.from_numpy(pixels).permute(2, 0, 1)
        if self._transform is not None:
            return _transformed(self._transform, image)
        height, width = upright
        return _padded(_placed(image, (height, width), self._preprocess, resize), self._preprocess.pad)

    def __getstate__(self) -> tuple[Preprocess, Path]:
        return self._preprocess, self._base

    def __setstate__(self, state: tuple[Preprocess, Path]) -> None:
        self.__init__(*state)  # type: ignore[misc]

    def _load(self) -> Callable[[torch.Tensor], Any] | None:
        target = self._preprocess.transform
        if target is None:
            return None
        transform = load_target(target, self._base)
        if not callable(transform):
            raise InvalidJob(
                f"preprocess.transform: {target} is a {type(transform).__name__}; name a function that takes a uint8 "
                "tensor [3, height, width] and returns what the model gets"
            )
        return transform  # type: ignore[no-any-return]


def _placed(image: torch.Tensor, upright: tuple[int, int], preprocess: Preprocess, resize: Resample) -> torch.Tensor:
    """Resized and cropped. Torchvision takes seconds to import: what most jobs do is done without it."""
    height, width = upright
    _refuse_sliver(preprocess.resize, width, height)
    wide, high = _resized_size(preprocess.resize, width, height)
    crop = (preprocess.crop,) * 2 if isinstance(preprocess.crop, int) else preprocess.crop
    box = _box((high, wide), crop)
    if preprocess.interpolation == "nearest":
        image = _nearest(image, high, wide)[:, box[0] : box[0] + box[2], box[1] : box[1] + box[3]]
    else:
        image = resize(image, (high, wide), box, preprocess.interpolation)
    return image if crop is None or tuple(image.shape[1:]) == crop else _centred(image, crop)


def _resized(image: torch.Tensor, size: tuple[int, int], box: CropBox, by: Interpolation) -> torch.Tensor:
    """`resample` in a few large steps, as a GPU wants them, and left in float."""
    from torch.nn.functional import interpolate

    top, left, high, wide = box
    values = image[None].float()
    if tuple(values.shape[2:]) != size:
        values = interpolate(values, size=size, mode=by, align_corners=False, antialias=True)
    return values[0, :, top : top + high, left : left + wide]


def _nearest(image: torch.Tensor, high: int, wide: int) -> torch.Tensor:
    from torchvision.transforms import InterpolationMode, functional

    return functional.resize(image, [high, wide], interpolation=InterpolationMode.NEAREST)  # type: ignore[no-any-return]


def _centred(image: torch.Tensor, crop: tuple[int, int]) -> torch.Tensor:
    """A smaller image in the middle of black."""
    from torchvision.transforms import functional

    return functional.center_crop(image, list(crop))  # type: ignore[no-any-return]


def _refuse_sliver(resize: int | tuple[int, int] | None, width: int, height: int) -> None:
    if isinstance(resize, int):
        grown = resize * resize * max(height, width) // min(height, width)
        if grown > MAX_RESIZED_PIXELS:
            message = f"{width}x{height} is too narrow: with a shorter side of {resize} it would have {grown:,} pixels"
            raise ImageError("transform", "too_large", message)


def _padded(image: torch.Tensor, multiple: int | None) -> torch.Tensor:
    if multiple is None:
        return image
    from torch.nn.functional import pad

    height, width = image.shape[-2:]
    return pad(image, (0, -width % multiple, 0, -height % multiple))


def _transformed(transform: Callable[[torch.Tensor], Any], image: torch.Tensor) -> torch.Tensor:
    import torch

    try:
        made = transform(image)
    except MemoryError:
        raise ImageError("transform", "memory", "there was not enough memory to transform it") from None
    except Exception as error:  # noqa: BLE001 - the user's function failed on this image: its row says so
        raise ImageError("transform", type(error).__name__, str(error) or type(error).__name__) from None
    if not isinstance(made, torch.Tensor):
        raise ImageError("transform", "type", f"preprocess.transform returned a {type(made).__name__}, not a tensor")
    if made.dtype == torch.uint8:
        return made.detach()
    if not made.is_floating_point():
        raise ImageError("transform", "type", f"preprocess.transform returned {made.dtype}, neither uint8 nor float")
    return made.detach().float()


@dataclass(frozen=True)
class ImageTransform:
    """What a loader process does to each image.

    Attributes:
        settings: limits of the decoder, and how exact it must be.
        geometry: resize and crop, or the job's own transform.
        gray: decode to one channel in place of three.
        turn: apply the EXIF orientation.
    """

    settings: DecodeSettings
    resize_crop: ResizeCrop
    gray: bool
    apply_exif: bool

    def __call__(self, data: bytes) -> PreparedImage:
        """One encoded image. Raises ImageFault."""
        decoded = self.decode(data)
        return PreparedImage(self.transform(decoded), decoded.width, decoded.height, decoded.axes_swapped)

    def decode(self, data: bytes) -> DecodedImage:
        """The first half: pixels as the geometry takes them. Raises ImageFault."""
        return decode(data, self.settings, "gray" if self.gray else "rgb", self.apply_exif, self.resize_crop.min_size)

    def transform(self, decoded: DecodedImage) -> torch.Tensor:
        """The second half: what goes into the batch. Raises ImageFault."""
        if self.settings.mode == "exact":
            return self.resize_crop(decoded.pixels)
        return self.resize_crop.resize_fast(decoded.pixels, decoded.upright_size, decoded.scale_denominator)
