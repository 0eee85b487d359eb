"""`type: python`: models and preprocessing returned by a function beside the job file."""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import pytest
import torch
from PIL import Image

import batchjob
from batchjob.errors import InvalidJob, Unavailable
from batchjob.models.loaded_model import LoadedModel
from batchjob.models.python import PythonModel
from batchjob.preprocessing.settings import Preprocess
from batchjob.storage.reader import Reader

READER = Reader()


USER_SOURCE = """
import torch, torchvision
from torch import nn

def flip(pixels):
    return pixels.flip(-1).float()

def bare():
    return nn.Linear(2, 2)

def settings():
    return nn.Linear(2, 2), {"resize": [8, 8], "crop": None, "mean": [0, 0, 0], "std": [1, 1, 1], "channels": "bgr"}

def wrong():
    return nn.Linear(2, 2), {"resise": 8, "scale": "percent"}

def preset():
    return nn.Linear(2, 2), torchvision.models.ResNet50_Weights.IMAGENET1K_V2.transforms()

def function():
    return nn.Linear(2, 2), flip

def offline():
    raise ConnectionResetError("no route")

def nothing():
    nn.Linear(2, 2)

def number():
    return nn.Linear(2, 2), 0.5

def three():
    return nn.Linear(2, 2), {}, {}

def meta():
    return nn.Linear(2, 2, device="meta")

def change_torch_state():
    torch.manual_seed(5)
    torch.set_default_dtype(torch.float64)
    torch.set_grad_enabled(False)
    return nn.Sequential(nn.Linear(2, 2, dtype=torch.float32), nn.Dropout())
"""


@pytest.fixture
def load(tmp_path: Path) -> Callable[[str], LoadedModel]:
    """Function that loads the model of a function in `user.py`."""
    (tmp_path / "user.py").write_text(USER_SOURCE)
    return lambda name: PythonModel(target=f"user:{name}").load(READER, tmp_path)


def test_preprocessing_is_none_settings_a_preset_or_a_function(load: Callable[[str], LoadedModel]) -> None:
    assert load("bare").preprocess is None
    settings = load("settings").preprocess
    assert settings is not None
    assert settings.resize == (8, 8)
    assert settings.channels == "bgr"
    assert "scale" not in settings.model_fields_set
    assert load("preset").preprocess == Preprocess(
        resize=232, crop=224, mean=(0.485, 0.456, 0.406), std=(0.229, 0.224, 0.225)
    )
    assert load("function").preprocess == Preprocess(transform="user:flip")


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("wrong", "resise: Extra inputs are not permitted"),
        ("number", "returned a float as preprocessing"),
        ("three", "returned a tuple; it must return a torch.nn.Module, or a pair"),
        ("flip", "it takes (pixels)"),
        ("meta", "cannot be brought to the CPU"),
        ("absent", "absent"),
    ],
)
def test_wrong_return_value_is_explained(name: str, message: str, load: Callable[[str], LoadedModel]) -> None:
    with pytest.raises(InvalidJob) as caught:
        load(name)
    assert message in caught.value.message


def test_network_errors_are_temporary(load: Callable[[str], LoadedModel]) -> None:
    with pytest.raises(Unavailable, match="no route"):
        load("offline")
    with pytest.raises(InvalidJob, match=r"returned None \(no return\?\)"):
        load("nothing")


def test_check_finds_a_missing_module(tmp_path: Path) -> None:
    (tmp_path / "user.py").write_text(USER_SOURCE)
    with pytest.raises(InvalidJob, match=r"usr\.py: not there, for 'usr:bare'; did you mean 'user'"):
        PythonModel(target="usr:bare").check(READER, tmp_path)
    PythonModel(target="user:bare").check(READER, tmp_path)


def test_random_layers_do_not_depend_on_the_global_seed(load: Callable[[str], LoadedModel]) -> None:
    torch.manual_seed(1)
    first = load("bare")
    torch.manual_seed(2)
    assert load("bare").digest == first.digest


def test_module_is_ready_and_torch_state_is_restored(load: Callable[[str], LoadedModel]) -> None:
    before = torch.get_rng_state()
    with torch.inference_mode():
        module = load("change_torch_state").module
        assert torch.is_inference_mode_enabled()
    assert torch.get_rng_state().equal(before)
    assert torch.get_default_dtype() is torch.float32
    assert torch.is_grad_enabled()
    assert not any(layer.training for layer in module.modules())
    assert not any(parameter.requires_grad or parameter.is_inference() for parameter in module.parameters())


PAIR = """
import torch
from torch import nn
from torchvision import transforms as T


class Net(nn.Module):
    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.conv = nn.Conv2d(3, 6, 32)

    def forward(self, x):
        return self.conv(x).squeeze()


def build():
    steps = T.Compose([T.Resize(40), T.CenterCrop(32), T.ToTensor(), T.Normalize([0.5] * 3, [0.25] * 3)])
    return Net(), steps
"""


def test_run_with_the_tutorials_own_compose_equals_the_plain_loop(test_data: Path, tmp_path: Path) -> None:
    (tmp_path / "net.py").write_text(PAIR)
    paths = sorted((test_data / "imagenet-sample").glob("*.JPEG"))[:5]
    (tmp_path / "images.csv").write_text("\n".join(["image", *map(str, paths)]) + "\n")
    (tmp_path / "job.yaml").write_text(
        "input: {type: manifest, uri: images.csv, uri_column: image}\n"
        "model: {type: python, target: 'net:build'}\n"
        "task: {type: embedding}\n"
        "runtime: {pool: local, device: cpu, batch_size: 4, loader: {processes: 0}}\n"
        "output: {uri: out}\n"
    )
    result = batchjob.run(batchjob.Job.from_file(tmp_path / "job.yaml"))
    assert (result.status, result.predicted) == ("complete", 5)
    scope: dict[str, Any] = {}
    exec(PAIR, scope)
    module, steps = scope["build"]()
    rows = pq.read_table(tmp_path / "out" / "predictions")["embedding"].to_pylist()
    for path, row in zip(paths, rows, strict=True):
        with Image.open(path) as image, torch.inference_mode():
            expected = module(steps(image.convert("RGB"))[None])
        assert torch.allclose(torch.tensor(row), expected, atol=1e-6)


def test_argument_that_the_function_does_not_take_is_named(tmp_path: Path) -> None:
    (tmp_path / "user.py").write_text("def build(classes, *, width=1): pass\n")
    for arguments, advice in (({"clases": 5}, "did you mean 'classes'?"), ({"seed": 5}, "leave it out of")):
        with pytest.raises(InvalidJob, match=rf"takes no '\w+'; it takes \(classes, width=1\); {re.escape(advice)}"):
            PythonModel(target="user:build", arguments=arguments).load(READER, tmp_path)
