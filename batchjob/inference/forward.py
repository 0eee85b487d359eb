"""Forward pass: a module on its device, under inference_mode and autocast, with normalisation in front."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any, Literal

import torch
from torch import nn

from batchjob.errors import InvalidJob, describe_error, is_out_of_memory
from batchjob.inference.execution_config import ExecutionConfig
from batchjob.inference.float32_precision import float32_precision
from batchjob.user_code import catch_exit, describe_fault

__all__ = ["ForwardOptions", "ForwardPass"]

GradMode = Literal["inference", "no_grad"]
Normalize = Callable[[torch.Tensor, torch.dtype], torch.Tensor]


@dataclass(frozen=True)
class ForwardOptions:
    """Options of a forward pass.

    Attributes:
        grad_mode: `inference`, or `no_grad` for models that fail under `torch.inference_mode`.
        input_kind: The module takes a `batch`, or a `list` of images.
        config: Precision and memory layout; compile mode and quantisation are already part of the module.
    """

    grad_mode: GradMode = "inference"
    input_kind: Literal["batch", "list"] = "batch"
    config: ExecutionConfig = field(default_factory=ExecutionConfig)


class ForwardPass:
    """A module on its device, called with images; torch's global settings are restored after each call.

    Args:
        module: Module in eval mode; it is moved to the device.
        normalize: Function from pixels on the device and a dtype to the module's input.
        device: Device to compute on.
        options: Gradient mode, kind of input, precision and layout.

    Raises:
        InvalidJob: The module does not fit into the device's memory.
    """

    def __init__(self, module: nn.Module, normalize: Normalize, device: torch.device, options: ForwardOptions) -> None:
        self.device, self.input_kind = device, options.input_kind
        self._module = _move_to_device(module, device)
        self._normalize = normalize
        self._options, self._config = options, options.config

    @property
    def config(self) -> ExecutionConfig:
        """Execution config of this forward pass."""
        return self._config

    def __call__(self, pixels: torch.Tensor | list[torch.Tensor]) -> Any:
        """Return the module's output for images on the device. Call it within `disable_gradients()`."""
        inputs = self._normalize_inputs(pixels)
        with self._autocast(), self._float32_precision(), catch_exit():
            return self._module(inputs)

    def with_module(self, module: nn.Module) -> ForwardPass:
        """Return the same forward pass around another form of its module, for example a compiled one."""
        return ForwardPass(module, self._normalize, self.device, self._options)

    def prepare_inputs(self, pixels: torch.Tensor) -> torch.Tensor:
        """Return the module's input for images `[n, c, h, w]` on any device. Call it within `disable_gradients()`."""
        inputs: torch.Tensor = self._normalize_inputs(pixels.to(self.device))
        return inputs

    def disable_gradients(self, grad_mode: GradMode | None = None) -> contextlib.AbstractContextManager[Any]:
        """Return the context, `torch.inference_mode` or `torch.no_grad`, in which all work on the device runs."""
        inference = (grad_mode or self._options.grad_mode) == "inference"
        return torch.inference_mode() if inference else torch.no_grad()

    def run_example(self, pixels: torch.Tensor) -> Any:
        """Run the module for the first time, on example images `[n, c, h, w]`, and return its output.

        Raises:
            InvalidJob: The module fails; the message names `runtime.grad_mode` if it fails in inference mode only.
        """
        try:
            with self.disable_gradients():
                return self._call_on_images(pixels)
        except InvalidJob:
            raise
        except Exception as error:
            raise self.explain_failure(pixels, error) from error

    def explain_failure(self, pixels: torch.Tensor, error: Exception) -> InvalidJob:
        """Return the error for a module that failed on example images, with its reason and the setting to change."""
        if self._options.grad_mode == "inference" and self._works_with_no_grad(pixels):
            return InvalidJob(
                f"model: it fails under torch.inference_mode ({describe_fault(error)}) and works under torch.no_grad; "
                "write runtime.grad_mode: no_grad"
            )
        shape = "x".join(map(str, pixels.shape))
        return InvalidJob(
            f"model: it fails on an example batch of shape {shape} on {self.device}: {describe_fault(error)}; "
            f"{_explain_layout(pixels)}"
        )

    def call_example(self, pixels: torch.Tensor) -> Any:
        """Run the module on example images `[n, c, h, w]`. Raises whatever the module raises."""
        with self.disable_gradients():
            return self._call_on_images(pixels)

    def _call_on_images(self, pixels: torch.Tensor) -> Any:
        moved = pixels.to(self.device)
        return self(list(moved) if self.input_kind == "list" else moved)

    def _works_with_no_grad(self, pixels: torch.Tensor) -> bool:
        try:
            with self.disable_gradients("no_grad"):
                self._call_on_images(pixels)
        except Exception:  # noqa: BLE001 - the first failure is the one that is reported
            return False
        return True

    def _normalize_inputs(self, pixels: torch.Tensor | list[torch.Tensor]) -> Any:
        """Normalise pixels, in the dtype and memory layout of the module's weights."""
        dtype = self._config.weight_dtype
        if isinstance(pixels, list):
            return [self._normalize(image[None], dtype)[0] for image in pixels]
        layout = torch.channels_last if self._config.channels_last else torch.contiguous_format
        # The layout changes before normalisation, which turns each byte into four.
        return self._normalize(pixels.contiguous(memory_format=layout), dtype)

    @property
    def _half_dtype(self) -> torch.dtype | None:
        return {"bf16": torch.bfloat16, "fp16": torch.float16}.get(self._config.precision)

    def _autocast(self) -> contextlib.AbstractContextManager[Any]:
        if self._half_dtype is None or self._config.half:
            return contextlib.nullcontext()
        return torch.autocast(self.device.type, dtype=self._half_dtype)

    @contextlib.contextmanager
    def _float32_precision(self) -> Iterator[None]:
        """Make `fp32` mean IEEE float32 and `tf32` mean TF32 on CUDA, convolutions included, and restore afterwards."""
        if self.device.type != "cuda":
            yield
            return
        cudnn: Any = torch.backends.cudnn
        is_half = self._half_dtype is not None
        benchmark = cudnn.benchmark
        cudnn.benchmark = self._config.cudnn_benchmark
        try:
            with contextlib.nullcontext() if is_half else float32_precision(tf32=self._config.precision == "tf32"):
                yield
        finally:
            cudnn.benchmark = benchmark


def _move_to_device(module: nn.Module, device: torch.device) -> nn.Module:
    try:
        return module.to(device)
    except (MemoryError, RuntimeError) as error:
        if not is_out_of_memory(error):
            raise
        raise InvalidJob(
            f"model: it does not fit into the memory of {device} ({_summarize(error)}); is something else using it? "
            "Else take a larger device (runtime.device), or a smaller model"
        ) from error


def _summarize(error: BaseException) -> str:
    return describe_error(error)[:320]


def _explain_layout(pixels: torch.Tensor) -> str:
    """Return the end of a message on a batch that a model fails on: what its shape says about the transform."""
    channels = {1, 3, 4}
    if pixels.ndim == 4 and pixels.shape[1] not in channels and pixels.shape[3] in channels:
        return "the transform puts channels last, and most models want them first: end it with .permute(2, 0, 1)"
    if pixels.ndim == 5 and pixels.shape[1] == 1:
        return "the transform makes a batch of each image: let it return the one image in it, [0]"
    return "look at model and preprocess"
