"""Decoded pixels to what the model gets: geometry on the host on uint8, float and normalisation on the device."""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from batchjob.errors import ImageFault, InvalidJob
from batchjob.preprocess import Preprocess
from batchjob.records import Frame, ImageFacts
from batchjob.resample import Box, Filter, resample, resample_in_integers
from batchjob.targets import load_target

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    import numpy as np
    import torch

    Resample = Callable[[torch.Tensor, tuple[int, int], Box, Filter], torch.Tensor]

__all__ = ["Geometry", "Normalizer", "frame", "merge", "normalizer"]

# A resize by the shorter side makes a 1x5000 sliver 256x1280000: such an image is refused, not tried.
MAX_RESIZED = 32 * 1024 * 1024

_STEPS = ("resize", "crop", "mean", "std")
_BESIDE_TRANSFORM = {"transform", "exif", "sizes"}


class Geometry:
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

    def __init__(self, preprocess: Preprocess, base: Path | None = None) -> None:
        self._preprocess, self._base = preprocess, base or Path()
        self.size = _fixed_size(preprocess)
        self._transform = self._load()

    @property
    def least(self) -> int | tuple[int, int] | None:
        """Pixels that it needs of an image (shorter side, or height and width); None where it needs them all."""
        if self._transform is not None or self._preprocess.interpolation == "nearest":
            return None
        return self._preprocess.resize

    def __call__(self, pixels: np.ndarray) -> torch.Tensor:
        """One image, uint8 `[h, w, c]` to uint8 `[c, h, w]`, or to whatever the user's transform makes of `[3, h, w]`.

        Raises:
            ImageFault: stage `transform`: the user's function failed, or the image is too narrow to resize.
        """
        return self._made(pixels, resample, pixels.shape[:2])

    def fast(self, pixels: np.ndarray, upright: tuple[int, int], shrunk: int) -> torch.Tensor:
        """The same, but that a level of 255 may be between this and torchvision's.

        Args:
            pixels: the image.
            upright: its height and width before it was decoded smaller.
            shrunk: how many times smaller.

        Raises:
            ImageFault: likewise.
        """
        return self._made(pixels, partial(resample_in_integers, shrunk=shrunk, whole=upright), upright)

    def on_device(self, images: Sequence[torch.Tensor]) -> torch.Tensor:
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

    def resized_pixels(self, upright: tuple[int, int]) -> int:
        """How many there would be between resize and crop, of an image of that height and width."""
        wide, high = _resized_size(self._preprocess.resize, upright[1], upright[0])
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


def _resized(image: torch.Tensor, size: tuple[int, int], box: Box, by: Filter) -> torch.Tensor:
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
        if grown > MAX_RESIZED:
            message = f"{width}x{height} is too narrow: with a shorter side of {resize} it would have {grown:,} pixels"
            raise ImageFault("transform", "too_large", message)


def _box(size: tuple[int, int], crop: tuple[int, int] | None) -> Box:
    """What the centre crop leaves; everything where it must pad."""
    if crop is None or crop[0] > size[0] or crop[1] > size[1]:
        return 0, 0, *size
    return int(_cut(size[0], crop[0])), int(_cut(size[1], crop[1])), *crop


def _padded(image: torch.Tensor, multiple: int | None) -> torch.Tensor:
    if multiple is None:
        return image
    from torch.nn.functional import pad

    height, width = image.shape[-2:]
    return pad(image, (0, -width % multiple, 0, -height % multiple))


def frame(preprocess: Preprocess, facts: ImageFacts) -> Frame:
    """Where the model's input lies in an image that was prepared so. A user's own transform is not seen through.

    Args:
        preprocess: merged, as `Geometry` got it.
        facts: of a good image, so with width and height.
    """
    width, height = facts.width or 1, facts.height or 1
    if facts.turned:
        width, height = height, width
    if preprocess.transform is not None:
        return Frame(width, height, width, height)
    wide, high = _resized_size(preprocess.resize, width, height)
    scale_x, scale_y = wide / width, high / height
    left = top = 0.0
    if preprocess.crop is not None:
        crop_high, crop_wide = (preprocess.crop,) * 2 if isinstance(preprocess.crop, int) else preprocess.crop
        left, top = _cut(wide, crop_wide), _cut(high, crop_high)
        wide, high = crop_wide, crop_high
    multiple = preprocess.pad or 1
    return Frame(width, height, wide, high, scale_x, scale_y, left, top, -wide % multiple, -high % multiple)


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


def _transformed(transform: Callable[[torch.Tensor], Any], image: torch.Tensor) -> torch.Tensor:
    import torch

    try:
        made = transform(image)
    except MemoryError:
        raise ImageFault("transform", "memory", "there was not enough memory to transform it") from None
    except Exception as error:  # noqa: BLE001 - the user's function failed on this image: its row says so
        raise ImageFault("transform", type(error).__name__, str(error) or type(error).__name__) from None
    if not isinstance(made, torch.Tensor):
        raise ImageFault("transform", "type", f"preprocess.transform returned a {type(made).__name__}, not a tensor")
    if made.dtype == torch.uint8:
        return made.detach()
    if not made.is_floating_point():
        raise ImageFault("transform", "type", f"preprocess.transform returned {made.dtype}, neither uint8 nor float")
    return made.detach().float()


class Normalizer:
    """uint8 batch on the device to the model's float input: channel order, scale, mean and deviation.

    The operations are those of torchvision's presets, in their order, so the result is theirs.
    """

    def __init__(self, preprocess: Preprocess) -> None:
        self._preprocess = preprocess
        self._moments: dict[tuple[torch.device, torch.Size | None], tuple[torch.Tensor, torch.Tensor]] = {}

    def __call__(self, pixels: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
        """Normalise `[n, c, h, w]`; computed in float32, given in `dtype`. A user transform's output stays as it is."""
        import torch

        if self._preprocess.transform is not None:
            return pixels.to(dtype) if pixels.is_floating_point() else pixels
        if self._preprocess.channels == "bgr":
            pixels = pixels.flip(1)
        values = pixels.to(torch.float32, copy=True)
        if self._preprocess.scale == "unit":
            values = values.div_(255)
        if self._preprocess.mean is not None:
            mean, std = self._beside(values)
            values = values.sub_(mean).div_(std)
        return values.to(dtype)

    def _beside(self, values: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Mean and deviation, one a channel; one a value where a CPU would take three values of a pixel at a time."""
        import torch

        spread = values.device.type == "cpu" and not values.is_contiguous()
        key = values.device, values.shape[1:] if spread else None
        found = self._moments.get(key)
        if found is None:
            with torch.inference_mode(mode=False):  # made under inference mode they would taint other modes
                mean, std = (
                    torch.tensor(moment, dtype=torch.float32, device=values.device).view(-1, 1, 1)
                    for moment in (self._preprocess.mean, self._preprocess.std)
                )
                if spread:
                    mean, std = (_like(values, moment) for moment in (mean, std))
            self._moments = {key: (mean, std)}  # of the last size alone: there may be any number
            found = mean, std
        return found


def _like(values: torch.Tensor, moment: torch.Tensor) -> torch.Tensor:
    """A channel's number for each value of an image, `[1, c, h, w]`, in the layout of `values` (channels last)."""
    import torch

    return moment.expand(1, *values.shape[1:]).contiguous(memory_format=torch.channels_last)


def normalizer(preprocess: Preprocess) -> Normalizer:
    """The device's half of the preprocessing."""
    return Normalizer(preprocess)


def merge(job: Preprocess | None, own: Preprocess | None) -> Preprocess:
    """What a job says over what the weights bring: given keys override, absent ones keep the weights' own.

    Args:
        job: the job's `preprocess`, where only the fields that were set count.
        own: the preprocessing the weights were trained with, where it is known.

    Raises:
        InvalidJob: something needed is not given, or what is given does not fit together; names the keys.
    """
    given = {name: getattr(job, name) for name in job.model_fields_set} if job else {}
    kept = {name: getattr(own, name) for name in Preprocess.model_fields} if own else {}
    kept_whole = kept.get("transform") is not None and not given.keys() - _BESIDE_TRANSFORM
    if given.get("transform") is not None or kept_whole:
        return _merged_transform(given, kept)
    missing = [name for name in _STEPS if name not in given and (own is None or own.transform is not None)]
    if missing:
        raise InvalidJob(
            f"preprocess: the weights bring no preprocessing of their own; give {_listed(missing)} "
            "(null switches a step off), or transform: module:function"
        )
    merged = Preprocess(**{**kept, **given, "transform": None})
    _check_moments(merged)
    return merged


def _merged_transform(given: dict[str, Any], kept: dict[str, Any]) -> Preprocess:
    clash = sorted(given.keys() - _BESIDE_TRANSFORM)
    if clash:
        raise InvalidJob(
            f"preprocess: transform does all the steps itself; take {_listed(clash)} away, or take transform away"
        )
    merged = {**kept, **given}
    return Preprocess(**{name: merged[name] for name in _BESIDE_TRANSFORM if name in merged})


def _check_moments(merged: Preprocess) -> None:
    mean, std = merged.mean, merged.std
    if (mean is None) != (std is None):
        there, gone = ("mean", "std") if std is None else ("std", "mean")
        raise InvalidJob(f"preprocess: {there} is given and {gone} is null; give both, or null for both")
    channels = 1 if merged.channels == "gray" else 3
    for name, values in (("mean", mean), ("std", std)):
        if values is not None and len(values) != channels:
            raise InvalidJob(
                f"preprocess.{name}: has {len(values)} values, but channels: {merged.channels} needs {channels}"
            )
    if std is not None and not all(value > 0 for value in std):
        raise InvalidJob(f"preprocess.std: {list(std)} must be above 0 in every channel")
    if merged.pad is not None and merged.sizes == "one":
        raise InvalidJob("preprocess.pad: it makes groups of images of one size; write preprocess.sizes: group with it")
    for name in ("resize", "crop"):
        size = getattr(merged, name)
        if size is not None and min(size if isinstance(size, tuple) else (size,)) < 1:
            raise InvalidJob(f"preprocess.{name}: {size} must be at least 1 pixel")


def _listed(names: list[str]) -> str:
    return names[0] if len(names) == 1 else f"{', '.join(names[:-1])} and {names[-1]}"
