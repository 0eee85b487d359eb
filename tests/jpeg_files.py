"""Small photographs in many encodings, for the GPU's JPEG decoder and for a stand-in of it on the CPU."""

from __future__ import annotations

import io
from collections.abc import Sequence
from multiprocessing import get_context
from typing import Any

import numpy as np
import torch
import torchvision  # noqa: F401 - registers torch.ops.image
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


def encode_jpeg(image: Image.Image, orientation: int = 1, **options: Any) -> bytes:
    exif, out = Image.Exif(), io.BytesIO()
    exif[0x0112] = orientation
    image.save(out, "JPEG", exif=exif, **options)
    return out.getvalue()


def encode_png(image: Image.Image) -> bytes:
    out = io.BytesIO()
    image.save(out, "PNG")
    return out.getvalue()


def decode_files(files: Sequence[torch.Tensor]) -> list[torch.Tensor]:
    """Decode on the CPU like nvJPEG on a GPU: all files, or none if one fails."""
    return [torch.ops.image.decode_jpeg(file, 3, False) for file in files]


def make_share(value: float) -> GpuShare:
    return GpuShare(get_context("forkserver"), value)


def make_split_transform(value: float, preprocess: Preprocess = CENTER_CROP, **settings: Any) -> GpuSplitTransform:
    decode_settings = DecodeSettings(mode="fast", device="cuda", **settings)
    return GpuSplitTransform(
        ImageTransform(decode_settings, ResizeCrop(preprocess), gray=False, apply_exif=preprocess.exif == "apply"),
        make_share(value),
    )


PLAIN_JPEG = encode_jpeg(make_photograph(1))
UNSUITABLE_FILES = {
    "progressive": encode_jpeg(make_photograph(1), progressive=True),
    "grey": encode_jpeg(make_photograph(1).convert("L")),
    "CMYK": encode_jpeg(make_photograph(1).convert("CMYK")),
    "RGB color space": encode_jpeg(make_photograph(1), keep_rgb=True),
    "truncated": PLAIN_JPEG[:-40],
    "trailing bytes": PLAIN_JPEG + b"trailer",
    "header only": PLAIN_JPEG[:30] + b"\xff\xd9",
    "PNG": encode_png(make_photograph(1)),
    "text": b"no image\xff\xd9",
    "empty": b"",
}
