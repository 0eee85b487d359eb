"""The seam between the driver and whoever runs workers: submit shard keys, wait for what became of them."""

from __future__ import annotations

from typing import Protocol

from batchjob.types import ShardKey
from batchjob.worker.messages import Event, Setup

__all__ = ["Pool"]


class Pool(Protocol):
    """Workers, somewhere. Every method returns soon; only `wait` waits, and no longer than told."""

    @property
    def size(self) -> int:
        """Workers wanted; 0 as long as that is not known."""

    def start(self, setup: Setup) -> None:
        """Begin to start workers; their readiness or failure comes through `wait`."""

    def free(self) -> int:
        """Shards that would be taken on now: two are kept queued a worker, see `Placement`."""

    def submit(self, key: ShardKey, plan: int) -> None:
        """Hand a shard of plan number `plan` to some worker."""

    def idle(self) -> int:
        """Workers that have nothing in hand."""

    def back_up(self, key: ShardKey, plan: int) -> None:
        """Hand a shard that a worker has in hand to one that has nothing; see `idle`. Both say what became of it."""

    def wait(self, timeout: float) -> list[Event]:
        """What happened, at the latest after `timeout` seconds."""

    def close(self) -> None:
        """Stop all workers now, leave nothing behind."""
