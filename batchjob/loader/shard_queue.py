"""Queue of shards for a loader, which numbers the attempts and knows those in flight."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import replace
from functools import partial
from itertools import count
from typing import Self

from batchjob.types import Batch, Shard

__all__ = ["ShardQueue"]

# A part under construction is found by the number of its attempt, so a number is never used twice in a process. 0 is
# the number of a shard that no queue has handed out.
_attempt_numbers = count(1)


class ShardQueue:
    """Shards to be loaded one after another, and those of them that are in flight.

    `next_shard` gives each shard a new attempt number: a shard that failed may come again while batches of its first
    attempt are still on their way. An attempt is in flight from then on until `drop`. A shard without images has no
    batches and is never in flight; `take_empty_shards` returns it.

    Only one thread calls `next_shard` and `drop`; `is_wanted` and `find_shard` may be called from any thread.

    Example:
        >>> queue = ShardQueue.of([first, second])
        >>> shard = queue.next_shard()  # `first`, with attempt number 7
        >>> queue.is_wanted(shard.attempt_number)
        True
        >>> queue.drop(shard)  # its last batch has arrived, or its attempt has failed
        >>> queue.is_wanted(shard.attempt_number)
        False

    Args:
        pull: Returns the next shard if there is one now, else None. It neither blocks nor raises.
        is_open: Returns False as soon as no further shard and no further batch is needed.
    """

    def __init__(self, pull: Callable[[], Shard | None], is_open: Callable[[], bool] = lambda: True) -> None:
        self._pull, self._is_open = pull, is_open
        self._in_flight: dict[int, Shard] = {}
        self._empty: list[Shard] = []

    @classmethod
    def of(cls, shards: Iterable[Shard], is_open: Callable[[], bool] = lambda: True) -> Self:
        """Make a queue of shards that are all known from the start."""
        return cls(partial(next, iter(shards), None), is_open)

    def next_shard(self) -> Shard | None:
        """Return the next shard as a new attempt; None, which ends the loader's epoch, if there is none now."""
        shard = self._pull() if self._is_open() else None
        if shard is None:
            return None
        shard = replace(shard, attempt_number=next(_attempt_numbers))
        if shard.refs:
            self._in_flight[shard.attempt_number] = shard
        else:
            self._empty.append(shard)
        return shard

    def is_wanted(self, attempt_number: int) -> bool:
        """Return True if more batches of an attempt are needed. The loader asks for each request."""
        return attempt_number in self._in_flight and self._is_open()

    def find_shard(self, batch: Batch) -> Shard | None:
        """Return the shard that a batch belongs to, None if its attempt is no longer wanted."""
        return self._in_flight.get(batch.attempt_number) if self._is_open() else None

    def drop(self, shard: Shard) -> None:
        """End an attempt: no further batch of it is requested or used."""
        self._in_flight.pop(shard.attempt_number, None)

    def in_flight(self) -> list[Shard]:
        """Return the attempts of which more batches are to come, oldest first."""
        return list(self._in_flight.values())

    def take_empty_shards(self) -> list[Shard]:
        """Return the shards without images that `next_shard` has returned since the last call."""
        empty, self._empty = self._empty, []
        return empty
