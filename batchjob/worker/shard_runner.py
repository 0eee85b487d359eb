"""Batches on their way from the loader through the model into their parts, shard after shard."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from dataclasses import dataclass, replace
from functools import partial
from itertools import count
from typing import Protocol

from batchjob.concurrency import side_by_side
from batchjob.errors import AttemptFailed, BatchjobError, Interrupted, as_ours
from batchjob.inference.fault_isolation import Guard
from batchjob.loader.loader import ShardFeed
from batchjob.output.part_builder import Assembly
from batchjob.types import Batch, Predicted, Shard, Watch, spent

__all__ = ["Passage", "PoolFeed", "Taken"]


class Batches(Protocol):
    """What makes batches of shards; see `Loader`."""

    def batches(self, feed: ShardFeed) -> Iterator[Batch]:
        """In order, until the feed gives None."""


class Passage:
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
        loader: Batches,
        guard: Guard,
        assembly: Assembly,
        lanes: int,
        stopped: Callable[[], bool],
        watch: Watch,
        waiting: Callable[[], AbstractContextManager[None]],
    ) -> None:
        self._loader, self._guard, self._assembly = loader, guard, assembly
        self._lanes, self._stopped, self._watch, self._waiting = lanes, stopped, watch, waiting
        self._takes = count()
        self._arrived = 0.0  # the latest results, by `time.perf_counter`

    def run(self, feed: PoolFeed) -> None:
        """Take shards from the feed until it has none now. What becomes of each is told, some of it later."""
        taken = Taken(feed, self._assembly.failed, self._takes)
        try:
            for attempt in self._attempts(taken, self._awaited(self._loader.batches(taken))):
                if self._stopped():
                    return
                self._advance(taken, attempt)
        except BatchjobError as error:  # the loader itself: what it held is lost
            for place, shard in enumerate(taken.running()):
                self._assembly.fail(shard, _beside(error) if place else self._guard.as_device_fault(error))
        for shard in taken.empty:
            self._assembly.add_empty(shard)

    def _attempts(self, taken: Taken, batches: Iterator[Batch]) -> Iterator[_Attempt]:
        """Batches through the model, as many at once as there are lanes, in their order."""
        attempted, most = partial(self._attempted, taken), self._lanes
        if most == 1:
            return map(attempted, batches)
        return side_by_side(attempted, batches, threads=most, ahead=most + 1)

    def _attempted(self, taken: Taken, batch: Batch) -> _Attempt:
        shard = taken.shards.get(batch.take)
        if shard is None or not taken.wants(shard):
            return _Attempt(batch)
        began = time.perf_counter()
        try:
            rows = slice(batch.start, batch.start + len(batch.facts))
            predicted = self._guard.predicted(batch, [ref.position for ref in shard.refs[rows]])
        except Exception as error:  # noqa: BLE001 - ends this attempt; the driver decides how far it reaches
            return _Attempt(batch, error=as_ours(error))
        if self._lanes > 1:  # nothing copies from there any more, and what loader processes share is scarce
            batch = replace(batch, pixels=None)
        images = len(batch.facts)
        if predicted is None or not predicted.pending:
            return _Attempt(batch, predicted, spent(self._watch, "forward", began, images))
        landed = predicted.landing(partial(self._landing, began, images))
        return _Attempt(batch, landed, time.perf_counter() - began)

    def _landing(self, began: float, images: int, arrival: Callable[[], None]) -> None:
        """A device's results have been computed once they are waited for, and not before those of the batch ahead."""
        arrival()
        spent(self._watch, "forward", max(began, self._arrived), images)
        self._arrived = time.perf_counter()

    def _advance(self, taken: Taken, attempt: _Attempt) -> None:
        batch = attempt.batch
        shard = taken.shards.get(batch.take)
        if shard is None or not taken.wants(shard):
            return
        if attempt.error is not None:
            del taken.shards[batch.take]
            self._assembly.fail(shard, attempt.error)
            return
        last = batch.start + len(batch.facts) >= len(shard.refs)
        self._assembly.add(shard, batch, attempt.predicted, seconds=attempt.seconds, last=last)
        if last:
            del taken.shards[batch.take]

    def _awaited(self, batches: Iterator[Batch]) -> Iterator[Batch]:
        """The same; the watch is told how long each was waited for, and how it was made."""
        while True:
            began = time.perf_counter()
            with self._waiting():
                batch = next(batches, None)
            spent(self._watch, "wait", began, 0 if batch is None else len(batch.facts))
            if batch is None:
                return
            for span in batch.spans:
                self._watch(span)
            yield batch


@dataclass(frozen=True)
class _Attempt:
    """What became of a batch: a prediction (none where no image was good) that took so many seconds, or an error."""

    batch: Batch
    predicted: Predicted | None = None
    seconds: float = 0.0
    error: BatchjobError | None = None


def _beside(error: BatchjobError) -> BatchjobError:
    """What is said of shards that were queued behind the one that a loader process died at."""
    return Interrupted(error.message) if isinstance(error, AttemptFailed) else error


class PoolFeed(Protocol):
    """Where a worker gets its next shard from."""

    def take(self) -> Shard | None:
        """The next shard if one is there now, else None. Never blocks, never raises."""


class Taken:
    """The pool's feed as the loader sees it: what it gave is numbered, and remembered until it is through.

    Args:
        pool: gives the next shard.
        failed: whether the attempt of that number has ended without a part.
        numbers: never the same twice in a worker.
    """

    def __init__(self, pool: PoolFeed, failed: Callable[[int], bool], numbers: Iterator[int]) -> None:
        self._pool, self._failed, self._numbers = pool, failed, numbers
        self.shards: dict[int, Shard] = {}
        self.empty: list[Shard] = []

    def take(self) -> Shard | None:
        given = self._pool.take()
        if given is None:
            return None
        shard = replace(given, take=next(self._numbers))
        if shard.refs:
            self.shards[shard.take] = shard
        else:
            self.empty.append(shard)
        return shard

    def wants(self, shard: Shard) -> bool:
        return shard.take in self.shards and not self._failed(shard.take)

    def running(self) -> list[Shard]:
        """Those of which more batches were to come, in the order they were taken."""
        return [shard for shard in self.shards.values() if self.wants(shard)]
