"""Optimized modules: outputs near those of the plain module, which is not changed."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn

from batchjob.errors import InvalidJob
from batchjob.inference.execution_config import ExecutionConfig
from batchjob.inference.optimize import optimize
from batchjob.inference.output_comparison import compare_outputs


class Block(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.layers = nn.Sequential(nn.Conv2d(width, width, 3, padding=1), nn.BatchNorm2d(width), nn.ReLU())

    def forward(self, x: torch.Tensor) -> Any:
        return x + self.layers(x)


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.ReLU())
        self.blocks = nn.ModuleList([Block(8), Block(8)])
        self.head = nn.Linear(8, 5)

    def forward(self, x: torch.Tensor) -> Any:
        x = self.stem(x)
        for block in self.blocks:
            x = block(x)
        return self.head(x.mean(dim=(2, 3)))


@pytest.fixture
def net() -> nn.Module:
    torch.manual_seed(0)
    optimized = Net()
    for norm in (part for part in optimized.modules() if isinstance(part, nn.BatchNorm2d)):
        nn.init.uniform_(norm.weight, 0.5, 2)
        nn.init.normal_(norm.get_buffer("running_mean"))
    return optimized.eval().requires_grad_(False)


PIXELS = torch.rand(4, 3, 24, 24, generator=torch.Generator().manual_seed(1))


@pytest.mark.parametrize(
    "config",
    [
        ExecutionConfig(),
        ExecutionConfig(fold=True),
        ExecutionConfig(channels_last=True),
        ExecutionConfig(fold=True, channels_last=True),
        ExecutionConfig(precision="bf16", half=True),
        ExecutionConfig(quantize="int8-dynamic"),
        ExecutionConfig(quantize="int8-static"),
    ],
    ids=lambda config: config.description,
)
def test_optimized_module_is_near_the_plain_one_which_is_unchanged(config: ExecutionConfig, net: nn.Module) -> None:
    before = copy.deepcopy(net.state_dict())
    with torch.inference_mode():
        pixels = PIXELS.clone()
        optimized = optimize(net, config, pixels)
        inputs = pixels.to(torch.bfloat16) if config.half else pixels
        comparison = compare_outputs(net(pixels), optimized(inputs))
    assert comparison.rejection(config) is None
    print(f"{config.description}: {comparison}")
    after = net.state_dict()
    assert all(torch.equal(after[key], value) and after[key].dtype == value.dtype for key, value in before.items())
    assert all(value.is_contiguous() for value in after.values()), "the memory layout is unchanged too"
    if config.fold:
        assert not any(isinstance(part, nn.BatchNorm2d) for part in optimized.modules())


def test_static_quantization_takes_any_batch_size(net: nn.Module) -> None:
    with torch.inference_mode():
        optimized = optimize(net, ExecutionConfig(quantize="int8-static"), PIXELS.clone())
        assert optimized(torch.rand(7, 3, 24, 24)).shape == (7, 5)


def test_compile_whole_module_and_regions(net: nn.Module, monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[type] = []

    def record_compile(module: nn.Module, **how: object) -> Callable[..., object]:
        if "options" in how:
            seen.append(type(module))
            assert how["options"]["freezing"] is True  # type: ignore[index]
        return module

    monkeypatch.setattr(torch, "compile", record_compile)
    optimize(net, ExecutionConfig(compile="max-autotune", freeze=True), PIXELS)
    assert seen == [Net]
    regional = optimize(net, ExecutionConfig(compile="regional"), PIXELS)
    assert [regional.get_submodule(f"blocks.{at}")._compiled_call_impl is None for at in (0, 1)] == [False] * 2
    assert net.get_submodule("blocks.0")._compiled_call_impl is None
    with pytest.raises(InvalidJob, match=r"runtime\.compile: regional"):
        optimize(nn.Sequential(nn.Linear(3, 3)), ExecutionConfig(compile="regional"), PIXELS)


def test_missing_package_is_named_with_its_installation(net: nn.Module, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(__import__("sys").modules, "torchao", None)
    with pytest.raises(InvalidJob, match=r"pip install 'torchao"):
        optimize(net, ExecutionConfig(quantize="int8-dynamic"), PIXELS)
