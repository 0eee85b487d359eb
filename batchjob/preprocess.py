"""What a job may say of the way from decoded pixels to the model's input."""

from __future__ import annotations

from typing import Literal

from pydantic import Field

from batchjob.settings import Settings, Target

__all__ = ["Preprocess"]


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
