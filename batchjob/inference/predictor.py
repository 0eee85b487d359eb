"""Batches through the forward pass: copies there and back beside the computation; out of memory: halve."""

from __future__ import annotations

import time
from collections import defaultdict
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from itertools import pairwise
from math import prod
from typing import TYPE_CHECKING, Any, Protocol

from batchjob.errors import AttemptFailed, InvalidJob, is_out_of_memory
from batchjob.inference.device_transfer import DeviceTransfer
from batchjob.inference.forward import ForwardPass
from batchjob.types import ErrorRecord, PartialOutput, Prediction

if TYPE_CHECKING:
    import torch

__all__ = ["PROFILER_PREFIX", "Predictor", "random_pixels"]

Shapes = Sequence[tuple[int, ...]]
PROFILER_PREFIX = "batchjob."  # before the names of steps in a profile
_CALM = 128  # pieces without trouble after which a larger one is tried again


class DevicePostprocess(Protocol):
    """What the forward loop needs of a task."""

    def on_device(self, output: Any) -> dict[str, torch.Tensor]:
        """The model's output as small tensors, first dimension `n`."""


class Predictor:
    """Batches in, small tensors on the host out.

    Args:
        forward: the module.
        post: the task's half.
        batch_size: images that each call of the module must have; shorter ones are padded. None for any number.
        rather: images that each call had better have, as a compiled module does, as long as they fit into memory.
    """

    def __init__(
        self,
        forward: ForwardPass,
        postprocess: DevicePostprocess,
        fixed_batch_size: int | None = None,
        preferred_batch_size: int | None = None,
    ) -> None:
        self._forward, self._post, self._fixed, self._rather = (
            forward,
            postprocess,
            fixed_batch_size,
            preferred_batch_size,
        )
        self._limit: int | None = None  # images that fit at once, once more have not
        self._calm = 0
        self._link = DeviceTransfer(forward.device)

    @property
    def forward(self) -> ForwardPass:
        """The module that it calls."""
        return self._forward

    def warm_up(self, size: Sequence[int], rows: int = 2, dtype: torch.dtype | None = None) -> float:
        """Run once on random pixels, in the modes of the real batches. What does not fit into memory is halved.

        Gives the seconds that this took, without the time for drawing the pixels.

        Args:
            size: `(h, w)`, taken with three channels, or `(c, h, w)`.
            rows: images in it.
            dtype: uint8, unless the job's own transform makes another.

        Raises:
            InvalidJob: the model or the task fails on it, or not even one image fits.
        """
        pixels = random_pixels(size, max(rows, self._fixed or 0), dtype)
        began = time.perf_counter()
        try:
            fits = not self(pixels).wait().errors
        except AttemptFailed:
            fits = False
        except Exception as error:
            raise self._forward.explain_failure(pixels, error) from error
        took = time.perf_counter() - began
        if not fits:
            raise InvalidJob(
                f"model: not even one image of {'x'.join(map(str, size))} fits into the memory of "
                f"{self._forward.device} beside it; make them smaller (preprocess.resize), or take a smaller model"
            )
        return took

    def find_largest_batch(self, size: Sequence[int], start: int, limit: int, dtype: torch.dtype | None = None) -> int:
        """The largest batch that fits with a quarter to spare: `first` halved or doubled, `most` at the utmost.

        Args:
            size: `(h, w)`, taken with three channels, or `(c, h, w)`.
            first: where to begin.
            most: not more than this.
            dtype: uint8, unless the job's own transform makes another.
        """
        rows = start
        while rows > 1 and not self._fits(size, rows, dtype):
            rows //= 2
        if rows < start:
            return rows
        while rows * 2 <= limit and self._fits(size, rows * 2, dtype):
            rows *= 2
        return rows

    def _fits(self, size: Sequence[int], rows: int, dtype: torch.dtype | None) -> bool:
        rows += rows // 4
        return self._tried(random_pixels(size, rows, dtype), None, 0, rows) is not None

    def __call__(self, pixels: torch.Tensor, shapes: Shapes | None = None) -> Prediction:
        """Predict `[n, c, h, w]`, or flat pixels of `n` images of these shapes.

        A batch that does not fit into memory is halved, as often as needed; the size that fits is kept for a while.

        Raises:
            AttemptFailed: not one image of several fits.
        """
        count = len(shapes) if shapes is not None else len(pixels)
        pieces: list[PartialOutput] = []
        lost: dict[int, ErrorRecord] = {}
        start, before = 0, self._limit
        while start < count:
            size = min(self._limit or count, count - start)
            made = self._tried(pixels, shapes, start, size)
            if made is None and self._fixed is not None:
                raise AttemptFailed(
                    f"a batch of {self._fixed}, which is what the model takes, does not fit into the memory of "
                    f"{self._forward.device}: is something else using it?"
                )
            if made is None and size > 1:
                self._limit, self._calm = size // 2, 0
                continue
            pieces += made or []
            if made is None:
                lost[start] = self._too_large()
            start += size
            self._relax()
        if lost:
            self._limit = before  # those images were to blame, not the size of the batch
        if len(lost) > 1 and not pieces:
            raise AttemptFailed(
                f"not even one image fits into the memory of {self._forward.device}: is something else using it?"
            )
        return Prediction(tuple(pieces), lost, self._link.sync())

    def predict_single(self, pixels: torch.Tensor, shapes: Shapes | None, row: int) -> Prediction:
        """One image of such a batch, by itself, and waited for; it keeps its row."""
        made = self(*_part(pixels, shapes, row, 1)).wait()
        pieces = tuple(PartialOutput((row,), piece.tensors) for piece in made.outputs)
        return Prediction(pieces, {row: made.errors[0]} if made.errors else {})

    def wait(self) -> None:
        """Until all that was begun has ended. Raises what went wrong on the device."""
        if (arrival := self._link.sync()) is not None:
            arrival()

    def _too_large(self) -> ErrorRecord:
        return ErrorRecord("predict", "memory", f"it alone does not fit into the memory of {self._forward.device}")

    def _tried(self, pixels: torch.Tensor, shapes: Shapes | None, start: int, size: int) -> list[PartialOutput] | None:
        """The results of some images, None where memory does not suffice."""
        import torch

        try:
            with self._forward.disable_gradients():
                return [
                    self._piece(inputs, rows)
                    for inputs, rows in self._calls(*_part(pixels, shapes, start, size), start)
                ]
        except (MemoryError, RuntimeError) as error:  # torch.OutOfMemoryError is a RuntimeError
            if not is_out_of_memory(error):
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

        with self._named("H2D"):
            moved = self._link.to_device(pixels)
        rows = tuple(range(start, start + len(shapes if shapes is not None else moved)))
        if self._forward.input_kind == "list":
            yield list(moved) if shapes is None else _apart(moved, shapes), rows
        elif shapes is None:
            yield moved, rows
        else:
            images = _apart(moved, shapes)
            for alike in _by_shape(shapes):
                yield torch.stack([images[index] for index in alike]), tuple(rows[index] for index in alike)

    def _piece(self, inputs: torch.Tensor | list[torch.Tensor], rows: tuple[int, ...]) -> PartialOutput:
        with self._named("forward"):
            wanted = self._call_size
            if wanted is None or isinstance(inputs, list) or len(inputs) == wanted:
                found = self._called(inputs)
            else:
                found = self._padded(inputs, wanted)
        with self._named("D2H"):
            return PartialOutput(rows, self._link.to_host(found))

    @property
    def _call_size(self) -> int | None:
        """Images that the next call is to have; None for as many as there are."""
        if self._fixed is not None or self._rather is None or self._limit is None:
            return self._fixed or self._rather
        return min(self._rather, self._limit)

    def _called(self, inputs: torch.Tensor | list[torch.Tensor]) -> dict[str, torch.Tensor]:
        return self._post.on_device(self._forward(inputs))

    def _padded(self, inputs: torch.Tensor, fixed: int) -> dict[str, torch.Tensor]:
        """A batch that has not the size that the module takes: in several calls, the last filled up with blanks."""
        import torch

        made: list[dict[str, torch.Tensor]] = []
        for part in inputs.split(fixed):
            blanks = part.new_zeros((fixed - len(part), *part.shape[1:]))
            found = self._called(torch.cat([part, blanks]))
            made.append({name: tensor[: len(part)] for name, tensor in found.items()})
        return {name: torch.cat([one[name] for one in made]) for name in made[0]}

    @contextmanager
    def _named(self, step: str) -> Iterator[None]:
        """Around a step, so that profilers (torch's, and on CUDA Nsight) show it under its name."""
        import torch

        with torch.profiler.record_function(f"{PROFILER_PREFIX}{step}"):
            if self._forward.device.type != "cuda":
                yield
                return
            with torch.cuda.nvtx.range(f"{PROFILER_PREFIX}{step}"):
                yield

    def _relax(self) -> None:
        self._calm += 1
        if self._limit is not None and self._calm >= _CALM:
            self._limit, self._calm = self._limit * 2, 0


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
