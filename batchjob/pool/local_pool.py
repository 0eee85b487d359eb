"""The pool of one: the worker in a thread of this process, for debugging and for machines without Ray."""

from __future__ import annotations

import queue
from pathlib import Path

from batchjob.pool.placement import Placement, apply_event
from batchjob.types import ShardKey
from batchjob.worker.messages import WorkerEvent, WorkerSetup
from batchjob.worker.worker_thread import _NAME, WorkerThread

__all__ = ["LocalPool"]


class LocalPool:
    """One worker in this process. See `Pool`. Where that worker is lost, so is the run, but for another process.

    Args:
        cores: how many the worker may use.
        base: the job's folder as seen from here; None where it is the one that the setup names.
    """

    size = 1

    def __init__(self, cores: int, job_folder: Path | None = None) -> None:
        self._cores, self._base = cores, job_folder
        self._events: queue.Queue[WorkerEvent] = queue.Queue()  # a SimpleQueue's get may never end (test_local.py)
        self._loop: WorkerThread | None = None
        self._placement = Placement()

    def start(self, setup: WorkerSetup) -> None:
        base = self._base or Path(setup.job_folder)
        self._loop = WorkerThread(setup, base, self._cores, self._events.put)

    def free_slots(self) -> int:
        return self._placement.free_slots()

    def submit(self, key: ShardKey, plan_number: int, reattempt: bool = False) -> None:
        self._placement.submit(key, plan_number, reattempt)
        self._hand_over()

    def idle_workers(self) -> int:
        return 0  # nobody is beside the one

    def submit_speculative(self, key: ShardKey, plan_number: int) -> None:
        raise AssertionError(f"shard {key.index} of plan {plan_number} has nowhere else to go")

    def wait(self, timeout: float) -> list[WorkerEvent]:
        events: list[WorkerEvent] = []
        try:
            events.append(self._events.get(timeout=timeout))
            while True:
                events.append(self._events.get_nowait())
        except queue.Empty:
            pass
        for event in events:
            apply_event(self._placement, _NAME, event)
        self._hand_over()
        return events

    def close(self) -> None:
        if self._loop is not None:
            self._loop.close()

    def _hand_over(self) -> None:
        assert self._loop is not None, "start comes before all else"
        for due in self._placement.take_assignments():
            self._loop.submit(due)
