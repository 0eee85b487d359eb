"""The module on its device: what it is called with, under which modes, and what is said when it fails."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Literal

from batchjob.errors import InvalidJob, is_out_of_memory
from batchjob.inference.execution_config import ExecutionConfig

if TYPE_CHECKING:
    import torch
    from torch import nn

__all__ = ["ForwardOptions", "ForwardPass"]

GradMode = Literal["inference", "no_grad"]
Normalize = Callable[["torch.Tensor", "torch.dtype"], "torch.Tensor"]


@dataclass(frozen=True)
class ForwardOptions:
    """How a module is called.

    Attributes:
        grad_mode: `inference`, or `no_grad` for models that fail under inference mode.
        takes: a `batch`, or a `list` of images.
        recipe: precision and layout.
        batch_size: the number of images that every call must have; None for any.
    """

    grad_mode: GradMode = "inference"
    input_kind: Literal["batch", "list"] = "batch"
    config: ExecutionConfig = field(default_factory=ExecutionConfig)
    batch_size: int | None = None


class ForwardPass:
    """A module on its device with its numeric modes. The program's own torch settings stay as they are.

    Args:
        module: in eval mode; moved to the device, once.
        normalize: pixels on the device to the model's input.
        device: from `pick_device`.
        modes: how it is called.
    """

    def __init__(self, module: nn.Module, normalize: Normalize, device: torch.device, options: ForwardOptions) -> None:
        self.device, self.input_kind = device, options.input_kind
        self._module = _placed(module, device)
        self._normalize = normalize
        self._modes, self._recipe = options, options.config

    @property
    def config(self) -> ExecutionConfig:
        """By which it runs."""
        return self._recipe

    def __call__(self, pixels: torch.Tensor | list[torch.Tensor]) -> Any:
        """The module's output for images on the device. To be called under `modes()`."""
        values = self._values(pixels)
        with self._autocast(), self._backends():
            return self._module(values)

    def with_module(self, module: nn.Module) -> ForwardPass:
        """The same around a module that was made of this one."""
        return ForwardPass(module, self._normalize, self.device, self._modes)

    def prepare_inputs(self, pixels: torch.Tensor) -> torch.Tensor:
        """What the module is given for images `[n, c, h, w]`, wherever they lie. To be called under `modes()`."""
        values: torch.Tensor = self._values(pixels.to(self.device))
        return values

    def disable_gradients(self, grad_mode: GradMode | None = None) -> contextlib.AbstractContextManager[Any]:
        """The mode without gradients that everything from pixels to results runs in."""
        import torch

        inference = (grad_mode or self._modes.grad_mode) == "inference"
        return torch.inference_mode() if inference else torch.no_grad()

    def run_example(self, pixels: torch.Tensor) -> Any:
        """Run the module for the first time, on example images `[n, c, h, w]`.

        Raises:
            InvalidJob: it fails; where only inference mode is to blame, the sentence names `runtime.grad_mode`.
        """
        try:
            with self.disable_gradients():
                return self._on_example(pixels)
        except InvalidJob:
            raise
        except Exception as error:
            raise self.explain_failure(pixels, error) from error

    def explain_failure(self, pixels: torch.Tensor, error: Exception) -> InvalidJob:
        """What is said of a module that failed on example images: why, and what to write."""
        if self._modes.grad_mode == "inference" and self._works_with_no_grad(pixels):
            return InvalidJob(
                f"model: it fails under torch.inference_mode ({_brief(error)}) and works under torch.no_grad; "
                "write runtime.grad_mode: no_grad"
            )
        shape = "x".join(map(str, pixels.shape))
        return InvalidJob(
            f"model: it fails on an example batch of shape {shape} on {self.device}: {_brief(error)}; "
            "look at model and preprocess"
        )

    def _on_example(self, pixels: torch.Tensor) -> Any:
        moved = pixels.to(self.device)
        return self(list(moved) if self.input_kind == "list" else moved)

    def _works_with_no_grad(self, pixels: torch.Tensor) -> bool:
        try:
            with self.disable_gradients("no_grad"):
                self._on_example(pixels)
        except Exception:  # noqa: BLE001 - the first failure is the one that is told
            return False
        return True

    def _values(self, pixels: torch.Tensor | list[torch.Tensor]) -> Any:
        """What the module is given: normalised, in its precision and layout."""
        import torch

        dtype = self._dtype if self._recipe.half and self._dtype else torch.float32
        if isinstance(pixels, list):
            return [self._normalize(image[None], dtype)[0] for image in pixels]
        layout = torch.channels_last if self._recipe.channels_last else torch.contiguous_format
        # Before the normalisation, which makes four bytes of one.
        return self._normalize(pixels.contiguous(memory_format=layout), dtype)

    @property
    def _dtype(self) -> torch.dtype | None:
        import torch

        return {"bf16": torch.bfloat16, "fp16": torch.float16}.get(self._recipe.precision)

    def _autocast(self) -> contextlib.AbstractContextManager[Any]:
        import torch

        if self._dtype is None or self._recipe.half:
            return contextlib.nullcontext()
        return torch.autocast(self.device.type, dtype=self._dtype)

    @contextlib.contextmanager
    def _backends(self) -> Iterator[None]:
        """On CUDA `tf32` means tf32 and `fp32` means fp32, convolutions too (torch's own default there is tf32)."""
        import torch

        if self.device.type != "cuda":
            yield
            return
        cudnn: Any = torch.backends.cudnn
        matmul, conv = torch.backends.cuda.matmul, cudnn.conv
        before = matmul.fp32_precision, conv.fp32_precision, cudnn.benchmark
        if self._dtype is None:
            matmul.fp32_precision = conv.fp32_precision = "tf32" if self._recipe.precision == "tf32" else "ieee"
        cudnn.benchmark = self._recipe.cudnn_benchmark
        try:
            yield
        finally:
            matmul.fp32_precision, conv.fp32_precision, cudnn.benchmark = before


def _placed(module: nn.Module, device: torch.device) -> nn.Module:
    """The module on its device. Raises InvalidJob where it does not fit."""
    try:
        return module.to(device)
    except (MemoryError, RuntimeError) as error:
        if not is_out_of_memory(error):
            raise
        raise InvalidJob(
            f"model: it does not fit into the memory of {device} ({_brief(error)}); is something else using it? "
            "Else take a larger device (runtime.device), or a smaller model"
        ) from error


def _brief(error: BaseException) -> str:
    text = " ".join(str(error).split())
    return f"{type(error).__name__}: {text[:300]}"
