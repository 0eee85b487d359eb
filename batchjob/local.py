"""The pool of one: the worker in a thread of this process, for debugging and for machines without Ray."""

from __future__ import annotations

import queue
import threading
from collections.abc import Callable
from pathlib import Path

from batchjob.assembly import as_ours
from batchjob.breakage import breakage
from batchjob.errors import DeviceFault
from batchjob.job import Job
from batchjob.placement import Assignment, Placement
from batchjob.pool import Event, Failed, Ready, Setup, WorkerFailed
from batchjob.records import Shard, ShardKey
from batchjob.told import account, as_crash, named
from batchjob.worker import Worker

__all__ = ["LocalPool"]

_NAME = "local"
_CLOSE_SECONDS = 5.0
_LOOK_SECONDS = 0.5


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


class _Loop:
    """The worker's thread: loads, then works through the shards that are submitted, until closed."""

    def __init__(self, setup: Setup, base: Path, cores: int, tell: Callable[[Event], None]) -> None:
        self._setup, self._base, self._cores, self._tell = setup, base, cores, tell
        self._due: queue.SimpleQueue[Assignment | None] = queue.SimpleQueue()
        self._next: Assignment | None = None
        self._closed = threading.Event()
        self._worker: Worker | None = None
        self._thread = threading.Thread(target=self._work, name="worker", daemon=True)
        self._thread.start()
        threading.Thread(target=self._look_out, name="watchdog", daemon=True).start()

    def submit(self, due: Assignment) -> None:
        self._due.put(due)

    def close(self) -> None:
        self._closed.set()
        if self._worker is not None:
            self._worker.stop()
        self._due.put(None)
        self._thread.join(_CLOSE_SECONDS)

    def take(self) -> Shard | None:
        """The feed's side: the next shard if one is there now."""
        while not self._closed.is_set():
            due, self._next = self._next, None
            try:
                due = due or self._due.get_nowait()
            except queue.Empty:
                return None
            if due is None:
                return None
            assert self._worker is not None
            try:
                return self._worker.shard(due.key, due.again)
            except Exception as error:  # noqa: BLE001 - this shard's attempt ends, the feed goes on
                self._tell(Failed(due.key, as_ours(error)))
        return None

    def _work(self) -> None:
        try:
            job = Job.from_portable(self._setup.job, self._base, Path(self._setup.folder))
            self._worker = worker = Worker(job, self._setup, self._cores, self._tell)
            try:
                self._tell(Ready(_NAME, worker.load()))
                self._go_round(worker)
            finally:
                worker.close()
        except BaseException as error:  # noqa: BLE001 - the driver is told: nobody else hears what ends this thread
            self._tell(WorkerFailed(as_crash(self._device_fault(error) or error)))

    def _device_fault(self, error: BaseException) -> DeviceFault | None:
        """What is said of an error that a broken device has caused while the worker loaded or began."""
        if isinstance(error, DeviceFault) or self._worker is None or breakage(error) is None:
            return None
        device = self._worker.device
        return DeviceFault(f"{device} failed: {named(error)}; the same command resumes", device)

    def _look_out(self) -> None:
        """In a thread of its own: the worker's cannot tell that it hangs, nor be ended."""
        while not self._closed.wait(_LOOK_SECONDS):
            if self._worker is not None and (overdue := self._worker.overdue()) is not None:
                self._tell(WorkerFailed(overdue))
                return

    def _go_round(self, worker: Worker) -> None:
        """Wait for a shard, then work until none is there; again until closed."""
        while (due := self._due.get()) is not None:
            self._next = due
            worker.begin(due.plan)
            worker.run(self)
            if self._closed.is_set():
                return
