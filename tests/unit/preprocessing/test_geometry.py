"""Sizes, crops and padding in worked cases, each compared with torchvision."""

from __future__ import annotations

import pytest
import torch
from torchvision.transforms import functional

from batchjob.preprocessing.geometry import (
    center_crop_box,
    compute_image_geometry,
    compute_output_size,
    compute_resized_size,
)
from batchjob.preprocessing.settings import Preprocess
from batchjob.types import ImageInfo

# Sizes are height x width, as in torchvision.


@pytest.mark.parametrize(
    ("size", "resize", "expected"),
    [
        ((375, 500), 256, (256, 341)),  # 256 * 500 / 375 = 341.33
        ((500, 375), 256, (341, 256)),
        ((333, 500), 256, (256, 384)),  # 256 * 500 / 333 = 384.38
        ((601, 400), 256, (384, 256)),  # 256 * 601 / 400 = 384.64: cut off, not rounded
        ((100, 100), 64, (64, 64)),
        ((3, 1000), 7, (7, 2333)),  # 7 * 1000 / 3 = 2333.33
        ((50, 40), 80, (100, 80)),  # enlarged
        ((375, 500), (40, 80), (40, 80)),
    ],
)
def test_resized_size_is_that_of_torchvision(
    size: tuple[int, int], resize: int | tuple[int, int], expected: tuple[int, int]
) -> None:
    assert compute_resized_size(resize, *size) == expected
    steps = [resize] if isinstance(resize, int) else list(resize)
    assert functional.resize(torch.zeros(3, *size, dtype=torch.uint8), steps).shape[1:] == expected


def test_without_a_resize_the_size_stays() -> None:
    assert compute_resized_size(None, 375, 500) == (375, 500)


@pytest.mark.parametrize(
    ("size", "crop", "top_left"),
    [
        ((256, 341), (224, 224), (16, 58)),  # (256 - 224) / 2 = 16; (341 - 224) / 2 = 58.5, to the even 58
        ((259, 343), (224, 224), (18, 60)),  # 17.5 to the even 18; 59.5 to the even 60
        ((225, 226), (224, 224), (0, 1)),  # 0.5 to the even 0
        ((227, 224), (224, 224), (2, 0)),  # 1.5 to the even 2
        ((100, 60), (7, 9), (46, 26)),  # 46.5 to the even 46; 25.5 to the even 26
    ],
)
def test_crop_box_is_that_of_torchvision(
    size: tuple[int, int], crop: tuple[int, int], top_left: tuple[int, int]
) -> None:
    assert center_crop_box(size, crop) == (*top_left, *crop)
    # The value of a pixel is its place in the image, so the first pixel of the crop tells where it was cut.
    first = int(functional.center_crop(torch.arange(size[0] * size[1]).view(1, *size), list(crop))[0, 0, 0])
    assert divmod(first, size[1]) == top_left


@pytest.mark.parametrize("crop", [None, (225, 10), (10, 342), (300, 400)])
def test_crop_box_is_the_whole_image_where_nothing_is_cut_or_something_is_padded(crop: tuple[int, int] | None) -> None:
    assert center_crop_box((224, 341), crop) == (0, 0, 224, 341)


@pytest.mark.parametrize(
    ("size", "crop", "top_left"),
    [
        ((101, 101), 224, (-61, -61)),  # (224 - 101) // 2 = 61
        ((100, 101), 224, (-62, -61)),  # (224 - 100) // 2 = 62
        ((300, 101), 224, (38, -61)),  # cut by (300 - 224) / 2 = 38 rows, padded by 61 columns
    ],
)
def test_padding_of_a_small_image_is_that_of_torchvision(
    size: tuple[int, int], crop: int, top_left: tuple[int, int]
) -> None:
    geometry = compute_image_geometry(Preprocess(crop=crop), ImageInfo(width=size[1], height=size[0]))
    assert [geometry.top, geometry.left] == [float(offset) for offset in top_left]
    cropped = functional.center_crop(torch.arange(1, 1 + size[0] * size[1]).view(1, *size), [crop])[0]
    row, column = (int(index[0]) for index in cropped.nonzero(as_tuple=True))
    # First pixel of the image that is left, and its place in the crop: their difference is what was removed.
    first_row, first_column = divmod(int(cropped[row, column]) - 1, size[1])
    assert (first_row - row, first_column - column) == top_left


def test_column_of_the_input_leads_back_to_the_photograph() -> None:
    geometry = compute_image_geometry(Preprocess(resize=256, crop=224), ImageInfo(width=500, height=375))
    assert (geometry.input_width, geometry.input_height) == (224, 224)
    assert geometry.scale_x == 341 / 500
    assert geometry.scale_y == 256 / 375
    assert (10 + geometry.left) / geometry.scale_x == pytest.approx(99.7, abs=0.01)  # (10 + 58) / 0.682
    assert (10 + geometry.top) / geometry.scale_y == pytest.approx(38.1, abs=0.02)  # (10 + 16) / 0.68267


def test_padding_to_a_multiple_is_not_part_of_the_input() -> None:
    # 256x341 becomes 256x352: 341 + 11 = 11 * 32.
    geometry = compute_image_geometry(Preprocess(resize=256, sizes="group", pad=32), ImageInfo(width=500, height=375))
    assert (geometry.input_width, geometry.pad_right) == (341, 11)
    assert (geometry.input_height, geometry.pad_below) == (256, 0)


def test_input_of_a_users_transform_counts_as_the_whole_image() -> None:
    geometry = compute_image_geometry(Preprocess(transform="net:prepare"), ImageInfo(width=500, height=375))
    assert (geometry.input_width, geometry.input_height, geometry.scale_x, geometry.left) == (500, 375, 1.0, 0.0)


@pytest.mark.parametrize(
    ("preprocess", "expected"),
    [
        (Preprocess(), None),
        (Preprocess(resize=256), None),
        (Preprocess(resize=(40, 80)), (40, 80)),
        (Preprocess(resize=256, crop=224), (224, 224)),
        (Preprocess(resize=(40, 80), crop=(30, 20)), (30, 20)),
        (Preprocess(crop=(33, 64), sizes="group", pad=32), (64, 64)),  # 33 + 31 = 64; 64 is a multiple already
        (Preprocess(transform="net:prepare"), None),
    ],
)
def test_output_size_is_known_if_no_step_depends_on_the_image(
    preprocess: Preprocess, expected: tuple[int, int] | None
) -> None:
    assert compute_output_size(preprocess) == expected
