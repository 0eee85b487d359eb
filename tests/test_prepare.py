"""Encoded bytes to a batch's row: the fast mode beside the exact one, in pixels, sizes and places."""

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

CENTRE = Preprocess(resize=256, crop=224)


def prepared(data: bytes, preprocess: Preprocess, mode: Literal["exact", "fast"], gray: bool = False) -> PreparedImage:
    prepare = ImageTransform(
        DecodeSettings(mode=mode), ResizeCrop(preprocess), gray=gray, apply_exif=preprocess.exif == "apply"
    )
    made: PreparedImage = pickle.loads(pickle.dumps(prepare))(data)
    return made


def jpeg(image: Image.Image, orientation: int = 1) -> bytes:
    exif, out = Image.Exif(), io.BytesIO()
    exif[0x0112] = orientation
    image.save(out, "JPEG", quality=92, exif=exif)
    return out.getvalue()


def deviations(fast: torch.Tensor, exact: torch.Tensor) -> tuple[int, float]:
    assert fast.shape == exact.shape
    away = (fast.int() - exact.int()).abs()
    return int(away.max()), away.float().mean().item()


def test_fast_is_within_a_level_where_nothing_is_decoded_smaller(test_data: Path) -> None:
    for path in sorted((test_data / "imagenet-sample").glob("*.JPEG"))[:10]:
        with Image.open(path) as image:
            if min(image.size) >= 512:
                continue
        fast, exact = (prepared(path.read_bytes(), CENTRE, mode) for mode in ("fast", "exact"))
        most, mean = deviations(fast.pixels, exact.pixels)
        assert most <= 1
        assert mean < 0.3


@pytest.mark.parametrize("times", [2, 5, 8])
@pytest.mark.parametrize(
    "preprocess",
    [CENTRE, Preprocess(resize=(160, 160)), Preprocess(resize=232, crop=224, interpolation="bicubic")],
    ids=["resize-crop", "resize", "bicubic"],
)
def test_fast_stays_near_where_photographs_are_decoded_smaller(
    test_data: Path, preprocess: Preprocess, times: int
) -> None:
    means = []
    for path in sorted((test_data / "imagenet-sample").glob("*.JPEG"))[:4]:
        with Image.open(path) as image:
            large = image.convert("RGB").resize((257 * times + times - 1, 301 * times), Image.Resampling.BICUBIC)
        data = jpeg(large)
        fast, exact = (prepared(data, preprocess, mode) for mode in ("fast", "exact"))
        assert (fast.width, fast.height) == (exact.width, exact.height) == large.size
        most, mean = deviations(fast.pixels, exact.pixels)
        assert most < 100
        means.append(mean)
    assert max(means) < 6  # a texture finer than the pixels that are left
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
def test_a_frame_leads_back_to_the_stored_image(
    preprocess: Preprocess, orientation: int, mode: Literal["exact", "fast"]
) -> None:
    pixels = np.zeros((389, 517, 3), np.uint8)
    pixels[170:218, 230:278] = 255
    made = prepared(jpeg(Image.fromarray(pixels), orientation), preprocess, mode)
    assert (made.width, made.height, made.axes_swapped) == (517, 389, orientation == 6)
    upright = np.rot90(pixels, -1) if made.axes_swapped else pixels
    found = compute_image_geometry(preprocess, ImageInfo(None, made.width, made.height, axes_swapped=made.axes_swapped))
    expected = [(edge.min(), edge.max() + 1) for edge in np.nonzero(upright[:, :, 0])]
    for axis, scale, cut in ((0, found.scale_y, found.top), (1, found.scale_x, found.left)):
        at = (made.pixels[0] > 127).nonzero()[:, axis]
        back = [(value + cut) / scale for value in (at.min().item(), at.max().item() + 1)]
        assert back == pytest.approx(expected[axis], abs=1 / scale + 0.01)


def test_the_size_of_what_comes_out_does_not_hang_on_the_mode() -> None:
    # 1001 x 513 shrunk to a half is 501 x 257: another ratio, and with it another number of columns.
    noise = np.random.default_rng(3).integers(0, 256, (513, 1001, 3), dtype=np.uint8)
    for resize in (255, 128, 100, 64, 33):
        preprocess = Preprocess(resize=resize)
        fast, exact = (prepared(jpeg(Image.fromarray(noise)), preprocess, mode) for mode in ("fast", "exact"))
        assert fast.pixels.shape == exact.pixels.shape


@pytest.mark.parametrize(
    "preprocess", [Preprocess(), Preprocess(crop=100), Preprocess(resize=64, interpolation="nearest")]
)
def test_fast_changes_nothing_where_all_pixels_are_needed(preprocess: Preprocess) -> None:
    noise = np.random.default_rng(3).integers(0, 256, (300, 400, 3), dtype=np.uint8)
    data = jpeg(Image.fromarray(noise))
    for gray in (False, True):
        fast, exact = (prepared(data, preprocess, mode, gray) for mode in ("fast", "exact"))
        assert torch.equal(fast.pixels, exact.pixels)
