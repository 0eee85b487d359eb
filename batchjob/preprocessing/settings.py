"""What a job may say of the way from decoded pixels to the model's input."""

from __future__ import annotations

from typing import Annotated, Any, Literal, Self

from pydantic import AfterValidator, Field, model_validator

from batchjob.errors import InvalidJob
from batchjob.preprocessing.image_formats import DEFAULT_FORMATS, FORMATS, ImageFormat, unavailable_reason
from batchjob.settings import Settings, Target

__all__ = ["DecodeSettings", "Preprocess", "merge_preprocess"]


class Preprocess(Settings):
    """How pixels become the model's input.

    In a job: given keys override, absent keys keep the weights' own, null switches a step off.

    Attributes:
        resize: shorter side in pixels, or `[height, width]`; null keeps the size.
        crop: centre crop, a side or `[height, width]`; null keeps all.
        interpolation: of the resize; always antialiased.
        mean: per channel, after scaling; with `std`; null normalises nothing.
        std: per channel.
        channels: order and number handed to the model.
        scale: `unit` divides by 255, `none` leaves 0-255.
        exif: `apply` turns the image as its EXIF orientation says.
        transform: `module:function` from uint8 `[3, h, w]` to a tensor, in place of all the steps above but `exif`.
        sizes: what becomes of images that come out in different sizes, where the model takes batches: `one` makes those
            of another size than the first error rows, `group` predicts those of each size together.
        pad: with `sizes: group`, black right and below up to a multiple of so many pixels, so that groups are few.
    """

    resize: int | tuple[int, int] | None = None
    crop: int | tuple[int, int] | None = None
    interpolation: Literal["nearest", "bilinear", "bicubic"] = "bilinear"
    mean: tuple[float, ...] | None = None
    std: tuple[float, ...] | None = None
    channels: Literal["rgb", "bgr", "gray"] = "rgb"
    scale: Literal["unit", "none"] = "unit"
    exif: Literal["ignore", "apply"] = "ignore"
    transform: Target | None = Field(default=None)
    sizes: Literal["one", "group"] = "one"
    pad: int | None = Field(default=None, ge=1, le=4096)


def _choose(formats: tuple[ImageFormat, ...]) -> tuple[ImageFormat, ...]:
    """The same formats, each once and in one order. Raises ValueError for one that is not installed."""
    for name in formats:
        if why := unavailable_reason(name):
            raise ValueError(f"names {name}, which {why}")
    return tuple(name for name in FORMATS if name in formats)


class DecodeSettings(Settings):
    """Limits on one image, beyond which it becomes an error row; and how exact its pixels must be.

    Attributes:
        max_pixels: width times height.
        max_bytes: of the encoded file.
        formats: those that are read, of jpeg, png, webp, gif (its first frame), bmp, tiff, avif and heif; avif and heif
            only where they are named. A file is told by its first bytes, never by its name.
        truncated: `accept` takes a file that ends too early, or is damaged further on, as far as it goes, where its
            format allows (JPEG, PNG, GIF, BMP); what is missing is black or grey. `error` makes it an error row.
        mode: `exact` is Pillow's decoding and torchvision's resize, bit for bit. `fast` decodes a JPEG of at least
            twice the size that the resize needs to a half, quarter or eighth, and resizes in integers.
        device: `cuda` leaves a share of the plain JPEG files to the GPU's own decoder, as large as keeps both busy; the
            CPU decodes all others. Its pixels differ by a few levels of 255, so it needs `mode: fast`.
    """

    max_pixels: Annotated[int, Field(ge=1)] = 178_956_970
    max_bytes: Annotated[int, Field(ge=1)] = 256 * 1024 * 1024
    formats: Annotated[tuple[ImageFormat, ...], Field(min_length=1), AfterValidator(_choose)] = DEFAULT_FORMATS
    truncated: Literal["error", "accept"] = "error"
    mode: Literal["exact", "fast"] = "exact"
    device: Literal["cpu", "cuda"] = "cpu"

    @model_validator(mode="after")
    def _device_fits(self) -> Self:
        if self.device == "cuda" and self.mode == "exact":
            raise ValueError("has device cuda, whose pixels are not exact; write mode: fast with it, or device: cpu")
        if self.device == "cuda" and "jpeg" not in self.formats:
            raise ValueError("has device cuda, which decodes JPEG, but formats without jpeg; add it, or device: cpu")
        return self


_STEPS = ("resize", "crop", "mean", "std")
_BESIDE_TRANSFORM = {"transform", "exif", "sizes"}


def merge_preprocess(job: Preprocess | None, own: Preprocess | None) -> Preprocess:
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
