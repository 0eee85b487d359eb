"""Images to try a model on: real files, random pixels, and outputs trimmed to the rows that a task looks at."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image

import batchjob
from batchjob.errors import InvalidJob
from batchjob.inference.example_images import (
    load_images,
    make_example_image,
    random_pixels,
    repeat_image,
    trim_output,
)
from batchjob.preprocessing.settings import DecodeSettings, Preprocess
from batchjob.preprocessing.transforms import ImageTransform, ResizeCrop
from batchjob.storage.reader import Reader

JOB = batchjob.Job.model_validate(
    {
        "input": {"type": "prefix", "uri": "images/"},
        "model": {"type": "torchvision", "name": "resnet18", "seed": 0},
        "task": {"type": "embedding"},
        "output": {"uri": "out"},
    }
)


def make_transform(gray: bool = False, **preprocess: Any) -> ImageTransform:
    return ImageTransform(DecodeSettings(), ResizeCrop(Preprocess(**preprocess)), gray=gray, apply_exif=False)


@pytest.fixture
def locations(tmp_path: Path) -> list[str]:
    """An absent file, one that is no image, and two pictures: red 8x6 and blue 5x4 (width x height)."""
    (tmp_path / "text.png").write_bytes(b"no picture")
    Image.new("RGB", (8, 6), (200, 0, 0)).save(tmp_path / "red.png")
    Image.new("RGB", (5, 4), (0, 0, 100)).save(tmp_path / "blue.png")
    return [str(tmp_path / name) for name in ("absent.png", "text.png", "red.png", "blue.png")]


def test_images_that_cannot_be_decoded_are_left_out(locations: list[str]) -> None:
    images = list(load_images(JOB, Reader(), make_transform(), locations))
    assert [tuple(image.shape) for image in images] == [(3, 6, 8), (3, 4, 5)]
    assert [image[:, 0, 0].tolist() for image in images] == [[200, 0, 0], [0, 0, 100]]


def test_model_without_a_fixed_size_is_tried_on_the_first_image_that_decodes(locations: list[str]) -> None:
    image = make_example_image(JOB, Reader(), make_transform(), locations)
    assert (tuple(image.shape), image[:, 0, 0].tolist()) == ((3, 6, 8), [200, 0, 0])


def test_unknown_size_without_any_decodable_image_is_reported(locations: list[str]) -> None:
    with pytest.raises(InvalidJob, match=r"none of the first 2 images can be decoded.*give preprocess\.resize or crop"):
        make_example_image(JOB, Reader(), make_transform(), locations[:2])


@pytest.mark.parametrize(
    ("transform", "shape"),
    [
        (make_transform(resize=256, crop=(32, 48)), (3, 32, 48)),
        (make_transform(resize=(20, 30), gray=True), (1, 20, 30)),
        (make_transform(crop=30, pad=32, sizes="group"), (3, 32, 32)),
    ],
)
def test_fixed_size_needs_no_file(transform: ImageTransform, shape: tuple[int, ...]) -> None:
    image = make_example_image(JOB, Reader(), transform, ["absent.png"])
    assert (tuple(image.shape), image.dtype) == (shape, torch.uint8)


def test_without_a_size_and_images_the_side_is_224() -> None:
    assert make_example_image(JOB, Reader(), make_transform(), []).shape == (3, 224, 224)


@pytest.mark.parametrize(("size", "shape"), [((4, 6), (2, 3, 4, 6)), ((1, 4, 6), (2, 1, 4, 6))])
def test_random_pixels_have_three_channels_unless_given(size: tuple[int, ...], shape: tuple[int, ...]) -> None:
    assert random_pixels(size, 2).shape == shape


def test_random_pixels_are_the_same_each_time_and_leave_the_global_generator() -> None:
    state = torch.get_rng_state()
    first = random_pixels((8, 8), 3)
    torch.rand(5)
    assert torch.equal(random_pixels((8, 8), 3), first)
    torch.set_rng_state(state)
    random_pixels((8, 8), 3, torch.float32)
    assert torch.equal(torch.get_rng_state(), state)


@pytest.mark.parametrize(("dtype", "top"), [(None, 255), (torch.uint8, 255), (torch.float32, 1), (torch.float16, 1)])
def test_random_pixels_fill_the_range_of_their_type(dtype: torch.dtype | None, top: float) -> None:
    pixels = random_pixels((32, 32), 4, dtype)
    assert pixels.dtype == (dtype or torch.uint8)
    assert 0.95 * top < pixels.max() <= top
    assert 0 <= pixels.min() < 0.05 * top


def test_repeated_image_is_a_batch_with_memory_of_its_own() -> None:
    image = random_pixels((4, 5), 1)[0]
    batch = repeat_image(image, 3)
    assert batch.is_contiguous()
    batch[0] = 0
    assert torch.equal(batch[1], image)
    assert torch.equal(batch[2], image)


def test_output_of_a_fixed_batch_is_trimmed_to_the_wanted_rows() -> None:
    output = {"logits": torch.full((8, 10), 0.5), "pair": (torch.ones(8), [torch.zeros(8, 2, 2)])}
    trimmed = trim_output(output, rows=8, wanted_rows=2)
    assert trimmed["logits"].tolist() == [[0.5] * 10] * 2
    assert trimmed["pair"][0].tolist() == [1.0, 1.0]
    assert trimmed["pair"][1][0].shape == (2, 2, 2)


def test_output_of_a_single_row_is_repeated_to_the_wanted_rows() -> None:
    assert trim_output(torch.tensor([[1.0, 2.0]]), rows=1, wanted_rows=2).tolist() == [[1.0, 2.0]] * 2


def test_values_without_a_row_for_each_image_stay() -> None:
    output = {"scale": torch.tensor(3.0), "prototypes": torch.arange(5), "names": ["a"] * 8}
    trimmed = trim_output(output, rows=8, wanted_rows=2)
    assert (trimmed["scale"].item(), trimmed["prototypes"].tolist()) == (3.0, [0, 1, 2, 3, 4])
    assert trimmed["names"] == ["a"] * 8
