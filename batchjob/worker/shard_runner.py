"""Batches on their way from the loader through the model into their parts, shard after shard."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from dataclasses import dataclass, replace
from functools import partial
from itertools import count
from typing import Protocol

from batchjob.concurrency import parallel_map
from batchjob.errors import AttemptFailed, AttemptInterrupted, BatchjobError, as_batchjob_error
from batchjob.inference.fault_isolation import FaultIsolatingPredictor
from batchjob.loader.loader import ShardQueue
from batchjob.output.part_builder import PartBuilder
from batchjob.types import Batch, Prediction, Shard, TimingSink, record_timing

__all__ = ["AttemptQueue", "ShardRunner", "ShardSource"]


class BatchSource(Protocol):
    """What makes batches of shards; see `Loader`."""

    def batches(self, queue: ShardQueue) -> Iterator[Batch]:
        """In order, until the feed gives None."""


class ShardRunner:
    """Takes shards as long as there are any.

    Args:
        loader: makes the batches.
        guard: predicts them.
        assembly: makes the parts, and tells what became of each shard.
        lanes: batches that the model computes at once.
        stopped: whether no further batch is to be begun.
        watch: told how long each stage of each batch took.
        waiting: around the wait for each batch.
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
        self._loader, self._guard, self._assembly = loader, predictor, part_builder
        self._lanes, self._stopped, self._watch, self._waiting = parallel_batches, is_stopped, timing_sink, wait_step
        self._takes = count()
        self._arrived = 0.0  # the latest results, by `time.perf_counter`

    def run(self, queue: ShardSource) -> None:
        """Take shards from the feed until it has none now. What becomes of each is told, some of it later."""
        taken = AttemptQueue(queue, self._assembly.has_failed, self._takes)
        try:
            for attempt in self._attempts(taken, self._awaited(self._loader.batches(taken))):
                if self._stopped():
                    return
                self._advance(taken, attempt)
        except BatchjobError as error:  # the loader itself: what it held is lost
            for place, shard in enumerate(taken.unfinished_shards()):
                self._assembly.fail_attempt(shard, _beside(error) if place else self._guard.as_device_fault(error))
        for shard in taken.empty_shards:
            self._assembly.add_empty_shard(shard)

    def _attempts(self, taken: AttemptQueue, batches: Iterator[Batch]) -> Iterator[_BatchResult]:
        """Batches through the model, as many at once as there are lanes, in their order."""
        attempted, most = partial(self._attempted, taken), self._lanes
        if most == 1:
            return map(attempted, batches)
        return parallel_map(attempted, batches, threads=most, prefetch=most + 1)

    def _attempted(self, taken: AttemptQueue, batch: Batch) -> _BatchResult:
        shard = taken.shards.get(batch.attempt_number)
        if shard is None or not taken.is_wanted(shard):
            return _BatchResult(batch)
        began = time.perf_counter()
        try:
            rows = slice(batch.start, batch.start + len(batch.image_infos))
            predicted = self._guard.predict(batch, [ref.position for ref in shard.refs[rows]])
        except Exception as error:  # noqa: BLE001 - ends this attempt; the driver decides how far it reaches
            return _BatchResult(batch, error=as_batchjob_error(error))
        if self._lanes > 1:  # nothing copies from there any more, and what loader processes share is scarce
            batch = replace(batch, pixels=None)
        images = len(batch.image_infos)
        if predicted is None or not predicted.pending:
            return _BatchResult(batch, predicted, record_timing(self._watch, "forward", began, images))
        landed = predicted.on_ready(partial(self._landing, began, images))
        return _BatchResult(batch, landed, time.perf_counter() - began)

    def _landing(self, began: float, images: int, arrival: Callable[[], None]) -> None:
        """A device's results have been computed once they are waited for, and not before those of the batch ahead."""
        arrival()
        record_timing(self._watch, "forward", max(began, self._arrived), images)
        self._arrived = time.perf_counter()

    def _advance(self, taken: AttemptQueue, attempt: _BatchResult) -> None:
        batch = attempt.batch
        shard = taken.shards.get(batch.attempt_number)
        if shard is None or not taken.is_wanted(shard):
            return
        if attempt.error is not None:
            del taken.shards[batch.attempt_number]
            self._assembly.fail_attempt(shard, attempt.error)
            return
        last = batch.start + len(batch.image_infos) >= len(shard.refs)
        self._assembly.add(shard, batch, attempt.predicted, forward_seconds=attempt.seconds, is_last=last)
        if last:
            del taken.shards[batch.attempt_number]

    def _awaited(self, batches: Iterator[Batch]) -> Iterator[Batch]:
        """The same; the watch is told how long each was waited for, and how it was made."""
        while True:
            began = time.perf_counter()
            with self._waiting():
                batch = next(batches, None)
            record_timing(self._watch, "wait", began, 0 if batch is None else len(batch.image_infos))
            if batch is None:
                return
            for span in batch.timings:
                self._watch(span)
            yield batch


@dataclass(frozen=True)
class _BatchResult:
    """What became of a batch: a prediction (none where no image was good) that took so many seconds, or an error."""

    batch: Batch
    predicted: Prediction | None = None
    seconds: float = 0.0
    error: BatchjobError | None = None


def _beside(error: BatchjobError) -> BatchjobError:
    """What is said of shards that were queued behind the one that a loader process died at."""
    return AttemptInterrupted(error.message) if isinstance(error, AttemptFailed) else error


class ShardSource(Protocol):
    """Where a worker gets its next shard from."""

    def next_shard(self) -> Shard | None:
        """The next shard if one is there now, else None. Never blocks, never raises."""


class AttemptQueue:
    """The pool's feed as the loader sees it: what it gave is numbered, and remembered until it is through.

    Args:
        pool: gives the next shard.
        failed: whether the attempt of that number has ended without a part.
        numbers: never the same twice in a worker.
    """

    def __init__(self, source: ShardSource, has_failed: Callable[[int], bool], attempt_numbers: Iterator[int]) -> None:
        self._pool, self._failed, self._numbers = source, has_failed, attempt_numbers
        self.shards: dict[int, Shard] = {}
        self.empty_shards: list[Shard] = []

    def next_shard(self) -> Shard | None:
        given = self._pool.next_shard()
        if given is None:
            return None
        shard = replace(given, attempt_number=next(self._numbers))
        if shard.refs:
            self.shards[shard.attempt_number] = shard
        else:
            self.empty_shards.append(shard)
        return shard

    def is_wanted(self, shard: Shard) -> bool:
        return shard.attempt_number in self.shards and not self._failed(shard.attempt_number)

    def unfinished_shards(self) -> list[Shard]:
        """Those of which more batches were to come, in the order they were taken."""
        return [shard for shard in self.shards.values() if self.is_wanted(shard)]
