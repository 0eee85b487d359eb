"""Encoded bytes to a prepared image: fast mode against exact mode, in pixels, sizes and positions."""

from __future__ import annotations

import io
import pickle
from pathlib import Path
from typing import Literal

import numpy as np
import pytest
import torch
from PIL import Image

from batchjob.preprocessing.geometry import compute_image_geometry
from batchjob.preprocessing.settings import DecodeSettings, Preprocess
from batchjob.preprocessing.transforms import ImageTransform, ResizeCrop
from batchjob.types import ImageInfo, PreparedImage

CENTER_CROP = Preprocess(resize=256, crop=224)


def prepare(data: bytes, preprocess: Preprocess, mode: Literal["exact", "fast"], gray: bool = False) -> PreparedImage:
    transform = ImageTransform(
        DecodeSettings(mode=mode), ResizeCrop(preprocess), gray=gray, apply_exif=preprocess.exif == "apply"
    )
    image: PreparedImage = pickle.loads(pickle.dumps(transform))(data)
    return image


def encode_jpeg(image: Image.Image, orientation: int = 1) -> bytes:
    exif, out = Image.Exif(), io.BytesIO()
    exif[0x0112] = orientation
    image.save(out, "JPEG", quality=92, exif=exif)
    return out.getvalue()


def compare_pixels(fast: torch.Tensor, exact: torch.Tensor) -> tuple[int, float]:
    assert fast.shape == exact.shape
    difference = (fast.int() - exact.int()).abs()
    return int(difference.max()), difference.float().mean().item()


def test_fast_is_within_one_level_without_reduced_decoding(test_data: Path) -> None:
    for path in sorted((test_data / "imagenet-sample").glob("*.JPEG"))[:10]:
        with Image.open(path) as image:
            if min(image.size) >= 512:
                continue
        fast, exact = (prepare(path.read_bytes(), CENTER_CROP, mode) for mode in ("fast", "exact"))
        largest, mean = compare_pixels(fast.pixels, exact.pixels)
        assert largest <= 1
        assert mean < 0.3


@pytest.mark.parametrize("times", [2, 5, 8])
@pytest.mark.parametrize(
    "preprocess",
    [CENTER_CROP, Preprocess(resize=(160, 160)), Preprocess(resize=232, crop=224, interpolation="bicubic")],
    ids=["resize-crop", "resize", "bicubic"],
)
def test_fast_stays_close_with_reduced_decoding(test_data: Path, preprocess: Preprocess, times: int) -> None:
    means = []
    for path in sorted((test_data / "imagenet-sample").glob("*.JPEG"))[:4]:
        with Image.open(path) as image:
            large = image.convert("RGB").resize((257 * times + times - 1, 301 * times), Image.Resampling.BICUBIC)
        data = encode_jpeg(large)
        fast, exact = (prepare(data, preprocess, mode) for mode in ("fast", "exact"))
        assert (fast.width, fast.height) == (exact.width, exact.height) == large.size
        largest, mean = compare_pixels(fast.pixels, exact.pixels)
        assert largest < 100
        means.append(mean)
    assert max(means) < 6  # for a texture finer than the pixels that remain
    assert float(np.mean(means)) < 2.5


@pytest.mark.parametrize("mode", ["exact", "fast"])
@pytest.mark.parametrize("orientation", [1, 6])
@pytest.mark.parametrize(
    "preprocess",
    [
        Preprocess(resize=64, crop=48, exif="apply"),
        Preprocess(resize=(40, 80), exif="apply"),
        Preprocess(resize=64, exif="apply"),
        Preprocess(resize=32, exif="apply", sizes="group", pad=32),
    ],
    ids=["resize-crop", "resize", "shorter", "pad"],
)
def test_geometry_maps_the_input_back_to_the_stored_image(
    preprocess: Preprocess, orientation: int, mode: Literal["exact", "fast"]
) -> None:
    pixels = np.zeros((389, 517, 3), np.uint8)
    pixels[170:218, 230:278] = 255
    image = prepare(encode_jpeg(Image.fromarray(pixels), orientation), preprocess, mode)
    assert (image.width, image.height, image.axes_swapped) == (517, 389, orientation == 6)
    upright = np.rot90(pixels, -1) if image.axes_swapped else pixels
    geometry = compute_image_geometry(
        preprocess, ImageInfo(None, image.width, image.height, axes_swapped=image.axes_swapped)
    )
    expected = [(edge.min(), edge.max() + 1) for edge in np.nonzero(upright[:, :, 0])]
    for axis, scale, cut in ((0, geometry.scale_y, geometry.top), (1, geometry.scale_x, geometry.left)):
        at = (image.pixels[0] > 127).nonzero()[:, axis]
        back = [(value + cut) / scale for value in (at.min().item(), at.max().item() + 1)]
        assert back == pytest.approx(expected[axis], abs=1 / scale + 0.01)


def test_output_size_does_not_depend_on_the_mode() -> None:
    # Half of 1001x513 is 501x257, rounded up: another ratio, which would give another number of columns.
    noise = np.random.default_rng(3).integers(0, 256, (513, 1001, 3), dtype=np.uint8)
    for resize in (255, 128, 100, 64, 33):
        preprocess = Preprocess(resize=resize)
        fast, exact = (prepare(encode_jpeg(Image.fromarray(noise)), preprocess, mode) for mode in ("fast", "exact"))
        assert fast.pixels.shape == exact.pixels.shape


@pytest.mark.parametrize(
    "preprocess", [Preprocess(), Preprocess(crop=100), Preprocess(resize=64, interpolation="nearest")]
)
def test_fast_equals_exact_where_all_pixels_are_needed(preprocess: Preprocess) -> None:
    noise = np.random.default_rng(3).integers(0, 256, (300, 400, 3), dtype=np.uint8)
    data = encode_jpeg(Image.fromarray(noise))
    for gray in (False, True):
        fast, exact = (prepare(data, preprocess, mode, gray) for mode in ("fast", "exact"))
        assert torch.equal(fast.pixels, exact.pixels)
