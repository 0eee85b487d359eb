"""Engine with models as people build them: dropped batch dimensions, other dtypes, lazy layers, failing configs."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image

import batchjob
from batchjob.errors import InvalidJob
from batchjob.inference.engine import Engine
from batchjob.storage.reader import Reader

NET = """
import sys
import warnings

import torch
from torch import nn


class Net(nn.Module):
    def __init__(self, width=4):
        super().__init__()
        torch.manual_seed(0)
        self.conv = nn.Conv2d(3, width, 8)

    def forward(self, x):
        return self.conv(x).flatten(1)


class Squeezing(Net):
    def forward(self, x):
        return self.conv(x).squeeze()


class OnlyPairs(Net):
    def forward(self, x):
        return super().forward(x).view(2, len(x) // 2, -1).flatten(0, 1)


class OnlyOne(Net):
    def forward(self, x):
        return self.conv(x).view(1, -1)


class Named(Net):
    def forward(self, x):
        return {"logits": self.conv(x).squeeze(), "scale": torch.ones(())}


class Mixed(Net):
    def __init__(self):
        super().__init__()
        self.head = nn.Linear(4, 4).to(torch.bfloat16)

    def forward(self, x):
        return self.head(super().forward(x).to(torch.bfloat16)).float()


class Head(nn.Module):
    def __init__(self):
        super().__init__()
        self.linear = nn.Linear(192, 64)

    def forward(self, x):
        return self.linear(x.flatten(1))


class Leaving(Net):
    def forward(self, x):
        sys.exit("no licence")


class Lazy(nn.Module):
    def __init__(self):
        super().__init__()
        self.layers = nn.Sequential(nn.LazyConv2d(5, 3), nn.LazyBatchNorm2d(), nn.Flatten(), nn.LazyLinear(4))

    def forward(self, x):
        return self.layers(x)


def quantised():
    torch.backends.quantized.engine = "fbgemm" if "fbgemm" in torch.backends.quantized.supported_engines else "qnnpack"
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        head = torch.ao.quantization.quantize_dynamic(nn.Sequential(nn.Linear(3 * 64, 4)), {nn.Linear}, torch.qint8)
    return nn.Sequential(nn.Flatten(), head)


def half():
    return Net().half()


def bfloat16():
    return Net().bfloat16()


def double():
    return Net().double()


def raw_pixels(image):
    return image.float()


def pil_only(image):
    return torch.tensor(image.resize((8, 8)).getpixel((0, 0)))[:, None, None].expand(3, 8, 8).float()


def fails(image):
    return image.shape(3)
"""

Make = Callable[..., Engine]


@pytest.fixture
def make_engine(tmp_path: Path) -> Make:
    """Function that makes the engine of a model of `net.py`, with settings of the job."""
    (tmp_path / "net.py").write_text(NET)
    for number in range(4):
        Image.new("RGB", (8 + number, 8), (number * 60, 9, 9)).save(tmp_path / f"{number}.png")

    def make(target: str, task: str = "classification", **sections: Any) -> Engine:
        document = {
            "input": {"type": "prefix", "uri": str(tmp_path)},
            "model": {"type": "python", "target": f"net:{target}"},
            "preprocess": {"resize": [8, 8], "crop": None, "mean": None, "std": None},
            "task": {"type": task},
            "output": {"uri": str(tmp_path / "out")},
            **sections,
        }
        document["runtime"] = {"pool": "local", "device": "cpu", **sections.get("runtime", {})}
        job = batchjob.Job.deserialize(document, tmp_path, tmp_path)
        return Engine(job, Reader(), [str(tmp_path / f"{number}.png") for number in range(4)])

    return make


def predict(engine: Engine, rows: int) -> dict[str, torch.Tensor]:
    """Predict so many images in one call, with the config that the job asks for."""
    predictor = engine.build_predictor(engine.build_forward(engine.requested_config))
    pixels = torch.arange(rows * 192, dtype=torch.int64).remainder(255).to(torch.uint8).view(rows, 3, 8, 8)
    prediction = predictor(pixels).wait()
    assert not prediction.errors
    return {name: tensor for output in prediction.outputs for name, tensor in output.tensors.items()}


@pytest.mark.parametrize("target", ["Squeezing", "OnlyPairs"])
@pytest.mark.parametrize("batch_size", ["auto", 1])
def test_last_batch_of_one_is_predicted(make_engine: Make, target: str, batch_size: Any) -> None:
    settings = {"runtime": {"batch_size": batch_size}}
    single, plain = (predict(make_engine(name, "embedding", **settings), 1) for name in (target, "Net"))
    assert single.keys() == plain.keys()
    assert all(torch.allclose(single[name].float(), plain[name].float()) for name in plain)


def test_dropped_dimension_within_a_dict_is_seen(make_engine: Make) -> None:
    engine = make_engine("Named", "embedding", model={"type": "python", "target": "net:Named", "output": "logits"})
    assert all(len(tensor) == 1 for tensor in predict(engine, 1).values())


def test_model_for_one_image_runs_with_batches_of_one_only(make_engine: Make) -> None:
    assert len(next(iter(predict(make_engine("OnlyOne", runtime={"batch_size": 1}), 1).values()))) == 1
    with pytest.raises(InvalidJob):
        make_engine("OnlyOne").check_task()


@pytest.mark.parametrize(
    ("target", "runtime", "description"),
    [
        ("half", {}, "fp16 weights"),
        ("bfloat16", {}, "bf16 weights"),
        ("bfloat16", {"precision": "bf16"}, "bf16 weights"),
        ("bfloat16", {"precision": "bf16", "half_weights": "on"}, "bf16 weights"),
        ("bfloat16", {"precision": "fp32"}, "eager fp32"),
        ("double", {}, "fp64"),
        ("double", {"precision": "bf16"}, "bf16"),
        ("Mixed", {}, "eager fp32"),
        ("quantised", {}, "eager fp32"),
        ("Net", {}, "eager fp32"),
    ],
)
def test_module_runs_in_its_own_dtype(
    make_engine: Make, target: str, runtime: dict[str, Any], description: str
) -> None:
    engine = make_engine(target, runtime=runtime)
    engine.check_requested_config(4)
    assert engine.requested_config.description == description
    assert all(len(tensor) == 3 for tensor in predict(engine, 3).values())


def test_double_weights_get_double_pixels(make_engine: Make) -> None:
    engine = make_engine("double", "raw")
    forward = engine.build_forward(engine.loaded_config)
    pixels = torch.randint(0, 256, (2, 3, 8, 8), dtype=torch.uint8)
    with forward.disable_gradients():
        expected = engine.model.module((pixels / 255).double())
        assert torch.equal(forward(pixels), expected)


def test_lazy_layers_get_the_same_weights_in_every_process(make_engine: Make) -> None:
    first, second = make_engine("Lazy"), make_engine("Lazy")
    assert first.digest == second.digest != make_engine("Net").digest
    assert all(not weight.requires_grad for weight in first.model.module.parameters())
    assert torch.equal(*(next(iter(predict(engine, 2).values())) for engine in (first, second)))


@pytest.mark.parametrize("runtime", [{"quantize": "fp8"}, {"compile": "regional"}, {"precision": "tf32"}])
def test_config_that_fails_is_found_before_the_plan(make_engine: Make, runtime: dict[str, Any]) -> None:
    with pytest.raises(InvalidJob, match=r"runtime"):
        make_engine("Head", runtime=runtime).check_requested_config(2)


def test_exit_in_forward_is_a_sentence_with_its_line(make_engine: Make) -> None:
    with pytest.raises(InvalidJob, match=r"SystemExit: no licence \(net.py:\d+\)"):
        make_engine("Leaving").check_task()


def test_transform_that_needs_pil_images_is_found_by_trying(make_engine: Make) -> None:
    engine = make_engine("Net", preprocess={"transform": "net:pil_only"})
    assert engine.decided_values["preprocess.transform_input"] == "pil"
    assert engine.example_image.shape == (3, 8, 8)
    engine.adopt({"preprocess.transform_input": "pil"})
    assert engine.image_transform.resize_crop.user_transform is not None


def test_plan_decides_the_transforms_input(make_engine: Make) -> None:
    engine = make_engine("Net", "raw", preprocess={"transform": "net:raw_pixels"})
    before = engine.image_transform
    assert engine.decided_values["preprocess.transform_input"] == "tensor"
    with pytest.raises(InvalidJob, match="a PIL image in mode RGB"):
        engine.adopt({"preprocess.transform_input": "pil"})
    assert engine.image_transform is before
    named = make_engine("Net", preprocess={"transform": "net:raw_pixels", "transform_input": "tensor"})
    assert "preprocess.transform_input" not in named.decided_values


def test_transform_that_fails_on_all_images_is_told_as_that(make_engine: Make) -> None:
    with pytest.raises(InvalidJob) as caught:
        make_engine("Net", preprocess={"transform": "net:fails"})
    message = caught.value.message
    assert "preprocess.transform fails on each of the first 4 images that decodes: TypeError" in message
    assert "it is given a uint8 tensor [3, height, width]" in message
    assert "(net.py:" in message


def test_validate_finds_images_of_several_sizes(make_engine: Make, tmp_path: Path) -> None:
    locations = [str(tmp_path / f"{number}.png") for number in range(4)]
    engine = make_engine("Net", preprocess={"transform": "net:raw_pixels"})
    with pytest.raises(InvalidJob, match=r"3 of the first 4 images.*comes out as 3x8x9.*sizes: group"):
        engine.check_images(locations)
    tolerant = make_engine("Net", preprocess={"transform": "net:raw_pixels"}, errors={"max_rate": 1.0})
    assert len(tolerant.check_images(locations)) == 1
    grouped = make_engine("Net", preprocess={"transform": "net:raw_pixels", "sizes": "group"})
    assert grouped.check_images(locations) == []
    assert make_engine("Net").check_images(locations) == []
