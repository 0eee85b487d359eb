"""The shards that a worker has in hand: what it takes from its pool, numbered, until it is through or has failed."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import Protocol

from batchjob.records import Shard

__all__ = ["PoolFeed", "Taken"]


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
