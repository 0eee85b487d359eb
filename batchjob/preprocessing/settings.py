"""Job settings of decoding and preprocessing (`decode:` and `preprocess:`), and their merge with the weights' own."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any, Literal, cast

from pydantic import AfterValidator, Field, field_validator

from batchjob.errors import InvalidJob
from batchjob.preprocessing.image_formats import DEFAULT_FORMATS, FORMATS, ImageFormat, unavailable_reason
from batchjob.settings import OptionalTarget, Settings
from batchjob.user_code import list_sources

__all__ = ["DecodeSettings", "Preprocess", "merge_preprocess"]

_STEPS = ("resize", "crop", "mean", "std")
_MAX_UNIT_STD = 2.0  # of pixels of 0-1, which deviate by 0.5 at most
_ALLOWED_WITH_TRANSFORM = {"transform", "transform_input", "exif", "sizes"}


def _normalize_formats(formats: tuple[ImageFormat, ...]) -> tuple[ImageFormat, ...]:
    """Remove duplicates and sort formats. Raises ValueError for a format that is not installed."""
    for name in formats:
        if reason := unavailable_reason(name):
            raise ValueError(f"names {name}, which {reason}")
    return tuple(name for name in FORMATS if name in formats)


class DecodeSettings(Settings):
    """Limits of one image, beyond which it becomes an error row, and the exactness of its pixels.

    Attributes:
        max_pixels: Width times height at most.
        max_bytes: Size of the encoded file at most, in bytes.
        formats: Formats to read, of jpeg, png, webp, gif (first frame), bmp, tiff, avif and heif; avif and heif only
            where they are named. The first bytes of a file decide its format, never its name.
        truncated: `accept` decodes a truncated or damaged file as far as its format allows (JPEG, PNG, GIF, BMP) and
            leaves the rest black or grey. `error` makes it an error row.
        mode: `exact` gives Pillow's decoding and torchvision's resize, bit for bit. `fast` resizes in integers, and
            decodes a JPEG at 1/2, 1/4 or 1/8 of its size if that is still as large as the resize needs.
        device: Device that decodes: the CPU. Version 0.1 could also decode on a GPU.
    """

    max_pixels: Annotated[int, Field(ge=1)] = 178_956_970
    max_bytes: Annotated[int, Field(ge=1)] = 256 * 1024 * 1024
    formats: Annotated[tuple[ImageFormat, ...], Field(min_length=1), AfterValidator(_normalize_formats)] = (
        DEFAULT_FORMATS
    )
    truncated: Literal["error", "accept"] = "error"
    mode: Literal["exact", "fast"] = "exact"
    device: Literal["cpu"] = "cpu"

    @field_validator("device", mode="before")
    @classmethod
    def _refuse_cuda(cls, device: object) -> object:
        if device == "cuda":
            raise ValueError("is cuda, but this version decodes on the CPU only; write device: cpu, or leave it away")
        return device


class Preprocess(Settings):
    """Steps from decoded pixels to the model's input.

    In a job, given keys override the weights' own, absent keys keep them, and null switches a step off.

    Attributes:
        resize: Length of the shorter side in pixels, or `[height, width]`; null keeps the size.
        crop: Centre crop: side of a square, or `[height, width]`, in pixels; null keeps everything.
        interpolation: Filter of the resize; always antialiased.
        mean: Mean of each channel, after scaling, given with `std`; null skips normalisation. Values of another scale
            than `scale` are refused.
        std: Standard deviation of each channel.
        channels: Order and number of the channels that the model gets.
        scale: `unit` divides by 255, `none` leaves 0-255.
        exif: `apply` turns the image upright, following its EXIF orientation.
        transform: `module:attribute`, a function or an object like torchvision's `Compose` from an image to the tensor
            that the model gets, in place of all steps above but `exif`. In Python also the function or object itself.
        transform_input: Image that `transform` gets: `tensor`, uint8 `[3, h, w]`, or `pil`, a PIL image in mode RGB.
            `auto` gives a PIL image where a step such as torchvision's `ToTensor` needs one.
        sizes: Treatment of images that come out in different sizes, where the model takes batches: `one` makes images
            of another size than the first error rows, `group` predicts the images of each size together.
        pad: With `sizes: group`, black is added on the right and at the bottom up to a multiple of so many pixels, so
            that there are few groups.
    """

    resize: int | tuple[int, int] | None = None
    crop: int | tuple[int, int] | None = None
    interpolation: Literal["nearest", "bilinear", "bicubic"] = "bilinear"
    mean: tuple[float, ...] | None = None
    std: tuple[float, ...] | None = None
    channels: Literal["rgb", "bgr", "gray"] = "rgb"
    scale: Literal["unit", "none"] = "unit"
    exif: Literal["ignore", "apply"] = "ignore"
    transform: OptionalTarget = cast("Any", None)
    transform_input: Literal["auto", "pil", "tensor"] = "auto"
    sizes: Literal["one", "group"] = "one"
    pad: int | None = Field(default=None, ge=1, le=4096)

    def list_files(self, folder: Path) -> list[str]:
        """Return the paths of the sources of the user's transform. Raises InvalidJob if it cannot be found."""
        return [] if self.transform is None else [str(path) for path in list_sources(self.transform, folder)]


def merge_preprocess(job: Preprocess | None, own: Preprocess | None) -> Preprocess:
    """Merge a job's `preprocess` into the one that the weights bring: given keys override, absent keys are kept.

    Args:
        job: `preprocess` of the job, of which only the fields count that were set.
        own: Preprocessing that the weights were trained with, where it is known.

    Raises:
        InvalidJob: A needed key is missing, or keys contradict each other; the message names them.
    """
    job_values = {name: getattr(job, name) for name in job.model_fields_set} if job else {}
    own_values = {name: getattr(own, name) for name in Preprocess.model_fields} if own else {}
    keeps_own_transform = own_values.get("transform") is not None and not job_values.keys() - _ALLOWED_WITH_TRANSFORM
    if job_values.get("transform") is not None or keeps_own_transform:
        merged = _merge_with_transform(job_values, own_values)
        if job is None or job.transform is None:
            return merged
        # Not among the fields that were set where an earlier version has planned the job.
        return merged.model_copy(update={"transform_input": job.transform_input})
    if "transform_input" in job_values:
        raise InvalidJob("preprocess.transform_input: there is no transform; give preprocess.transform with it")
    missing = [name for name in _STEPS if name not in job_values and (own is None or own.transform is not None)]
    if missing:
        raise InvalidJob(
            f"preprocess: the weights bring no preprocessing of their own; give {_join_names(missing)} "
            "(null switches a step off), or transform: module:attribute"
        )
    merged = Preprocess(**{**own_values, **job_values, "transform": None})
    _check_merged(merged)
    return merged


def _merge_with_transform(job_values: dict[str, Any], own_values: dict[str, Any]) -> Preprocess:
    clash = sorted(job_values.keys() - _ALLOWED_WITH_TRANSFORM)
    if clash:
        raise InvalidJob(
            f"preprocess: transform does all the steps itself; take {_join_names(clash)} away, or take transform away"
        )
    merged = {**own_values, **job_values}
    return Preprocess(**{name: merged[name] for name in _ALLOWED_WITH_TRANSFORM if name in merged})


def _check_merged(merged: Preprocess) -> None:
    mean, std = merged.mean, merged.std
    if (mean is None) != (std is None):
        present, absent = ("mean", "std") if std is None else ("std", "mean")
        raise InvalidJob(f"preprocess: {present} is given and {absent} is null; give both, or null for both")
    channels = 1 if merged.channels == "gray" else 3
    for name, values in (("mean", mean), ("std", std)):
        if values is not None and len(values) != channels:
            raise InvalidJob(
                f"preprocess.{name}: has {len(values)} values, but channels: {merged.channels} needs {channels}"
            )
    if std is not None and not all(value > 0 for value in std):
        raise InvalidJob(f"preprocess.std: {list(std)} must be above 0 in every channel")
    if mean is not None and std is not None:
        _check_scale(merged.scale, mean, std)
    if merged.pad is not None and merged.sizes == "one":
        raise InvalidJob("preprocess.pad: it makes groups of images of one size; write preprocess.sizes: group with it")
    for name in ("resize", "crop"):
        size = getattr(merged, name)
        if size is not None and min(size if isinstance(size, tuple) else (size,)) < 1:
            raise InvalidJob(f"preprocess.{name}: {size} must be at least 1 pixel")


def _check_scale(scale: str, mean: tuple[float, ...], std: tuple[float, ...]) -> None:
    """Raise InvalidJob if mean and deviation are for pixels of another scale. Mean 0 and deviation 1 suit both."""
    largest_mean, largest_std = max(mean), max(std)
    moments = f"mean {list(mean)} and std {list(std)}"
    if scale == "unit" and (largest_mean > 1 or largest_std > _MAX_UNIT_STD):
        raise InvalidJob(
            f"preprocess: {moments} are for pixels of 0-255, but scale: unit brings them to 0-1, and all images would "
            "look nearly the same; write preprocess.scale: none, or divide mean and std by 255"
        )
    if scale == "none" and (0 < largest_mean < 1 or largest_std < 1):
        raise InvalidJob(
            f"preprocess: {moments} are for pixels of 0-1, but scale: none leaves them at 0-255; write "
            "preprocess.scale: unit, or multiply mean and std by 255"
        )


def _join_names(names: list[str]) -> str:
    return names[0] if len(names) == 1 else f"{', '.join(names[:-1])} and {names[-1]}"
