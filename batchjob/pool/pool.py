"""The seam between the driver and whoever runs workers: submit shard keys, wait for what became of them."""

from __future__ import annotations

from typing import Protocol

from batchjob.types import ShardKey
from batchjob.worker.messages import WorkerEvent, WorkerSetup

__all__ = ["Pool"]


class Pool(Protocol):
    """Workers, somewhere. Every method returns soon; only `wait` waits, and no longer than told."""

    @property
    def size(self) -> int:
        """Workers wanted; 0 as long as that is not known."""

    def start(self, setup: WorkerSetup) -> None:
        """Begin to start workers; their readiness or failure comes through `wait`."""

    def free_slots(self) -> int:
        """Shards that would be taken on now: two are kept queued a worker, see `Placement`."""

    def submit(self, key: ShardKey, plan_number: int) -> None:
        """Hand a shard of plan number `plan` to some worker."""

    def idle_workers(self) -> int:
        """Workers that have nothing in hand."""

    def submit_speculative(self, key: ShardKey, plan_number: int) -> None:
        """Hand a shard that a worker has in hand to one that has nothing; see `idle`. Both say what became of it."""

    def wait(self, timeout: float) -> list[WorkerEvent]:
        """What happened, at the latest after `timeout` seconds."""

    def close(self) -> None:
        """Stop all workers now, leave nothing behind."""
