"""Protocol between the driver and the workers: submit shards, wait for events."""

from __future__ import annotations

from typing import Protocol

from batchjob.types import ShardKey
from batchjob.worker.messages import WorkerEvent, WorkerSetup

__all__ = ["Pool"]


class Pool(Protocol):
    """Workers, in this process or on a cluster. Every method returns soon; only `wait` waits.

    Example:
        >>> pool.start(setup)
        >>> while not pool.free_slots():
        ...     events = pool.wait(1.0)  # [WorkerReady("0", info)], after a while
        >>> pool.submit(key, plan_number=0)
        >>> pool.wait(60.0)
        [ShardCommitted(result)]
        >>> pool.close()
    """

    @property
    def size(self) -> int:
        """Number of workers wanted; 0 as long as it is unknown."""

    def start(self, setup: WorkerSetup) -> None:
        """Begin to start workers. `wait` reports when they are ready or have failed."""

    def free_slots(self) -> int:
        """Return the number of shards that the pool takes now. A few are queued per worker, see `Placement`."""

    def submit(self, key: ShardKey, plan_number: int) -> None:
        """Hand a shard of this plan to a worker. Call it only while there are free slots."""

    def idle_workers(self) -> int:
        """Count the workers that have nothing to do."""

    def submit_speculative(self, key: ShardKey, plan_number: int) -> None:
        """Hand a shard that one worker is working on to an idle worker, too. Both report their results."""

    def wait(self, timeout: float) -> list[WorkerEvent]:
        """Return the events since the last call; wait for the first one, at most `timeout` seconds."""

    def close(self) -> None:
        """Stop all workers now and leave nothing behind."""
