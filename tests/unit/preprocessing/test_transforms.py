"""Resize, crop and normalisation against torchvision's own presets; merge of settings; users' own transforms."""

from __future__ import annotations

import pickle
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torchvision.transforms import InterpolationMode, functional
from torchvision.transforms._presets import ImageClassification

from batchjob.errors import ImageError, InvalidJob
from batchjob.preprocessing.geometry import compute_image_geometry
from batchjob.preprocessing.normalize import Normalizer
from batchjob.preprocessing.settings import Preprocess, merge_preprocess
from batchjob.preprocessing.transforms import ResizeCrop
from batchjob.types import ImageInfo

MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
WEIGHTS_OWN = Preprocess(resize=256, crop=224, mean=MEAN, std=STD)


def make_pixels(height: int, width: int, channels: int = 3) -> np.ndarray:
    return np.random.default_rng(height * width).integers(0, 256, (height, width, channels), dtype=np.uint8)


def prepare(preprocess: Preprocess, pixels: np.ndarray) -> torch.Tensor:
    """Apply both halves of the preprocessing; return the model's input `[c, h, w]`."""
    return Normalizer(preprocess)(ResizeCrop(preprocess)(pixels)[None], torch.float32)[0]


@pytest.mark.parametrize("interpolation", ["bilinear", "bicubic", "nearest"])
@pytest.mark.parametrize("size", [(375, 500), (500, 375), (32, 32), (224, 224), (1, 1), (100, 999), (257, 255)])
def test_result_equals_torchvisions_preset(size: tuple[int, int], interpolation: Any) -> None:
    pixels = make_pixels(*size)
    preset = ImageClassification(
        crop_size=224, resize_size=256, mean=MEAN, std=STD, interpolation=InterpolationMode(interpolation)
    )
    image = torch.from_numpy(pixels).permute(2, 0, 1)
    preprocess = Preprocess(resize=256, crop=224, mean=MEAN, std=STD, interpolation=interpolation)
    transform = ResizeCrop(preprocess)
    result = transform(pixels)
    uint8 = functional.center_crop(
        functional.resize(image, [256], interpolation=InterpolationMode(interpolation), antialias=True), [224]
    )
    assert result.dtype == torch.uint8
    assert torch.equal(result, uint8)
    assert transform.size == (224, 224)
    assert result.shape == (3, 224, 224)
    torch.testing.assert_close(prepare(preprocess, pixels), preset(image), rtol=0, atol=1e-6)
    torch.testing.assert_close(prepare(preprocess, pixels), preset(image.contiguous()), rtol=0, atol=1e-6)


def test_images_smaller_than_the_crop_are_padded() -> None:
    pixels = make_pixels(30, 45)
    result = ResizeCrop(Preprocess(crop=(40, 41)))(pixels)
    assert torch.equal(result, functional.center_crop(torch.from_numpy(pixels).permute(2, 0, 1), [40, 41]))
    assert result.shape == (3, 40, 41)


@pytest.mark.parametrize(
    ("preprocess", "size", "out"),
    [
        (Preprocess(), None, (20, 30)),
        (Preprocess(resize=10), None, (10, 15)),
        (Preprocess(resize=(12, 13)), (12, 13), (12, 13)),
        (Preprocess(resize=10, crop=(8, 9)), (8, 9), (8, 9)),
    ],
)
def test_output_size_is_known_where_it_is_fixed(
    preprocess: Preprocess, size: tuple[int, int] | None, out: tuple[int, int]
) -> None:
    transform = ResizeCrop(preprocess)
    assert transform.size == size
    assert transform(make_pixels(20, 30)).shape[1:] == out


def test_too_narrow_image_is_refused_before_it_uses_memory() -> None:
    with pytest.raises(ImageError, match="5000x1 is too narrow") as caught:
        ResizeCrop(WEIGHTS_OWN)(make_pixels(1, 5000))
    assert (caught.value.stage, caught.value.type) == ("transform", "too_large")


def test_channel_order_scale_and_moments() -> None:
    pixels = make_pixels(4, 5)
    plain = torch.from_numpy(pixels).permute(2, 0, 1).float()
    assert torch.equal(prepare(Preprocess(scale="none"), pixels), plain)
    assert torch.equal(prepare(Preprocess(channels="bgr"), pixels), plain.flip(0) / 255)
    caffe = Preprocess(channels="bgr", scale="none", mean=(103.9, 116.8, 123.7), std=(1.0, 1.0, 1.0))
    torch.testing.assert_close(
        prepare(caffe, pixels), plain.flip(0) - torch.tensor([103.9, 116.8, 123.7]).view(3, 1, 1), rtol=0, atol=1e-5
    )
    gray = Preprocess(channels="gray", mean=(0.5,), std=(0.25,))
    assert prepare(gray, make_pixels(4, 5, 1)).shape == (1, 4, 5)
    uint8 = torch.zeros(2, 3, 4, 4, dtype=torch.uint8)
    assert Normalizer(WEIGHTS_OWN)(uint8, torch.bfloat16).dtype == torch.bfloat16
    assert uint8.sum() == 0, "the batch itself is unchanged"


TRANSFORMS = """
import torch
from beside import HALF

def halved(image):
    assert image.dtype == torch.uint8 and image.shape[0] == 3
    return image.double() * HALF

def same(image):
    return image

def broken(image):
    raise KeyError("no such key")

def text(image):
    return "text"

def counts(image):
    return image.int()

number = 3
"""


@pytest.fixture
def job_folder(tmp_path: Path) -> Path:
    (tmp_path / "steps.py").write_text(TRANSFORMS)
    (tmp_path / "beside.py").write_text("HALF = 0.5\n")
    return tmp_path


def test_output_of_user_transform_is_the_model_input(job_folder: Path) -> None:
    preprocess = Preprocess(transform="steps:halved")
    transform = pickle.loads(pickle.dumps(ResizeCrop(preprocess, job_folder)))
    pixels = make_pixels(4, 5)
    result = transform(pixels)
    assert transform.size is None
    assert result.dtype == torch.float32
    assert torch.equal(result, torch.from_numpy(pixels).permute(2, 0, 1) * 0.5)
    assert Normalizer(preprocess)(result[None], torch.float32) is not None
    assert torch.equal(Normalizer(preprocess)(result[None], torch.float32)[0], result)
    same = ResizeCrop(Preprocess(transform="steps:same"), job_folder)(pixels)
    assert Normalizer(preprocess)(same[None], torch.float32).dtype == torch.uint8


@pytest.mark.parametrize(
    ("name", "error_type", "words"),
    [("broken", "KeyError", "no such key"), ("text", "type", "str"), ("counts", "type", "int")],
)
def test_failing_user_transform_is_an_image_error(job_folder: Path, name: str, error_type: str, words: str) -> None:
    with pytest.raises(ImageError, match=words) as caught:
        ResizeCrop(Preprocess(transform=f"steps:{name}"), job_folder)(make_pixels(4, 5))
    assert (caught.value.stage, caught.value.type) == ("transform", error_type)


@pytest.mark.parametrize("target", ["steps:absent", "nothere:f", "steps:number"])
def test_missing_user_transform_is_an_invalid_job(job_folder: Path, target: str) -> None:
    with pytest.raises(InvalidJob):
        ResizeCrop(Preprocess(transform=target), job_folder)


def test_resize_crop_pickles() -> None:
    transform = pickle.loads(pickle.dumps(ResizeCrop(WEIGHTS_OWN)))
    assert transform.size == (224, 224)
    assert torch.equal(transform(make_pixels(300, 400)), ResizeCrop(WEIGHTS_OWN)(make_pixels(300, 400)))


def test_given_keys_override_and_absent_keys_keep_the_weights_own() -> None:
    assert merge_preprocess(None, WEIGHTS_OWN) == WEIGHTS_OWN
    assert merge_preprocess(Preprocess(exif="apply"), WEIGHTS_OWN) == WEIGHTS_OWN.model_copy(update={"exif": "apply"})
    assert merge_preprocess(Preprocess(resize=None), WEIGHTS_OWN) == WEIGHTS_OWN.model_copy(update={"resize": None})
    assert merge_preprocess(Preprocess(mean=None, std=None), WEIGHTS_OWN).mean is None
    assert merge_preprocess(Preprocess(resize=None, crop=None, mean=MEAN, std=STD), None) == Preprocess(
        mean=MEAN, std=STD
    )


def test_transform_replaces_the_steps() -> None:
    own = Preprocess(transform="net:prepare")
    assert merge_preprocess(Preprocess(transform="net:other"), WEIGHTS_OWN) == Preprocess(transform="net:other")
    assert merge_preprocess(Preprocess(transform="net:other", exif="apply"), None).exif == "apply"
    assert merge_preprocess(None, own) == own
    assert merge_preprocess(Preprocess(exif="apply"), own).transform == "net:prepare"
    assert merge_preprocess(Preprocess(resize=8, crop=8, mean=None, std=None), own).transform is None


@pytest.mark.parametrize(
    ("job", "own", "words"),
    [
        (None, None, "resize, crop, mean and std"),
        (Preprocess(resize=None, mean=MEAN), None, "give crop and std"),
        (Preprocess(crop=8), Preprocess(transform="net:prepare"), "resize, mean and std"),
        (Preprocess(transform="net:f", crop=8), WEIGHTS_OWN, "take crop away"),
        (Preprocess(mean=None), WEIGHTS_OWN, "std is given and mean is null"),
        (Preprocess(channels="gray"), WEIGHTS_OWN, "preprocess.mean: has 3 values, but channels: gray needs 1"),
        (Preprocess(std=(1.0, 0.0, 1.0)), WEIGHTS_OWN, "preprocess.std"),
        (Preprocess(crop=0), WEIGHTS_OWN, "preprocess.crop"),
    ],
)
def test_contradicting_keys_are_named(job: Preprocess | None, own: Preprocess | None, words: str) -> None:
    with pytest.raises(InvalidJob) as caught:
        merge_preprocess(job, own)
    assert words in caught.value.message
    assert caught.value.message.startswith("preprocess")


@pytest.mark.parametrize("size", [(300, 400), (50, 30), (224, 224), (31, 999)])
@pytest.mark.parametrize(
    "preprocess",
    [
        Preprocess(resize=64, crop=48),
        Preprocess(resize=(40, 80)),
        Preprocess(crop=(100, 60)),
        Preprocess(),
        Preprocess(resize=32, sizes="group", pad=32),
    ],
    ids=["resize-crop", "resize", "crop", "nothing", "pad"],
)
def test_geometry_maps_the_input_back_to_the_image(size: tuple[int, int], preprocess: Preprocess) -> None:
    # A bright square, found in the model's input, must map back to its place in the image.
    pixels = np.zeros((*size, 3), np.uint8)
    height, width = size
    top, left = height // 2 - 10, width // 2 - 10
    pixels[top : top + 20, left : left + 20] = 255
    result = ResizeCrop(preprocess)(pixels)
    rows, columns = (result[0] > 127).nonzero(as_tuple=True)
    geometry = compute_image_geometry(preprocess, ImageInfo(None, width, height))
    if preprocess.pad is None:
        assert result.shape[1:] == (geometry.input_height, geometry.input_width)
    else:
        assert not result[:, geometry.input_height :].any()
        assert [side % 32 for side in result.shape[1:]] == [0, 0]
    back_x = [(value + geometry.left) / geometry.scale_x for value in (columns.min().item(), columns.max().item() + 1)]
    back_y = [(value + geometry.top) / geometry.scale_y for value in (rows.min().item(), rows.max().item() + 1)]
    assert back_x == pytest.approx([left, left + 20], abs=1 / geometry.scale_x + 0.01)
    assert back_y == pytest.approx([top, top + 20], abs=1 / geometry.scale_y + 0.01)


def test_geometry_of_a_rotated_image_is_that_of_the_upright_image() -> None:
    geometry = compute_image_geometry(Preprocess(), ImageInfo(None, 40, 30, axes_swapped=True))
    assert (geometry.width, geometry.height, geometry.input_width) == (30, 40, 30)


def test_pad_needs_sizes_group() -> None:
    with pytest.raises(InvalidJob, match=r"preprocess\.sizes: group"):
        merge_preprocess(Preprocess(pad=32), WEIGHTS_OWN)


def test_channels_last_images_are_normalised_to_the_same_bits() -> None:
    merged = Preprocess(resize=None, crop=None, mean=(0.485, 0.456, 0.406), std=(0.229, 0.224, 0.225))
    normalize = Normalizer(merged)
    for side in (7, 32, 7):
        pixels = torch.randint(0, 256, (3, 3, side, side + 1), dtype=torch.uint8)
        last = normalize(pixels.contiguous(memory_format=torch.channels_last), torch.float32)
        assert torch.equal(last, normalize(pixels, torch.float32))
        assert last.is_contiguous(memory_format=torch.channels_last)
