"""The user's own transform: kind of image that it gets, faults with file and line, and pickling."""

from __future__ import annotations

import pickle
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from torch import nn
from torchvision import transforms as v1
from torchvision.transforms import v2

from batchjob.errors import ImageError, InvalidJob
from batchjob.job.fingerprint import complete_defaults
from batchjob.models.python import PythonModel
from batchjob.preprocessing.settings import DecodeSettings, Preprocess, merge_preprocess
from batchjob.preprocessing.transforms import ImageTransform, ResizeCrop
from batchjob.preprocessing.user_transform import UserTransform, find_input
from batchjob.storage.reader import Reader

STEPS = """
import sys
import torch
from PIL import Image
from torch import nn
from torchvision import transforms as T

MEAN = [0.485, 0.456, 0.406]
compose = T.Compose([T.Resize(48), T.CenterCrop((40, 44)), T.ToTensor(), T.Normalize(MEAN, [0.2] * 3)])


class Steps:
    def __init__(self):
        self.resize, self.to_tensor = T.Resize((8, 8)), T.ToTensor()

    def __call__(self, image):
        return self.to_tensor(self.resize(image))


steps = Steps()
named = lambda image: image.float() / 255
nothing = lambda image: None


def colour_only(image):
    if (image[0] == image[1]).all():
        raise ValueError("it is grey")
    return image


def two(image, label):
    return image


def labelled(image):
    return image.float(), 3


def listed(image):
    return [image.float()]


def pixels(image):
    return image.numpy()


def picture(image):
    return Image.new("RGB", (4, 4))


def leaves(image):
    sys.exit("enough")


def build():
    return nn.Conv2d(3, 2, 4), T.Compose([T.Resize((8, 8)), T.ToTensor()])


def build_named():
    return nn.Conv2d(3, 2, 4), steps


def build_own():
    return nn.Conv2d(3, 2, 4), Steps()


def build_lambda():
    return nn.Conv2d(3, 2, 4), T.Compose([T.Lambda(lambda image: image), T.ToTensor()])
"""


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    (tmp_path / "net.py").write_text(STEPS)
    return tmp_path


class Holder:
    """Transform as users write it: a class that keeps its steps in a list."""

    def __init__(self) -> None:
        self.name = "holder"
        self.steps = [v1.CenterCrop(4), v1.ToTensor()]

    def __call__(self, image: Any) -> Any:
        return self.steps[1](self.steps[0](image))

    def method(self, image: Any) -> Any:
        return self(image)


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.to_image = v2.ToImage()

    def forward(self, image: Any) -> Any:
        return self.to_image(image)


@pytest.mark.parametrize(
    ("transform", "expected"),
    [
        (v1.Compose([v1.Resize(8), v1.ToTensor(), v1.Normalize([0.5] * 3, [0.5] * 3)]), "pil"),
        (v1.Compose([v1.Lambda(lambda image: image), v1.Compose([v1.Resize(8), v1.PILToTensor()])]), "pil"),
        (v2.Compose([v2.Resize(8), v2.ToImage(), v2.ToDtype(torch.float32, scale=True)]), "pil"),
        (v2.Compose([v2.RandomApply([v2.ColorJitter()]), v2.PILToTensor()]), "pil"),
        (v1.ToTensor(), "pil"),
        (Holder(), "pil"),
        (Holder().method, "pil"),
        (Block(), "pil"),
        (v1.Compose([v1.ToPILImage(), v1.Resize(8), v1.ToTensor()]), "tensor"),
        (v2.Compose([v2.Resize(8), v2.ToDtype(torch.float32, scale=True)]), "tensor"),
        (nn.Sequential(v1.Resize(8), v1.ConvertImageDtype(torch.float32)), "tensor"),
        (v1.Compose([v1.Resize(8), v1.CenterCrop(8)]), None),
        (lambda image: image, None),
        (len, None),
    ],
)
def test_steps_tell_the_kind_of_image(transform: Any, expected: str | None) -> None:
    assert find_input(transform) == expected


def test_compose_gives_the_bits_of_a_plain_loop(folder: Path, test_data: Path) -> None:
    scope: dict[str, Any] = {}
    exec(STEPS, scope)
    whole = ResizeCrop(Preprocess(transform="net:compose"), folder)
    transform = pickle.loads(pickle.dumps(ImageTransform(DecodeSettings(), whole, gray=False, apply_exif=False)))
    for path in sorted((test_data / "imagenet-sample").glob("*.JPEG"))[:12]:
        with Image.open(path) as image:
            expected = scope["compose"](image.convert("RGB"))
        assert torch.equal(transform(path.read_bytes()).pixels, expected)


@pytest.mark.parametrize(
    ("name", "type", "message"),
    [
        ("nothing", "type", "net:nothing returned None, not a tensor (no return?)"),
        ("labelled", "type", "net:labelled returned a tuple of 2, not a tensor; return its first item alone"),
        ("listed", "type", "net:listed returned a list of 1, not a tensor; return its first item alone"),
        ("pixels", "type", "net:pixels returned a numpy.ndarray, not a tensor; end it with torch.from_numpy(…)"),
        ("picture", "type", "net:picture returned a PIL.Image, not a tensor; end it with ToTensor()"),
        ("two", "TypeError", "missing 1 required positional argument: 'label'"),
        ("leaves", "SystemExit", "SystemExit: enough (net.py:"),
        ("colour_only", "ValueError", "ValueError: it is grey (net.py:"),
    ],
)
def test_fault_names_exception_file_and_line(folder: Path, name: str, type: str, message: str) -> None:
    transform = UserTransform(f"net:{name}", folder)
    with pytest.raises(ImageError) as caught:
        transform(torch.zeros(3, 4, 4, dtype=torch.uint8))
    assert (caught.value.stage, caught.value.type) == ("transform", type)
    assert message in caught.value.message


def test_fault_within_a_library_names_its_line(folder: Path) -> None:
    with pytest.raises(ImageError, match=r"TypeError: pic should be PIL.*\(torchvision/transforms/functional.py:\d+\)"):
        UserTransform("net:compose", folder, "tensor")(torch.zeros(3, 60, 60, dtype=torch.uint8))


def test_transform_without_steps_gets_a_tensor(folder: Path) -> None:
    transform = UserTransform("net:named", folder)
    assert (transform.image_kind, transform.is_certain) == ("tensor", False)
    assert float(transform(torch.full((3, 2, 2), 255, dtype=torch.uint8)).min()) == 1.0


@pytest.mark.parametrize(
    ("function", "target", "has_object"),
    [("build", "net:build", True), ("build_named", "net:steps", False), ("build_own", "net:build_own", True)],
)
def test_model_may_come_with_its_transform(folder: Path, function: str, target: str, has_object: bool) -> None:
    model = PythonModel(target=f"net:{function}").load(Reader(), folder)
    assert model.preprocess is not None
    assert (model.preprocess.transform, model.transform is not None) == (target, has_object)
    made = pickle.loads(pickle.dumps(ResizeCrop(model.preprocess, folder, model.transform)))
    pixels = np.random.default_rng(0).integers(0, 256, (20, 30, 3), dtype=np.uint8)
    expected = v1.ToTensor()(Image.fromarray(pixels).resize((8, 8), Image.Resampling.BILINEAR))
    assert torch.equal(made(pixels), expected)


def test_transform_that_cannot_be_pickled_is_refused(folder: Path) -> None:
    model = PythonModel(target="net:build_lambda").load(Reader(), folder)
    assert model.preprocess is not None
    with pytest.raises(InvalidJob, match=r"cannot be sent to the loader's processes.*to a name of the module"):
        ResizeCrop(model.preprocess, folder, model.transform)


def test_a_class_is_no_transform(folder: Path) -> None:
    with pytest.raises(InvalidJob, match=r"net:Steps is a class; name an object of it, like `steps = Steps\(\)`"):
        UserTransform("net:Steps", folder)


def test_input_can_be_named_and_earlier_plans_keep_tensors() -> None:
    assert merge_preprocess(Preprocess(transform="net:f", transform_input="pil"), None).transform_input == "pil"
    with pytest.raises(InvalidJob, match="there is no transform"):
        merge_preprocess(Preprocess(resize=8, crop=8, mean=None, std=None, transform_input="pil"), None)
    assert complete_defaults({"preprocess": {}}, {})["preprocess"]["transform_input"] == "tensor"
    # A default that an earlier version had counts as not set, and holds all the same.
    filled = Preprocess(transform="net:f").model_copy(update={"transform_input": "tensor"})
    unset = Preprocess.model_construct(filled.model_fields_set - {"transform_input"}, **dict(filled))
    assert merge_preprocess(unset, None).transform_input == "tensor"


def test_pipeline_of_albumentations_is_told_how_to_call_it(tmp_path: Path) -> None:
    (tmp_path / "steps.py").write_text(
        "class Compose:\n    __module__ = 'albumentations.core.composition'\n"
        "    def __call__(self, *, image): return {'image': image}\n"
        "train = Compose()\n"
    )
    with pytest.raises(InvalidJob, match=r"torch\.from_numpy\(train\(image=np\.asarray\(image\)\)\['image'\]\)"):
        UserTransform("steps:train", tmp_path)


def test_transform_that_returns_a_dict_is_told_its_keys(tmp_path: Path) -> None:
    (tmp_path / "steps.py").write_text("def processor(image): return {'pixel_values': [image], 'mask': None}\n")
    with pytest.raises(ImageError, match="return the value that the model gets, one of pixel_values, mask, and no"):
        UserTransform("steps:processor", tmp_path)(torch.zeros(3, 4, 4, dtype=torch.uint8))
