"""The pool of one: the worker in a thread of this process, for debugging and for machines without Ray."""

from __future__ import annotations

import queue
from pathlib import Path

from batchjob.pool.placement import Placement, account
from batchjob.types import ShardKey
from batchjob.worker.messages import Event, Setup
from batchjob.worker.worker_thread import _NAME, _Loop

__all__ = ["LocalPool"]


class LocalPool:
    """One worker in this process. See `Pool`. Where that worker is lost, so is the run, but for another process.

    Args:
        cores: how many the worker may use.
        base: the job's folder as seen from here; None where it is the one that the setup names.
    """

    size = 1

    def __init__(self, cores: int, base: Path | None = None) -> None:
        self._cores, self._base = cores, base
        self._events: queue.Queue[Event] = queue.Queue()  # a SimpleQueue's get may never end (test_local.py)
        self._loop: _Loop | None = None
        self._placement = Placement()

    def start(self, setup: Setup) -> None:
        base = self._base or Path(setup.folder)
        self._loop = _Loop(setup, base, self._cores, self._events.put)

    def free(self) -> int:
        return self._placement.free()

    def submit(self, key: ShardKey, plan: int, again: bool = False) -> None:
        self._placement.submit(key, plan, again)
        self._hand_over()

    def idle(self) -> int:
        return 0  # nobody is beside the one

    def back_up(self, key: ShardKey, plan: int) -> None:
        raise AssertionError(f"shard {key.index} of plan {plan} has nowhere else to go")

    def wait(self, timeout: float) -> list[Event]:
        events: list[Event] = []
        try:
            events.append(self._events.get(timeout=timeout))
            while True:
                events.append(self._events.get_nowait())
        except queue.Empty:
            pass
        for event in events:
            account(self._placement, _NAME, event)
        self._hand_over()
        return events

    def close(self) -> None:
        if self._loop is not None:
            self._loop.close()

    def _hand_over(self) -> None:
        assert self._loop is not None, "start comes before all else"
        for due in self._placement.due():
            self._loop.submit(due)
