"""The forward pass: pixels to the device, `inference_mode`, autocast, small tensors back; out of memory: halve."""

from __future__ import annotations

import contextlib
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal, Protocol

from batchjob.errors import AttemptFailed, InvalidJob
from batchjob.records import Fault

if TYPE_CHECKING:
    import torch
    from torch import nn

__all__ = ["Forward", "Postprocess", "Predicted", "Predictor", "example_output", "pick_device", "pick_precision"]

GradMode = Literal["inference", "no_grad"]
Normalize = Callable[["torch.Tensor", "torch.dtype"], "torch.Tensor"]

_PRECISIONS = ("fp32", "tf32", "bf16", "fp16")
_OUT_OF_MEMORY = re.compile(r"out of memory|not enough memory|can't allocate memory|ALLOC_FAILED", re.IGNORECASE)
_CALM = 128  # pieces without trouble after which a larger one is tried again


class Postprocess(Protocol):
    """What the forward loop needs of a task."""

    def on_device(self, output: Any) -> dict[str, torch.Tensor]:
        """The model's output as small tensors, first dimension `n`."""

    def faults(self, tensors: dict[str, torch.Tensor]) -> Sequence[Fault | None]:
        """What is wrong with each row, on the host."""


@dataclass(frozen=True)
class Predicted:
    """A batch's results.

    Attributes:
        tensors: on the host, one row per image of the batch; rows with a fault hold nothing of meaning.
        faults: one per image; None where it worked.
    """

    tensors: dict[str, torch.Tensor]
    faults: tuple[Fault | None, ...]


def pick_device(name: str) -> torch.device:
    """The device a job asks for. `auto` takes CUDA, then MPS, then the CPU; a name is never replaced.

    Raises:
        InvalidJob: it is not there, or not known.
    """
    import torch

    if name == "auto":
        if torch.cuda.is_available():
            return torch.device("cuda")
        return torch.device("mps" if torch.backends.mps.is_available() else "cpu")
    if not re.fullmatch(r"cpu|mps|cuda(:\d+)?", name):
        raise InvalidJob(f"runtime.device: {name!r} is not known; write auto, cpu, cuda, cuda:N or mps")
    device = torch.device(name)
    if device.type == "cuda":
        _check_cuda(device)
    if device.type == "mps" and not torch.backends.mps.is_available():
        raise InvalidJob("runtime.device: mps is not there; write runtime.device=auto or cpu")
    return device


def _check_cuda(device: torch.device) -> None:
    import torch

    if not torch.cuda.is_available():
        why = "this torch is built without CUDA" if torch.version.cuda is None else "no GPU or driver is visible"
        raise InvalidJob(f"runtime.device: {device} is not there ({why}); write runtime.device=auto or cpu")
    count = torch.cuda.device_count()
    if (device.index or 0) >= count:
        raise InvalidJob(f"runtime.device: {device} is not there, only cuda:0 to cuda:{count - 1}")


def pick_precision(name: str, device: torch.device) -> str:
    """The precision a job asks for; `auto` is bf16 on CUDA devices that compute in it, else fp16, and fp32 elsewhere.

    Raises:
        InvalidJob: the device cannot compute in it.
    """
    import torch

    if name == "auto":
        if device.type != "cuda":
            return "fp32"
        with torch.cuda.device(device):
            return "bf16" if torch.cuda.is_bf16_supported(including_emulation=False) else "fp16"
    if name not in _PRECISIONS:
        raise InvalidJob(f"runtime.precision: {name!r} is not known; write auto, {', '.join(_PRECISIONS)}")
    if name == "tf32" and device.type != "cuda":
        raise InvalidJob(f"runtime.precision: tf32 is for CUDA devices, this one is {device}; write fp32 or auto")
    return name


class Forward:
    """A module on its device with its numeric modes. The program's own torch settings stay as they are.

    Args:
        module: in eval mode; moved to the device, once.
        normalize: pixels on the device to the model's input.
        device: from `pick_device`.
        precision: from `pick_precision`; bf16 and fp16 are autocast, the weights stay as they are.
        grad_mode: `inference`, or `no_grad` for models that fail under inference mode.
    """

    def __init__(
        self, module: nn.Module, normalize: Normalize, device: torch.device, precision: str, grad_mode: GradMode
    ) -> None:
        self.device = device
        self._module = module.to(device)
        self._normalize = normalize
        self._precision, self._grad_mode = precision, grad_mode

    def __call__(self, pixels: torch.Tensor) -> Any:
        """The module's output on the device. To be called under `modes()`."""
        import torch

        moved = pixels.to(self.device, non_blocking=True)
        values = self._normalize(moved, torch.float32)
        with self._autocast(), self._matrix_precision():
            return self._module(values)

    def modes(self, grad_mode: GradMode | None = None) -> contextlib.AbstractContextManager[Any]:
        """The mode without gradients that everything from pixels to results runs in."""
        import torch

        inference = (grad_mode or self._grad_mode) == "inference"
        return torch.inference_mode() if inference else torch.no_grad()

    def tried(self, pixels: torch.Tensor) -> Any:
        """Run the module for the first time, on an example.

        Raises:
            InvalidJob: it fails; where only inference mode is to blame, the sentence names `runtime.grad_mode`.
        """
        try:
            with self.modes():
                return self(pixels)
        except Exception as error:
            if self._grad_mode == "inference" and self._works_with_no_grad(pixels):
                raise InvalidJob(
                    f"model: it fails under torch.inference_mode ({_brief(error)}) and works under torch.no_grad; "
                    "write runtime.grad_mode: no_grad"
                ) from error
            shape = "x".join(map(str, pixels.shape))
            raise InvalidJob(
                f"model: it fails on an example batch of shape {shape} on {self.device}: {_brief(error)}; "
                "look at model and preprocess"
            ) from error

    def _works_with_no_grad(self, pixels: torch.Tensor) -> bool:
        try:
            with self.modes("no_grad"):
                self(pixels)
        except Exception:  # noqa: BLE001 - the first failure is the one that is told
            return False
        return True

    def _autocast(self) -> contextlib.AbstractContextManager[Any]:
        import torch

        dtypes = {"bf16": torch.bfloat16, "fp16": torch.float16}
        if self._precision not in dtypes:
            return contextlib.nullcontext()
        return torch.autocast(self.device.type, dtype=dtypes[self._precision])

    @contextlib.contextmanager
    def _matrix_precision(self) -> Iterator[None]:
        """On CUDA `tf32` means tf32 and `fp32` means fp32, convolutions too (torch's own default there is tf32)."""
        import torch

        if self.device.type != "cuda" or self._precision not in {"fp32", "tf32"}:
            yield
            return
        cudnn: Any = torch.backends.cudnn
        matmul, conv = torch.backends.cuda.matmul, cudnn.conv
        before = matmul.fp32_precision, conv.fp32_precision
        matmul.fp32_precision = conv.fp32_precision = "tf32" if self._precision == "tf32" else "ieee"
        try:
            yield
        finally:
            matmul.fp32_precision, conv.fp32_precision = before


def example_output(
    module: nn.Module,
    normalize: Normalize,
    size: Sequence[int],
    device: torch.device,
    precision: str,
    grad_mode: GradMode,
) -> Any:
    """The module's output on two random images, for a task to look at.

    Args:
        size: `(h, w)`, taken with three channels, or `(c, h, w)`.

    Raises:
        InvalidJob: the module fails on it.
    """
    forward = Forward(module, normalize, device, precision, grad_mode)
    return forward.tried(_random_pixels(size, rows=2))


class Predictor:
    """Batches in, small tensors on the host out.

    Args:
        module: in eval mode; moved to the device.
        normalize: pixels on the device to the model's input.
        post: the task's half.
        device: from `pick_device`.
        precision: from `pick_precision`.
        grad_mode: `inference` or `no_grad`.
    """

    def __init__(
        self,
        module: nn.Module,
        normalize: Normalize,
        post: Postprocess,
        device: torch.device,
        precision: str,
        grad_mode: GradMode,
    ) -> None:
        self._forward = Forward(module, normalize, device, precision, grad_mode)
        self._post = post
        self._limit: int | None = None  # images that fit at once, once more have not
        self._calm = 0
        self._nothing: Mapping[str, torch.Tensor] | None = None  # results of no rows: which there are, of what shape

    def warm_up(self, size: Sequence[int], rows: int = 2, dtype: torch.dtype | None = None) -> None:
        """Run once on random pixels, in the modes of the real batches.

        Args:
            size: `(h, w)`, taken with three channels, or `(c, h, w)`.
            rows: images in it.
            dtype: uint8, unless the job's own transform makes another.

        Raises:
            InvalidJob: the model or the task fails on it.
        """
        pixels = _random_pixels(size, rows, dtype)
        output = self._forward.tried(pixels)
        with self._forward.modes():
            self._remember(self._to_host(self._post.on_device(output)))

    def __call__(self, pixels: torch.Tensor) -> Predicted:
        """Predict `[n, c, h, w]`. A batch that does not fit into memory is halved, as often as needed.

        Raises:
            AttemptFailed: not one image of several fits.
        """
        pieces: list[dict[str, torch.Tensor] | None] = []
        start, before = 0, self._limit
        while start < len(pixels):
            size = min(self._limit or len(pixels), len(pixels) - start)
            piece = self._tried(pixels[start : start + size])
            if piece is None and size > 1:
                self._limit, self._calm = size // 2, 0
                continue
            pieces.append(piece)
            start += size
            self._relax()
        if None in pieces:
            self._limit = before  # those images were to blame, not the size of the batch
        return self._joined(pieces)

    def _tried(self, pixels: torch.Tensor) -> dict[str, torch.Tensor] | None:
        """The results of one piece, None where memory does not suffice."""
        import torch

        try:
            with self._forward.modes():
                tensors = self._to_host(self._post.on_device(self._forward(pixels)))
        except (MemoryError, RuntimeError) as error:  # torch.OutOfMemoryError is a RuntimeError
            if not _out_of_memory(error):
                raise
        else:
            self._remember(tensors)
            return tensors
        # Only here, with the traceback and the tensors it holds gone, can memory be given back.
        if self._forward.device.type == "cuda":
            torch.cuda.empty_cache()
        return None

    def _relax(self) -> None:
        self._calm += 1
        if self._limit is not None and self._calm >= _CALM:
            self._limit, self._calm = self._limit * 2, 0

    def _joined(self, pieces: list[dict[str, torch.Tensor] | None]) -> Predicted:
        import torch

        lost = [piece is None for piece in pieces]
        if self._nothing is None or (len(pieces) > 1 and all(lost)):
            raise AttemptFailed(
                f"not even one image fits into the memory of {self._forward.device}: is something else using it?"
            )
        # A lost piece is one image; its rows hold zeros, and the fault says so.
        empty = {name: torch.zeros((1, *none.shape[1:]), dtype=none.dtype) for name, none in self._nothing.items()}
        filled = [empty if piece is None else piece for piece in pieces]
        tensors = {name: torch.cat([piece[name] for piece in filled]) for name in self._nothing}
        found = iter(self._post.faults(tensors))
        fault = Fault("predict", "memory", f"it alone does not fit into the memory of {self._forward.device}")
        faults: list[Fault | None] = []
        for piece, gone in zip(filled, lost, strict=True):
            own = [next(found) for _ in range(len(next(iter(piece.values()))))]
            faults += [fault] if gone else own
        return Predicted(tensors, tuple(faults))

    def _to_host(self, tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        import torch

        half = {torch.bfloat16, torch.float16}  # which Arrow and NumPy know only in part
        return {name: (made.float() if made.dtype in half else made).cpu() for name, made in tensors.items()}

    def _remember(self, tensors: dict[str, torch.Tensor]) -> None:
        if self._nothing is None:
            self._nothing = {name: made[:0] for name, made in tensors.items()}


def _random_pixels(size: Sequence[int], rows: int, dtype: torch.dtype | None = None) -> torch.Tensor:
    import torch

    shape = (rows, *((3,) if len(size) == 2 else ()), *size)
    own = torch.Generator().manual_seed(0)  # the program's generator stays untouched
    if dtype is None or dtype == torch.uint8:
        return torch.randint(0, 256, shape, dtype=torch.uint8, generator=own)
    return torch.rand(shape, dtype=dtype, generator=own)


def _out_of_memory(error: BaseException) -> bool:
    import torch

    return isinstance(error, torch.OutOfMemoryError | MemoryError) or bool(_OUT_OF_MEMORY.search(str(error)))


def _brief(error: BaseException) -> str:
    text = " ".join(str(error).split())
    return f"{type(error).__name__}: {text[:300]}"
