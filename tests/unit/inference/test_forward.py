"""Forward pass: input of the module in each precision and layout, global settings, and errors of the first run."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import nn

from batchjob.errors import InvalidJob
from batchjob.inference.execution_config import ExecutionConfig
from batchjob.inference.float32_precision import float32_precision
from batchjob.inference.forward import ForwardOptions, ForwardPass

CPU, CUDA = torch.device("cpu"), torch.device("cuda")
PIXELS = torch.arange(2 * 3 * 4 * 4, dtype=torch.uint8).view(2, 3, 4, 4)


def halve(pixels: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """Stand for the normalisation: a calculation that is exact in every precision."""
    return pixels.to(dtype) / 2


class InputRecorder(nn.Module):
    """Module that returns its input and records its type and layout, and the settings that hold around it."""

    def __init__(self) -> None:
        super().__init__()
        self.input = torch.empty(0)
        self.autocast: torch.dtype | None = None
        self.inference_mode = False

    def forward(self, images: Any) -> Any:
        self.input = images
        self.autocast = torch.get_autocast_dtype("cpu") if torch.is_autocast_enabled("cpu") else None
        self.inference_mode = torch.is_inference_mode_enabled()
        return images


class Raising(nn.Module):
    def __init__(self, error: Exception) -> None:
        super().__init__()
        self.error = error

    def forward(self, images: Any) -> Any:
        raise self.error


class ModuleOnHost(nn.Module):
    """Module that stays in host memory whatever device it is moved to, and reads the float32 settings of CUDA."""

    def __init__(self, error: Exception | None = None) -> None:
        super().__init__()
        self.error = error
        self.settings: tuple[Any, ...] = ()

    def to(self, *_: Any, **__: Any) -> Any:
        return self

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        self.settings = read_cuda_settings()
        if self.error is not None:
            raise self.error
        return images


def read_cuda_settings() -> tuple[Any, ...]:
    """Return the float32 precision of matrix products and convolutions, and cuDNN's benchmark mode."""
    cudnn: Any = torch.backends.cudnn
    return torch.backends.cuda.matmul.fp32_precision, cudnn.conv.fp32_precision, cudnn.benchmark


def write_cuda_settings(matmul: str, conv: str, benchmark: bool) -> None:
    cudnn: Any = torch.backends.cudnn
    torch.backends.cuda.matmul.fp32_precision, cudnn.conv.fp32_precision, cudnn.benchmark = matmul, conv, benchmark


def make_forward(module: nn.Module, device: torch.device = CPU, **config: Any) -> ForwardPass:
    return ForwardPass(module, halve, device, ForwardOptions(config=ExecutionConfig(**config)))


# -- the module's input ----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("precision", "half", "input_dtype", "autocast"),
    [
        ("fp32", False, torch.float32, None),
        ("bf16", False, torch.float32, torch.bfloat16),
        ("bf16", True, torch.bfloat16, None),
        ("fp16", False, torch.float32, torch.float16),
        ("fp16", True, torch.float16, None),
    ],
)
def test_half_weights_get_half_inputs_in_place_of_autocast(
    precision: str, half: bool, input_dtype: torch.dtype, autocast: torch.dtype | None
) -> None:
    module = InputRecorder()
    make_forward(module, precision=precision, half=half)(PIXELS)
    assert (module.input.dtype, module.autocast) == (input_dtype, autocast)


@pytest.mark.parametrize("channels_last", [False, True])
def test_images_come_in_the_memory_layout_of_the_config(channels_last: bool) -> None:
    module = InputRecorder()
    make_forward(module, channels_last=channels_last)(PIXELS)
    assert module.input.is_contiguous(memory_format=torch.channels_last) == channels_last
    assert torch.equal(module.input, PIXELS / 2)


def test_images_of_a_list_are_normalized_one_by_one() -> None:
    module = InputRecorder()
    images = [PIXELS[0], PIXELS[1, :, :2]]
    outputs = make_forward(module, precision="bf16", half=True)(images)
    assert [image.dtype for image in outputs] == [torch.bfloat16] * 2
    assert [image.tolist() for image in outputs] == [(image / 2).tolist() for image in images]


def test_prepared_inputs_are_those_that_the_module_gets() -> None:
    module = InputRecorder()
    forward = make_forward(module, channels_last=True)
    prepared = forward.prepare_inputs(PIXELS)
    forward(PIXELS)
    assert torch.equal(prepared, module.input)
    assert prepared.stride() == module.input.stride()


def test_other_form_of_the_module_runs_with_the_same_options() -> None:
    module = InputRecorder()
    forward = make_forward(nn.Identity(), precision="fp16", half=True).with_module(module)
    assert torch.equal(forward(PIXELS), PIXELS.half() / 2)
    assert forward.config == ExecutionConfig(precision="fp16", half=True)


def test_gradient_mode_of_one_call_replaces_that_of_the_options() -> None:
    module = InputRecorder()
    forward = make_forward(module)
    with forward.disable_gradients("no_grad"):
        output = forward(PIXELS)
    assert not module.inference_mode
    assert not output.is_inference()


# -- global settings on CUDA -----------------------------------------------------------------------------------


@pytest.fixture
def cuda_settings() -> Iterator[tuple[Any, ...]]:
    """Settings of the user's program that differ from those of every config below."""
    before = read_cuda_settings()
    with float32_precision(tf32=False):  # restores the flags of both of torch's APIs
        write_cuda_settings("tf32", "none", False)
        yield read_cuda_settings()
        write_cuda_settings(*before)


@pytest.mark.parametrize(
    ("config", "expected"),
    [
        ({}, ("ieee", "ieee", False)),
        ({"cudnn_benchmark": True}, ("ieee", "ieee", True)),
        ({"precision": "tf32"}, ("tf32", "tf32", False)),
    ],
)
def test_float32_on_cuda_is_as_precise_as_the_config_says(
    cuda_settings: tuple[Any, ...], config: dict[str, Any], expected: tuple[Any, ...]
) -> None:
    module = ModuleOnHost()
    make_forward(module, CUDA, **config)(PIXELS)
    assert module.settings == expected
    assert read_cuda_settings() == cuda_settings


def test_half_precision_on_cuda_leaves_the_float32_settings(cuda_settings: tuple[Any, ...]) -> None:
    module = ModuleOnHost()
    make_forward(module, CUDA, precision="bf16", half=True)(PIXELS)
    assert module.settings == cuda_settings


def test_settings_are_restored_after_an_error(cuda_settings: tuple[Any, ...]) -> None:
    module = ModuleOnHost(RuntimeError("broken"))
    with pytest.raises(RuntimeError, match="broken"):
        make_forward(module, CUDA, cudnn_benchmark=True)(PIXELS)
    assert module.settings == ("ieee", "ieee", True)
    assert read_cuda_settings() == cuda_settings


# -- errors ----------------------------------------------------------------------------------------------------


def test_error_of_the_job_in_the_first_run_is_raised_unchanged() -> None:
    error = InvalidJob("model: it takes batches of 8")
    with pytest.raises(InvalidJob) as caught:
        make_forward(Raising(error)).run_example(PIXELS)
    assert caught.value is error


def test_error_of_the_first_run_is_one_short_line() -> None:
    long_text = "size mismatch:\n    " + "wrong " * 200
    with pytest.raises(InvalidJob, match="on an example batch of shape 2x3x4x4 on cpu: ValueError: size") as caught:
        make_forward(Raising(ValueError(long_text))).run_example(PIXELS)
    assert "\n" not in caught.value.message
    assert len(caught.value.message) < 450


def test_error_while_moving_the_module_is_explained_only_if_memory_ran_out() -> None:
    class Immovable(nn.Module):
        def to(self, *_: Any, **__: Any) -> Any:
            raise RuntimeError("CUDA driver version is insufficient")

    with pytest.raises(RuntimeError, match="driver version is insufficient"):
        make_forward(Immovable())


@pytest.mark.parametrize(
    ("shape", "advice"),
    [
        ((2, 32, 32, 3), "the transform puts channels last"),
        ((2, 1, 3, 32, 32), "the transform makes a batch of each image"),
        ((2, 3, 32, 3), "look at model and preprocess"),
        ((2, 4, 4), "look at model and preprocess"),
    ],
)
def test_shape_of_a_batch_tells_what_is_wrong_with_the_transform(shape: tuple[int, ...], advice: str) -> None:
    forward = ForwardPass(nn.Conv2d(7, 1, 3), halve, CPU, ForwardOptions())
    with pytest.raises(InvalidJob, match=advice):
        forward.run_example(torch.zeros(shape, dtype=torch.uint8))
