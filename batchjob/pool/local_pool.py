"""Pool of one worker in a thread of this process, for debugging and for machines without Ray."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

from batchjob.pool.placement import Placement
from batchjob.types import ShardKey
from batchjob.worker.messages import WorkerEvent, WorkerSetup
from batchjob.worker.worker_thread import WorkerThread

__all__ = ["LocalPool"]

_WORKER = "local"


class LocalPool:
    """One worker in this process. See `Pool`.

    The run ends with its worker: only another process can replace a worker that is lost.

    Args:
        cores: Cores that the worker may use, loader processes included.
    """

    size = 1

    def __init__(self, cores: int) -> None:
        self._cores = cores
        self._thread: WorkerThread | None = None
        self._placement = Placement()

    def start(self, setup: WorkerSetup) -> None:
        self._thread = WorkerThread(_WORKER, replace(setup, pool_size=self.size), Path(setup.job_folder), self._cores)

    def free_slots(self) -> int:
        return self._placement.free_slots()

    def submit(self, key: ShardKey, plan_number: int) -> None:
        self._placement.submit(key, plan_number)
        self._send_assignments()

    def idle_workers(self) -> int:
        # No worker could make a second attempt beside the only one.
        return 0

    def submit_speculative(self, key: ShardKey, plan_number: int) -> None:
        raise AssertionError(f"shard {key.index} of plan {plan_number}: there is no second worker")

    def wait(self, timeout: float) -> list[WorkerEvent]:
        events = self._thread.wait(timeout) if self._thread is not None else []
        for event in events:
            self._placement.apply(_WORKER, event)
        self._send_assignments()
        return events

    def close(self) -> None:
        if self._thread is not None:
            self._thread.close()

    def _send_assignments(self) -> None:
        # Before `start` no worker is ready, so there are no assignments.
        if self._thread is not None:
            for assignment in self._placement.take_assignments():
                self._thread.submit(assignment)
