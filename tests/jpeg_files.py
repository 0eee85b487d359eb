"""Small photographs in many encodings, and torchvision's decoder for the CPU in the place of a device's."""

from __future__ import annotations

import io
from collections.abc import Sequence
from multiprocessing import get_context
from typing import Any

import numpy as np
import torch
import torchvision  # noqa: F401 - brings torch.ops.image
from PIL import Image

from batchjob.loader.gpu_share import GpuShare, GpuSplitTransform
from batchjob.preprocessing.settings import DecodeSettings, Preprocess
from batchjob.preprocessing.transforms import ImageTransform, ResizeCrop

__all__ = [
    "CENTER_CROP",
    "PLAIN_JPEG",
    "UNSUITABLE_FILES",
    "decode_files",
    "encode_jpeg",
    "make_photograph",
    "make_share",
    "make_split_transform",
]

CENTER_CROP = Preprocess(resize=40, crop=32)


def make_photograph(seed: int, size: tuple[int, int] = (90, 70)) -> Image.Image:
    noise = np.random.default_rng(seed).integers(0, 256, (8, 8, 3), dtype=np.uint8)
    return Image.fromarray(noise).resize(size, Image.Resampling.BICUBIC)


def encode_jpeg(image: Image.Image, orientation: int = 1, **how: Any) -> bytes:
    exif, out = Image.Exif(), io.BytesIO()
    exif[0x0112] = orientation
    image.save(out, "JPEG", exif=exif, **how)
    return out.getvalue()


def encode_png(image: Image.Image) -> bytes:
    out = io.BytesIO()
    image.save(out, "PNG")
    return out.getvalue()


def decode_files(files: Sequence[torch.Tensor]) -> list[torch.Tensor]:
    """In the device's place; like nvJPEG it takes all of them or none."""
    return [torch.ops.image.decode_jpeg(file, 3, False) for file in files]


def make_share(value: float) -> GpuShare:
    return GpuShare(get_context("forkserver"), value)


def make_split_transform(value: float, preprocess: Preprocess = CENTER_CROP, **settings: Any) -> GpuSplitTransform:
    given = DecodeSettings(mode="fast", device="cuda", **settings)
    return GpuSplitTransform(
        ImageTransform(given, ResizeCrop(preprocess), gray=False, apply_exif=preprocess.exif == "apply"),
        make_share(value),
    )


PLAIN_JPEG = encode_jpeg(make_photograph(1))
UNSUITABLE_FILES = {
    "progressive": encode_jpeg(make_photograph(1), progressive=True),
    "grey": encode_jpeg(make_photograph(1).convert("L")),
    "CMYK": encode_jpeg(make_photograph(1).convert("CMYK")),
    "RGB inside": encode_jpeg(make_photograph(1), keep_rgb=True),
    "cut off": PLAIN_JPEG[:-40],
    "something behind it": PLAIN_JPEG + b"trailer",
    "header only": PLAIN_JPEG[:30] + b"\xff\xd9",
    "PNG": encode_png(make_photograph(1)),
    "text": b"no image\xff\xd9",
    "empty": b"",
}
