"""The forward pass: pixels to the device, `inference_mode`, autocast, small tensors back; out of memory: halve."""

from __future__ import annotations

import contextlib
import re
from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from itertools import pairwise
from math import prod
from typing import TYPE_CHECKING, Any, Literal, Protocol

from batchjob.errors import AttemptFailed, InvalidJob
from batchjob.records import Fault, Recipe

if TYPE_CHECKING:
    import torch
    from torch import nn

__all__ = ["Forward", "Modes", "Piece", "Predicted", "Predictor", "random_pixels"]

GradMode = Literal["inference", "no_grad"]
Normalize = Callable[["torch.Tensor", "torch.dtype"], "torch.Tensor"]
Shapes = Sequence[tuple[int, ...]]

_OUT_OF_MEMORY = re.compile(r"out of memory|not enough memory|can't allocate memory|ALLOC_FAILED", re.IGNORECASE)
_CALM = 128  # pieces without trouble after which a larger one is tried again


class Outputs(Protocol):
    """What the forward loop needs of a task."""

    def on_device(self, output: Any) -> dict[str, torch.Tensor]:
        """The model's output as small tensors, first dimension `n`."""


@dataclass(frozen=True)
class Modes:
    """How a module is called.

    Attributes:
        grad_mode: `inference`, or `no_grad` for models that fail under inference mode.
        takes: a `batch`, or a `list` of images.
        recipe: precision and layout.
        batch_size: the number of images that every call must have; None for any.
    """

    grad_mode: GradMode = "inference"
    takes: Literal["batch", "list"] = "batch"
    recipe: Recipe = field(default_factory=Recipe)
    batch_size: int | None = None


@dataclass(frozen=True)
class Piece:
    """What one call of the module gave.

    Attributes:
        rows: which images of the batch.
        tensors: on the host, one row an image, in the order of `rows`.
    """

    rows: tuple[int, ...]
    tensors: dict[str, torch.Tensor]


@dataclass(frozen=True)
class Predicted:
    """A batch's results; on a GPU they may still be under way.

    Attributes:
        pieces: each image of the batch is in one of them, or lost.
        lost: images that alone do not fit into memory.
    """

    pieces: tuple[Piece, ...]
    lost: tuple[int, ...] = ()
    _arrival: Callable[[], None] = lambda: None

    def wait(self) -> Predicted:
        """The same, once all of it has arrived on the host. Raises what went wrong on the device."""
        self._arrival()
        return self


class Forward:
    """A module on its device with its numeric modes. The program's own torch settings stay as they are.

    Args:
        module: in eval mode; moved to the device, once.
        normalize: pixels on the device to the model's input.
        device: from `pick_device`.
        modes: how it is called.
    """

    def __init__(self, module: nn.Module, normalize: Normalize, device: torch.device, modes: Modes) -> None:
        self.device, self.takes = device, modes.takes
        self._module = module.to(device)
        self._normalize = normalize
        self._modes, self._recipe = modes, modes.recipe

    def __call__(self, pixels: torch.Tensor | list[torch.Tensor]) -> Any:
        """The module's output for images on the device. To be called under `modes()`."""
        values = self._values(pixels)
        with self._autocast(), self._backends():
            return self._module(values)

    def modes(self, grad_mode: GradMode | None = None) -> contextlib.AbstractContextManager[Any]:
        """The mode without gradients that everything from pixels to results runs in."""
        import torch

        inference = (grad_mode or self._modes.grad_mode) == "inference"
        return torch.inference_mode() if inference else torch.no_grad()

    def tried(self, pixels: torch.Tensor) -> Any:
        """Run the module for the first time, on example images `[n, c, h, w]`.

        Raises:
            InvalidJob: it fails; where only inference mode is to blame, the sentence names `runtime.grad_mode`.
        """
        try:
            with self.modes():
                return self._on_example(pixels)
        except Exception as error:
            if self._modes.grad_mode == "inference" and self._works_with_no_grad(pixels):
                raise InvalidJob(
                    f"model: it fails under torch.inference_mode ({_brief(error)}) and works under torch.no_grad; "
                    "write runtime.grad_mode: no_grad"
                ) from error
            shape = "x".join(map(str, pixels.shape))
            raise InvalidJob(
                f"model: it fails on an example batch of shape {shape} on {self.device}: {_brief(error)}; "
                "look at model and preprocess"
            ) from error

    def _on_example(self, pixels: torch.Tensor) -> Any:
        moved = pixels.to(self.device)
        return self(list(moved) if self.takes == "list" else moved)

    def _works_with_no_grad(self, pixels: torch.Tensor) -> bool:
        try:
            with self.modes("no_grad"):
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
        values = self._normalize(pixels, dtype)
        return values.contiguous(memory_format=torch.channels_last) if self._recipe.channels_last else values

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


class Predictor:
    """Batches in, small tensors on the host out.

    Args:
        forward: the module.
        post: the task's half.
        batch_size: images that each call of the module must have; shorter ones are padded. None for any number.
    """

    def __init__(self, forward: Forward, post: Outputs, batch_size: int | None = None) -> None:
        self._forward, self._post, self._fixed = forward, post, batch_size
        self._limit: int | None = None  # images that fit at once, once more have not
        self._calm = 0
        self._link = _Link(forward.device)

    def warm_up(self, size: Sequence[int], rows: int = 2, dtype: torch.dtype | None = None) -> None:
        """Run once on random pixels, in the modes of the real batches.

        Args:
            size: `(h, w)`, taken with three channels, or `(c, h, w)`.
            rows: images in it.
            dtype: uint8, unless the job's own transform makes another.

        Raises:
            InvalidJob: the model or the task fails on it.
        """
        pixels = random_pixels(size, max(rows, self._fixed or 0), dtype)
        output = self._forward.tried(pixels)
        with self._forward.modes():
            self._link.back(self._post.on_device(output))
        self._link.arrival()()

    def __call__(self, pixels: torch.Tensor, shapes: Shapes | None = None) -> Predicted:
        """Predict `[n, c, h, w]`, or flat pixels of `n` images of these shapes.

        A batch that does not fit into memory is halved, as often as needed; the size that fits is kept for a while.

        Raises:
            AttemptFailed: not one image of several fits.
        """
        count = len(shapes) if shapes is not None else len(pixels)
        pieces: list[Piece] = []
        lost: list[int] = []
        start, before = 0, self._limit
        while start < count:
            size = min(self._limit or count, count - start)
            made = self._tried(pixels, shapes, start, size)
            if made is None and size > 1:
                self._limit, self._calm = size // 2, 0
                continue
            pieces += made or []
            lost += [] if made is not None else [start]
            start += size
            self._relax()
        if lost:
            self._limit = before  # those images were to blame, not the size of the batch
        if len(lost) > 1 and not pieces:
            raise AttemptFailed(
                f"not even one image fits into the memory of {self._forward.device}: is something else using it?"
            )
        return Predicted(tuple(pieces), tuple(lost), self._link.arrival())

    def lost_fault(self) -> Fault:
        """What is said of an image that alone does not fit."""
        return Fault("predict", "memory", f"it alone does not fit into the memory of {self._forward.device}")

    def _tried(self, pixels: torch.Tensor, shapes: Shapes | None, start: int, size: int) -> list[Piece] | None:
        """The results of some images, None where memory does not suffice."""
        import torch

        try:
            with self._forward.modes():
                return [
                    self._piece(inputs, rows)
                    for inputs, rows in self._calls(*_part(pixels, shapes, start, size), start)
                ]
        except (MemoryError, RuntimeError) as error:  # torch.OutOfMemoryError is a RuntimeError
            if not _out_of_memory(error):
                raise
        # Only here, with the traceback and the tensors it holds gone, can memory be given back.
        if self._forward.device.type == "cuda":
            torch.cuda.empty_cache()
        return None

    def _calls(
        self, pixels: torch.Tensor, shapes: Shapes | None, start: int
    ) -> Iterator[tuple[torch.Tensor | list[torch.Tensor], tuple[int, ...]]]:
        """What the module is called with, call by call, and which images of the batch that is."""
        import torch

        moved = self._link.there(pixels)
        rows = tuple(range(start, start + len(shapes if shapes is not None else moved)))
        if self._forward.takes == "list":
            yield list(moved) if shapes is None else _apart(moved, shapes), rows
        elif shapes is None:
            yield moved, rows
        else:
            images = _apart(moved, shapes)
            for alike in _by_shape(shapes):
                yield torch.stack([images[index] for index in alike]), tuple(rows[index] for index in alike)

    def _piece(self, inputs: torch.Tensor | list[torch.Tensor], rows: tuple[int, ...]) -> Piece:
        if self._fixed is None or isinstance(inputs, list) or len(inputs) == self._fixed:
            return Piece(rows, self._link.back(self._post.on_device(self._forward(inputs))))
        return self._padded(inputs, rows, self._fixed)

    def _padded(self, inputs: torch.Tensor, rows: tuple[int, ...], fixed: int) -> Piece:
        """A batch that has not the size that the module takes: in several calls, the last filled up with blanks."""
        import torch

        made: list[dict[str, torch.Tensor]] = []
        for part in inputs.split(fixed):
            blanks = part.new_zeros((fixed - len(part), *part.shape[1:]))
            found = self._post.on_device(self._forward(torch.cat([part, blanks])))
            made.append({name: tensor[: len(part)] for name, tensor in found.items()})
        return Piece(rows, self._link.back({name: torch.cat([one[name] for one in made]) for name in made[0]}))

    def _relax(self) -> None:
        self._calm += 1
        if self._limit is not None and self._calm >= _CALM:
            self._limit, self._calm = self._limit * 2, 0


class _Link:
    """Copies to the device and back. On CUDA they run on a stream of their own, beside the computation."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._stream: torch.cuda.Stream | None = None

    def there(self, pixels: torch.Tensor) -> torch.Tensor:
        import torch

        if self._device.type != "cuda":
            return pixels.to(self._device)
        if self._stream is None:
            self._stream = torch.cuda.Stream(self._device)
        current = torch.cuda.current_stream(self._device)
        with torch.cuda.stream(self._stream):
            moved = pixels.to(self._device, non_blocking=True)
        current.wait_stream(self._stream)
        moved.record_stream(current)
        return moved

    def back(self, tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        """To the host; on CUDA they have arrived once `arrival()` says so."""
        import torch

        half = {torch.bfloat16, torch.float16}  # which Arrow and NumPy know only in part
        full = {name: made.float() if made.dtype in half else made for name, made in tensors.items()}
        if self._device.type != "cuda":
            return {name: made.cpu() for name, made in full.items()}
        landed = {name: torch.empty(made.shape, dtype=made.dtype, pin_memory=True) for name, made in full.items()}
        return {name: landed[name].copy_(made, non_blocking=True) for name, made in full.items()}

    def arrival(self) -> Callable[[], None]:
        """A wait for all that was sent back so far."""
        import torch

        if self._device.type != "cuda":
            return lambda: None
        event = torch.cuda.Event()
        event.record(torch.cuda.current_stream(self._device))
        return event.synchronize


def random_pixels(size: Sequence[int], rows: int, dtype: torch.dtype | None = None) -> torch.Tensor:
    """`[rows, c, h, w]` of noise, always the same; `size` is `(h, w)`, with three channels, or `(c, h, w)`."""
    import torch

    shape = (rows, *((3,) if len(size) == 2 else ()), *size)
    own = torch.Generator().manual_seed(0)  # the program's generator stays untouched
    if dtype is None or dtype == torch.uint8:
        return torch.randint(0, 256, shape, dtype=torch.uint8, generator=own)
    return torch.rand(shape, dtype=dtype, generator=own)


def _part(pixels: torch.Tensor, shapes: Shapes | None, start: int, size: int) -> tuple[torch.Tensor, Shapes | None]:
    """Images `start` to `start + size` of a batch."""
    if shapes is None:
        return pixels[start : start + size], None
    before = sum(prod(shape) for shape in shapes[:start])
    chosen = shapes[start : start + size]
    return pixels[before : before + sum(prod(shape) for shape in chosen)], chosen


def _apart(flat: torch.Tensor, shapes: Shapes) -> list[torch.Tensor]:
    ends = [0]
    for shape in shapes:
        ends.append(ends[-1] + prod(shape))
    return [flat[begin:end].view(shape) for (begin, end), shape in zip(pairwise(ends), shapes, strict=True)]


def _by_shape(shapes: Shapes) -> list[list[int]]:
    groups: dict[tuple[int, ...], list[int]] = defaultdict(list)
    for index, shape in enumerate(shapes):
        groups[shape].append(index)
    return list(groups.values())


def _out_of_memory(error: BaseException) -> bool:
    import torch

    return isinstance(error, torch.OutOfMemoryError | MemoryError) or bool(_OUT_OF_MEMORY.search(str(error)))


def _brief(error: BaseException) -> str:
    text = " ".join(str(error).split())
    return f"{type(error).__name__}: {text[:300]}"
