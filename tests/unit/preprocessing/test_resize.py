"""Resize and crop in one step: the bits of torchvision's resize followed by a crop, or one level of 255 away."""

from __future__ import annotations

import random

import numpy as np
import pytest
import torch
from torchvision.transforms import InterpolationMode, functional

from batchjob.preprocessing.geometry import CropBox
from batchjob.preprocessing.resize import Interpolation, matches_torch, resize_and_crop, resize_and_crop_uint8

FILTERS: tuple[Interpolation, ...] = ("bilinear", "bicubic")


def make_noise(channels: int, height: int, width: int) -> torch.Tensor:
    values = np.random.default_rng(height * width).integers(0, 256, (height, width, channels), dtype=np.uint8)
    return torch.from_numpy(values).permute(2, 0, 1)


def resize_with_torchvision(
    image: torch.Tensor, size: tuple[int, int], box: CropBox, interpolation: Interpolation
) -> torch.Tensor:
    resized: torch.Tensor = functional.resize(image, list(size), InterpolationMode(interpolation), antialias=True)
    top, left, height, width = box
    return resized[:, top : top + height, left : left + width]


@pytest.mark.parametrize("interpolation", FILTERS)
@pytest.mark.parametrize("seed", range(40))
def test_any_box_of_any_size_equals_torchvision(seed: int, interpolation: Interpolation) -> None:
    draw = random.Random(seed)
    image = make_noise(draw.choice([1, 3]), draw.randint(1, 500), draw.randint(1, 500))
    size = draw.randint(1, 300), draw.randint(1, 300)
    height, width = draw.randint(1, size[0]), draw.randint(1, size[1])
    box = draw.randint(0, size[0] - height), draw.randint(0, size[1] - width), height, width
    assert torch.equal(
        resize_and_crop(image, size, box, interpolation), resize_with_torchvision(image, size, box, interpolation)
    ), (image.shape, size, box)


@pytest.mark.parametrize("interpolation", FILTERS)
@pytest.mark.parametrize(
    ("height", "width", "size"),
    [
        (1201, 1800, (256, 383)),  # several strips, the last one a single row
        (3, 70_000, (3, 300)),  # a strip of a single row
        (400, 300, (400, 200)),
        (300, 400, (200, 400)),
        (257, 255, (258, 256)),
        (255, 257, (256, 256)),
        (64, 64, (64, 64)),
        (1, 1, (256, 256)),
    ],
)
def test_center_crop_equals_torchvision(
    height: int, width: int, size: tuple[int, int], interpolation: Interpolation
) -> None:
    image = make_noise(3, height, width)
    for part in (1.0, 0.875, 0.5):
        high, wide = max(1, int(size[0] * part)), max(1, int(size[1] * part))
        box = (size[0] - high) // 2, (size[1] - wide) // 2, high, wide
        assert torch.equal(
            resize_and_crop(image, size, box, interpolation), resize_with_torchvision(image, size, box, interpolation)
        ), box


def test_single_column_equals_the_same_column_among_others() -> None:
    image, box = make_noise(3, 454, 459), (14, 14, 1, 1)
    assert torch.equal(
        resize_and_crop(image, (29, 29), box, "bilinear"), resize_with_torchvision(image, (29, 29), box, "bilinear")
    )


@pytest.mark.parametrize("box", [(16, 58, 224, 224), (0, 0, 256, 341), (0, 58, 256, 224)])
def test_uint8_resize_is_at_most_one_level_away(box: CropBox) -> None:
    for image in (make_noise(3, 375, 500), make_noise(1, 375, 500), make_noise(3, 100, 133)):
        size = 256, 341
        resized = resize_and_crop_uint8(image, size, box, "bilinear")
        assert resized.dtype == torch.uint8
        assert (resized.int() - resize_with_torchvision(image, size, box, "bilinear").int()).abs().max() <= 1


@pytest.mark.parametrize("seed", range(60))
def test_band_matrices_equal_torchvision(seed: int) -> None:
    draw = random.Random(1000 + seed)
    image = make_noise(draw.choice([1, 3]), draw.randint(1, 400), draw.randint(1, 400))
    size = tuple(max(1, int(side / draw.uniform(0.4, 2.1))) for side in image.shape[1:])
    box = (size[0] // 9, size[1] // 7, size[0] - size[0] // 9, size[1] - size[1] // 7)
    resized = resize_and_crop(image, (size[0], size[1]), box, "bilinear")
    assert torch.equal(resized, resize_with_torchvision(image, (size[0], size[1]), box, "bilinear")), (
        image.shape,
        size,
        box,
    )


@pytest.mark.parametrize(("size", "box"), [((290, 1), (162, 0, 90, 1)), ((1, 90), (0, 3, 1, 70))])
def test_resize_to_a_single_row_or_column_equals_torchvision(size: tuple[int, int], box: CropBox) -> None:
    image = make_noise(3, 234, 169)
    assert torch.equal(
        resize_and_crop(image, size, box, "bilinear"), resize_with_torchvision(image, size, box, "bilinear")
    )


def test_resize_works_without_sparse_products(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: object) -> None:
        raise RuntimeError("Calling addmm on a sparse CPU tensor requires compiling PyTorch with MKL")

    box = (16, 58, 224, 224)
    expected = resize_and_crop(make_noise(3, 375, 500), (256, 341), box, "bilinear")
    monkeypatch.setattr("batchjob.preprocessing.resize.resize_with_bands", refuse)
    matches_torch.cache_clear()
    try:
        assert torch.equal(resize_and_crop(make_noise(3, 375, 500), (256, 341), box, "bilinear"), expected)
    finally:
        matches_torch.cache_clear()
