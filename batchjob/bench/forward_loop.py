"""Throughput of the forward loop: batches go through the predictor as a worker sends them."""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from itertools import cycle

import torch

from batchjob.bench.bench_worker import BenchWorker
from batchjob.concurrency import parallel_map
from batchjob.types import Prediction

__all__ = ["ForwardInput", "measure_forward_rate"]

_MAX_SECONDS = 3.0
_MIN_ROUNDS = 3

ForwardInput = tuple[torch.Tensor, tuple[tuple[int, ...], ...] | None]
"""Pixels of a batch, and the shapes of its images if the pixels are flat."""


def measure_forward_rate(worker: BenchWorker, inputs: Sequence[ForwardInput]) -> float:
    """Measure images/s through the predictor: as many batches at once as in a run, the next begun in advance.

    Args:
        worker: Worker whose predictor is measured.
        inputs: Batches; they are repeated until there are enough.
    """
    worker.predictor(*inputs[0]).wait()
    started, images = time.perf_counter(), 0
    for prediction in _predict(worker, _repeat_inputs(worker, inputs, started)):
        images += sum(len(output.rows) for output in prediction.outputs)
    return images / (time.perf_counter() - started)


def _repeat_inputs(worker: BenchWorker, inputs: Sequence[ForwardInput], started: float) -> Iterator[ForwardInput]:
    """Yield inputs until there were as many images as in a run, or the time is over; some for each parallel batch."""
    images, min_inputs = 0, _MIN_ROUNDS * worker.cpu_parallelism.parallel_batches
    for count, (pixels, shapes) in enumerate(cycle(inputs)):
        enough = images >= worker.images or time.perf_counter() - started > _MAX_SECONDS
        if count >= min_inputs and enough:
            return
        images += len(pixels if shapes is None else shapes)
        yield pixels, shapes


def _predict(worker: BenchWorker, inputs: Iterator[ForwardInput]) -> Iterator[Prediction]:
    predictor, parallel = worker.predictor, worker.cpu_parallelism.parallel_batches
    if parallel > 1:
        yield from parallel_map(lambda item: predictor(*item).wait(), inputs, threads=parallel, prefetch=parallel + 1)
        return
    # Start each batch before waiting for the one before it, so that a GPU always has work.
    previous: Prediction | None = None
    for pixels, shapes in inputs:
        current = predictor(pixels, shapes)
        if previous is not None:
            yield previous.wait()
        previous = current
    if previous is not None:
        yield previous.wait()
