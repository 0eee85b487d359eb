"""Predictor: batches through the forward pass to small tensors on the host, in halves if memory runs out."""

from __future__ import annotations

import time
from collections import defaultdict
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from itertools import pairwise
from math import prod
from typing import Any, Protocol

import torch

from batchjob.errors import AttemptFailed, InvalidJob, is_out_of_memory
from batchjob.inference.device_transfer import DeviceTransfer
from batchjob.inference.example_images import random_pixels
from batchjob.inference.forward import ForwardPass
from batchjob.types import ErrorRecord, PartialOutput, Prediction

__all__ = ["PROFILER_PREFIX", "DevicePostprocess", "Predictor"]

Shapes = Sequence[tuple[int, ...]]

# Prefix of the names of steps in a profile.
PROFILER_PREFIX = "batchjob."

# Calls without an out-of-memory error after which a batch of twice the size is tried again.
_CALLS_BEFORE_GROWTH = 128


class DevicePostprocess(Protocol):
    """Part of a task's postprocess that runs on the device.

    Example: for logits `[n, 1000]`, a top-5 classification returns `{"scores": [n, 5], "classes": [n, 5]}`, so that
    only these are copied to the host.
    """

    def on_device(self, output: Any) -> dict[str, torch.Tensor]:
        """Reduce the model's output to small tensors whose first dimension is `n`."""


class Predictor:
    """Batches of pixels to small tensors on the host.

    Args:
        forward: Forward pass of the model.
        postprocess: Task, of which the part on the device is used.
        fixed_batch_size: Images that each call of the module must have, fewer are padded; None for any number.
        preferred_batch_size: Images that each call should have, as a compiled module needs, as long as they fit into
            memory; None for any number.
        min_rows: Images that each call must have at least; fewer are padded.
    """

    def __init__(
        self,
        forward: ForwardPass,
        postprocess: DevicePostprocess,
        fixed_batch_size: int | None = None,
        preferred_batch_size: int | None = None,
        min_rows: int = 1,
    ) -> None:
        self._forward, self._postprocess = forward, postprocess
        self._fixed_batch_size, self._preferred_batch_size = fixed_batch_size, preferred_batch_size
        self._min_rows = min_rows
        # Images that fit at once; None until a batch has run out of memory.
        self._limit: int | None = None
        self._calls_without_error = 0
        self._transfer = DeviceTransfer(forward.device)

    @property
    def forward(self) -> ForwardPass:
        """Forward pass that is called."""
        return self._forward

    def warm_up(self, size: Sequence[int], rows: int = 2, dtype: torch.dtype | None = None) -> float:
        """Predict random pixels once, like a real batch, in halves if they do not fit into memory.

        Args:
            size: `(h, w)` for three channels, or `(c, h, w)`.
            rows: Number of images.
            dtype: Dtype of the pixels; None for uint8. The job's own transform may make another one.

        Returns:
            Seconds of the prediction, without the time to draw the pixels.

        Raises:
            InvalidJob: The model or the task fails, or not even one image fits into memory.
        """
        pixels = random_pixels(size, max(rows, self._fixed_batch_size or 0), dtype)
        started = time.perf_counter()
        try:
            fits = not self(pixels).wait().errors
        except AttemptFailed:
            fits = False
        except Exception as error:
            raise self._forward.explain_failure(pixels, error) from error
        seconds = time.perf_counter() - started
        if not fits:
            raise InvalidJob(
                f"model: not even one image of {'x'.join(map(str, size))} fits into the memory of "
                f"{self._forward.device} beside it; make them smaller (preprocess.resize), or take a smaller model"
            )
        return seconds

    def find_largest_batch(self, size: Sequence[int], start: int, limit: int, dtype: torch.dtype | None = None) -> int:
        """Return the largest batch that fits into memory with a quarter of it to spare, by halving or doubling.

        Args:
            size: `(h, w)` for three channels, or `(c, h, w)`.
            start: Batch size to try first.
            limit: Largest batch size to return.
            dtype: Dtype of the pixels; None for uint8.
        """
        rows = start
        while rows > 1 and not self._fits(size, rows, dtype):
            rows //= 2
        if rows < start:
            return rows
        while rows * 2 <= limit and self._fits(size, rows * 2, dtype):
            rows *= 2
        return rows

    def __call__(self, pixels: torch.Tensor, shapes: Shapes | None = None) -> Prediction:
        """Predict a batch.

        A batch that does not fit into memory is halved as often as needed, and later batches with it.

        Args:
            pixels: `[n, c, h, w]`; or, with `shapes`, the values of all images one after the other.
            shapes: `[c, h, w]` of each image if they differ.

        Raises:
            AttemptFailed: Not one image of several fits, or the batch size that the model requires does not.
        """
        count = len(shapes) if shapes is not None else len(pixels)
        outputs: list[PartialOutput] = []
        errors: dict[int, ErrorRecord] = {}
        start, limit_before = 0, self._limit
        while start < count:
            size = min(self._limit or count, count - start)
            predicted = self._try_slice(pixels, shapes, start, size)
            if predicted is None and self._fixed_batch_size is not None:
                raise AttemptFailed(
                    f"a batch of {self._fixed_batch_size}, which is what the model takes, does not fit into the "
                    f"memory of {self._forward.device}: is something else using it?"
                )
            if predicted is None and size > 1:
                self._limit, self._calls_without_error = size // 2, 0
                continue
            outputs += predicted or []
            if predicted is None:
                errors[start] = self._too_large_error()
            start += size
            self._grow_limit()
        if errors:
            # These images were too large, not the batch.
            self._limit = limit_before
        if len(errors) > 1 and not outputs:
            raise AttemptFailed(
                f"not even one image fits into the memory of {self._forward.device}: is something else using it?"
            )
        return Prediction(tuple(outputs), errors, self._transfer.sync())

    def predict_single(self, pixels: torch.Tensor, shapes: Shapes | None, row: int) -> Prediction:
        """Predict one image of a batch in a call of its own, wait for it, and keep the image's row in the result."""
        prediction = self(*_slice_batch(pixels, shapes, row, 1)).wait()
        outputs = tuple(PartialOutput((row,), output.tensors) for output in prediction.outputs)
        return Prediction(outputs, {row: prediction.errors[0]} if prediction.errors else {})

    def wait(self) -> None:
        """Wait for all work on the device. Raises its error if some of it failed."""
        if (wait := self._transfer.sync()) is not None:
            wait()

    # -- memory ------------------------------------------------------------------------------------------------

    def _fits(self, size: Sequence[int], rows: int, dtype: torch.dtype | None) -> bool:
        rows += rows // 4
        return self._try_slice(random_pixels(size, rows, dtype), None, 0, rows) is not None

    def _too_large_error(self) -> ErrorRecord:
        return ErrorRecord("predict", "memory", f"it alone does not fit into the memory of {self._forward.device}")

    def _grow_limit(self) -> None:
        """Double the limit after enough calls without an error: memory may be free again."""
        self._calls_without_error += 1
        if self._limit is not None and self._calls_without_error >= _CALLS_BEFORE_GROWTH:
            self._limit, self._calls_without_error = self._limit * 2, 0

    def _try_slice(
        self, pixels: torch.Tensor, shapes: Shapes | None, start: int, size: int
    ) -> list[PartialOutput] | None:
        """Predict images `start` to `start + size` of a batch, or return None if they do not fit into memory."""
        try:
            with self._forward.disable_gradients():
                return [
                    self._predict_call(inputs, rows)
                    for inputs, rows in self._split_into_calls(*_slice_batch(pixels, shapes, start, size), start)
                ]
        except (MemoryError, RuntimeError) as error:  # torch.OutOfMemoryError is a RuntimeError
            if not is_out_of_memory(error):
                raise
        # Memory can only be released here, after the traceback and the tensors that it holds are gone.
        if self._forward.device.type == "cuda":
            torch.cuda.empty_cache()
        return None

    # -- calls of the module -----------------------------------------------------------------------------------

    def _split_into_calls(
        self, pixels: torch.Tensor, shapes: Shapes | None, start: int
    ) -> Iterator[tuple[torch.Tensor | list[torch.Tensor], tuple[int, ...]]]:
        """Yield the input of each call of the module, with the rows of its images.

        Example: four images of which the second is taller, in a module that takes batches, give two calls, with rows
        `(0, 2, 3)` and `(1,)`; a module that takes a list gets one call with rows `(0, 1, 2, 3)`.
        """
        with self._profiled("H2D"):
            moved = self._transfer.to_device(pixels)
        rows = tuple(range(start, start + len(shapes if shapes is not None else moved)))
        if self._forward.input_kind == "list":
            yield list(moved) if shapes is None else _split_images(moved, shapes), rows
        elif shapes is None:
            yield moved, rows
        else:
            images = _split_images(moved, shapes)
            for indices in _group_by_shape(shapes):
                yield torch.stack([images[index] for index in indices]), tuple(rows[index] for index in indices)

    def _predict_call(self, inputs: torch.Tensor | list[torch.Tensor], rows: tuple[int, ...]) -> PartialOutput:
        with self._profiled("forward"):
            call_size = self._call_size
            if len(inputs) < self._min_rows:
                call_size = max(self._min_rows, call_size or 0)
            if call_size is None or isinstance(inputs, list) or len(inputs) == call_size:
                tensors = self._call_module(inputs)
            else:
                tensors = self._call_padded(inputs, call_size)
        with self._profiled("D2H"):
            return PartialOutput(rows, self._transfer.to_host(tensors))

    @property
    def _call_size(self) -> int | None:
        """Images that the next call must have; None for any number."""
        if self._fixed_batch_size is not None or self._preferred_batch_size is None or self._limit is None:
            return self._fixed_batch_size or self._preferred_batch_size
        return min(self._preferred_batch_size, self._limit)

    def _call_module(self, inputs: torch.Tensor | list[torch.Tensor]) -> dict[str, torch.Tensor]:
        return self._postprocess.on_device(self._forward(inputs))

    def _call_padded(self, inputs: torch.Tensor, call_size: int) -> dict[str, torch.Tensor]:
        """Predict a batch in calls of exactly `call_size` images, the last one padded with blank images."""
        outputs: list[dict[str, torch.Tensor]] = []
        for chunk in inputs.split(call_size):
            padding = chunk.new_zeros((call_size - len(chunk), *chunk.shape[1:]))
            tensors = self._call_module(torch.cat([chunk, padding]))
            outputs.append({name: tensor[: len(chunk)] for name, tensor in tensors.items()})
        return {name: torch.cat([output[name] for output in outputs]) for name in outputs[0]}

    @contextmanager
    def _profiled(self, step: str) -> Iterator[None]:
        """Name a step for profilers: torch's, and Nsight on CUDA."""
        with torch.profiler.record_function(f"{PROFILER_PREFIX}{step}"):
            if self._forward.device.type != "cuda":
                yield
                return
            with torch.cuda.nvtx.range(f"{PROFILER_PREFIX}{step}"):
                yield


def _slice_batch(
    pixels: torch.Tensor, shapes: Shapes | None, start: int, size: int
) -> tuple[torch.Tensor, Shapes | None]:
    """Return images `start` to `start + size` of a batch.

    Example: for flat pixels of images with 12, 48 and 27 values, `start=1, size=1` are values 12 to 60.
    """
    if shapes is None:
        return pixels[start : start + size], None
    first = sum(prod(shape) for shape in shapes[:start])
    selected = shapes[start : start + size]
    return pixels[first : first + sum(prod(shape) for shape in selected)], selected


def _split_images(flat: torch.Tensor, shapes: Shapes) -> list[torch.Tensor]:
    """Split flat values into images: shapes `[(3, 2, 2), (3, 4, 4)]` take values 0 to 12 and 12 to 60."""
    ends = [0]
    for shape in shapes:
        ends.append(ends[-1] + prod(shape))
    return [flat[first:last].view(shape) for (first, last), shape in zip(pairwise(ends), shapes, strict=True)]


def _group_by_shape(shapes: Shapes) -> list[list[int]]:
    """Group the indices of equal shapes: `[(3, 4, 6), (3, 5, 5), (3, 4, 6)]` gives `[[0, 2], [1]]`."""
    groups: dict[tuple[int, ...], list[int]] = defaultdict(list)
    for index, shape in enumerate(shapes):
        groups[shape].append(index)
    return list(groups.values())
