"""Batches of one shard after another, on their way from the loader through the model into their parts."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from dataclasses import dataclass, replace
from functools import partial
from typing import Protocol

from batchjob.concurrency import parallel_map
from batchjob.errors import AttemptFailed, AttemptInterrupted, BatchjobError, as_batchjob_error
from batchjob.inference.fault_isolation import FaultIsolatingPredictor
from batchjob.loader.shard_queue import ShardQueue
from batchjob.output.part_builder import PartBuilder
from batchjob.types import Batch, Prediction, TimingSink, record_timing

__all__ = ["ShardRunner"]


class BatchSource(Protocol):
    """Source of loaded batches: the `Loader`."""

    def batches(self, queue: ShardQueue) -> Iterator[Batch]:
        """Yield the batches of the queue's shards in order, until the queue has none now."""


class ShardRunner:
    """Runs the shards of a queue, batch by batch.

    The result of an attempt reaches the part builder, which reports it; an attempt that fails ends alone, the others
    go on.

    Args:
        loader: Makes the batches.
        predictor: Computes their predictions.
        part_builder: Writes the parts and commits them.
        parallel_batches: Batches that the model computes at the same time.
        is_stopped: Returns True as soon as no further batch may begin.
        timing_sink: Receives how long each stage of each batch took.
        wait_step: Wraps the wait for each batch, so that a loader that hangs is noticed.
    """

    def __init__(
        self,
        loader: BatchSource,
        predictor: FaultIsolatingPredictor,
        part_builder: PartBuilder,
        parallel_batches: int,
        is_stopped: Callable[[], bool],
        timing_sink: TimingSink,
        wait_step: Callable[[], AbstractContextManager[None]],
    ) -> None:
        self._loader, self._predictor, self._part_builder = loader, predictor, part_builder
        self._parallel_batches, self._is_stopped = parallel_batches, is_stopped
        self._timing_sink, self._wait_step = timing_sink, wait_step
        self._last_ready = 0.0  # when the device had the latest predictions ready, by `time.perf_counter`

    def run(self, queue: ShardQueue) -> None:
        """Run shards until the queue has none now; the last parts may be committed some time later."""
        try:
            for result in self._predict_batches(queue, self._wait_for_batches(self._loader.batches(queue))):
                if self._is_stopped():
                    return
                self._advance(queue, result)
        except BatchjobError as error:
            self._fail_in_flight(queue, error)
        for shard in queue.take_empty_shards():
            self._part_builder.add_empty_shard(shard)

    def _fail_in_flight(self, queue: ShardQueue, error: BatchjobError) -> None:
        """End all attempts in flight: the loader itself has failed, and what it held is lost.

        Only the oldest shard was being loaded. The others merely waited behind it, so their attempts do not count.
        """
        in_flight = [shard for shard in queue.in_flight() if not self._part_builder.has_failed(shard.attempt_number)]
        for place, shard in enumerate(in_flight):
            queue.drop(shard)
            cause = _as_interruption(error) if place else self._predictor.as_device_fault(error)
            self._part_builder.fail_attempt(shard, cause)

    def _predict_batches(self, queue: ShardQueue, batches: Iterator[Batch]) -> Iterator[_BatchResult]:
        """Yield the results of the batches in order, computed as many at a time as `parallel_batches` says."""
        predict, parallel = partial(self._predict_batch, queue), self._parallel_batches
        if parallel == 1:
            return map(predict, batches)
        return parallel_map(predict, batches, threads=parallel, prefetch=parallel + 1)

    def _predict_batch(self, queue: ShardQueue, batch: Batch) -> _BatchResult:
        shard = queue.find_shard(batch)
        if shard is None or self._part_builder.has_failed(shard.attempt_number):
            return _BatchResult(batch)
        started = time.perf_counter()
        images = len(batch.image_infos)
        try:
            rows = slice(batch.start, batch.start + images)
            prediction = self._predictor.predict(batch, [ref.position for ref in shard.refs[rows]])
        except Exception as error:  # noqa: BLE001 - ends this attempt; the driver decides what else it ends
            return _BatchResult(batch, error=as_batchjob_error(error))
        if self._parallel_batches > 1:
            # The copies from the pixels are complete, and the memory shared with loader processes is scarce.
            batch = replace(batch, pixels=None)
        if prediction is None or not prediction.pending:
            return _BatchResult(batch, prediction, record_timing(self._timing_sink, "forward", started, images))
        pending = prediction.on_ready(partial(self._time_until_ready, started, images))
        return _BatchResult(batch, pending, time.perf_counter() - started)

    def _time_until_ready(self, started: float, images: int, wait_until_ready: Callable[[], None]) -> None:
        """Record the forward time of a batch on a GPU.

        The GPU computes batches one after another, so the time of a batch begins when the one before it was ready.
        """
        wait_until_ready()
        record_timing(self._timing_sink, "forward", max(started, self._last_ready), images)
        self._last_ready = time.perf_counter()

    def _advance(self, queue: ShardQueue, result: _BatchResult) -> None:
        """Hand a result on to the part of its shard."""
        batch = result.batch
        shard = queue.find_shard(batch)
        if shard is None:
            return
        if self._part_builder.has_failed(shard.attempt_number):
            queue.drop(shard)
            return
        if result.error is not None:
            queue.drop(shard)
            self._part_builder.fail_attempt(shard, result.error)
            return
        is_last = batch.start + len(batch.image_infos) >= len(shard.refs)
        self._part_builder.add(shard, batch, result.prediction, forward_seconds=result.seconds, is_last=is_last)
        if is_last:
            queue.drop(shard)

    def _wait_for_batches(self, batches: Iterator[Batch]) -> Iterator[Batch]:
        """Yield the batches; record how long each was waited for and how long its loading took."""
        while True:
            started = time.perf_counter()
            with self._wait_step():
                batch = next(batches, None)
            record_timing(self._timing_sink, "wait", started, 0 if batch is None else len(batch.image_infos))
            if batch is None:
                return
            for timing in batch.timings:
                self._timing_sink(timing)
            yield batch


@dataclass(frozen=True)
class _BatchResult:
    """Prediction of a batch, or the error that ends its attempt.

    Attributes:
        batch: The batch; without pixels if nothing needs them any more.
        prediction: None if the batch holds no good image.
        seconds: Time that the prediction took in this thread.
        error: Reason why there is no prediction.
    """

    batch: Batch
    prediction: Prediction | None = None
    seconds: float = 0.0
    error: BatchjobError | None = None


def _as_interruption(error: BatchjobError) -> BatchjobError:
    """Convert the error of the shard at which a loader process died for the shards that waited behind it."""
    return AttemptInterrupted(error.message) if isinstance(error, AttemptFailed) else error
