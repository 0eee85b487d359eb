"""Batches through the predictor the way a worker sends them: as many at once as it has lanes, one begun ahead."""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from itertools import cycle
from typing import TYPE_CHECKING

from batchjob.bench.bench_worker import BenchWorker
from batchjob.concurrency import parallel_map
from batchjob.types import Prediction

if TYPE_CHECKING:
    import torch

__all__ = ["ForwardInput", "measure_forward_rate"]

_SECONDS = 3.0  # at most
_ROUNDS = 3  # at least
ForwardInput = tuple["torch.Tensor", tuple[tuple[int, ...], ...] | None]


def measure_forward_rate(rig: BenchWorker, items: Sequence[ForwardInput]) -> float:
    """Images/s through the predictor.

    Args:
        rig: whose predictor and lanes.
        items: pixels, and their shapes where they are flat; again and again.
    """
    rig.parts.predictor(*items[0]).wait()
    began, images = time.perf_counter(), 0
    for predicted in _through(rig, _again(rig, items, began)):
        images += sum(len(piece.rows) for piece in predicted.outputs)
    return images / (time.perf_counter() - began)


def _again(rig: BenchWorker, items: Sequence[ForwardInput], began: float) -> Iterator[ForwardInput]:
    """Until there were enough of them for every lane."""
    images = 0
    for rounds, (pixels, shapes) in enumerate(cycle(items)):
        enough = images >= rig.images or time.perf_counter() - began > _SECONDS
        if rounds >= _ROUNDS * rig.parts.cpu_parallelism.parallel_batches and enough:
            return
        images += len(pixels if shapes is None else shapes)
        yield pixels, shapes


def _through(rig: BenchWorker, items: Iterator[ForwardInput]) -> Iterator[Prediction]:
    predictor, most = rig.parts.predictor, rig.parts.cpu_parallelism.parallel_batches
    if most > 1:
        yield from parallel_map(lambda item: predictor(*item).wait(), items, threads=most, prefetch=most + 1)
        return
    before: Prediction | None = None
    for pixels, shapes in items:
        made = predictor(pixels, shapes)
        if before is not None:
            yield before.wait()
        before = made
    if before is not None:
        yield before.wait()
