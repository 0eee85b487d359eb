"""Thread that holds one worker: a pool submits assignments to it and waits for its events."""

from __future__ import annotations

import queue
import threading
import time
from collections import deque
from contextlib import closing
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

from batchjob.errors import as_batchjob_error, as_crash_error
from batchjob.job.job import Job
from batchjob.loader.shard_queue import ShardQueue
from batchjob.types import Shard
from batchjob.worker.loader_forkserver import start_loader_forkserver
from batchjob.worker.messages import Assignment, ShardFailed, WorkerEvent, WorkerFailed, WorkerReady, WorkerSetup

# These import torch, which takes seconds. The thread does so, while its pool goes on: a driver has a lease to renew.
if TYPE_CHECKING:
    from batchjob.worker.plan_session import PlanSession
    from batchjob.worker.setup import LoadedWorker
    from batchjob.worker.worker import Worker

__all__ = ["WorkerThread"]

_CLOSE_SECONDS = 5.0
_WATCHDOG_SECONDS = 0.5


class WorkerThread:
    """Worker in a thread of its own. It loads at once, then runs assigned shards until it is closed.

    A second thread watches it: a worker that hangs can neither tell so itself nor be ended.

    Events, in order: one `WorkerReady`; then a `ShardCommitted` or `ShardFailed` per assignment. `WorkerFailed` at any
    time is the last one.

    Args:
        name: Name of the worker.
        setup: The driver's message.
        job_folder: Folder of the job on this machine.
        cores: Cores that the worker may use, loader processes included.
    """

    def __init__(self, name: str, setup: WorkerSetup, job_folder: Path, cores: int) -> None:
        self._name, self._setup, self._job_folder, self._cores = name, setup, job_folder, cores
        # Not a SimpleQueue: in Python 3.11 its `get` may never return after a signal (test_local_pool.py).
        self._events: queue.Queue[WorkerEvent] = queue.Queue()
        self._assignments: deque[Assignment] = deque()
        self._changed = threading.Condition()
        self._closed = threading.Event()
        self._worker: Worker | None = None
        self._thread = threading.Thread(target=self._run, name="worker", daemon=True)
        self._thread.start()
        threading.Thread(target=self._watch, name="watchdog", daemon=True).start()

    def submit(self, assignment: Assignment) -> None:
        """Run a shard after those that were submitted before."""
        with self._changed:
            self._assignments.append(assignment)
            self._changed.notify()

    def wait(self, timeout: float) -> list[WorkerEvent]:
        """Return the events since the last call; wait for the first one, at most `timeout` seconds."""
        events: list[WorkerEvent] = []
        try:
            events.append(self._events.get(timeout=timeout))
            while True:
                events.append(self._events.get_nowait())
        except queue.Empty:
            return events

    def close(self) -> None:
        """Begin no further batch, and give the parts that are complete a few seconds to be committed."""
        self._closed.set()
        with self._changed:
            self._changed.notify()
        self._thread.join(_CLOSE_SECONDS)

    def _run(self) -> None:
        started = time.monotonic()
        try:
            job = Job.deserialize(self._setup.job, self._job_folder, Path(self._setup.job_folder))
            # The fork server and this thread import torch at the same time.
            start_loader_forkserver(job)
            from batchjob.worker import setup

            with closing(setup.load(job, self._setup, self._cores, started)) as loaded:
                self._events.put(WorkerReady(self._name, loaded.info))
                with setup.report_device_faults(loaded.info.device):
                    self._run_shards(loaded)
        except BaseException as error:  # noqa: BLE001 - an error that ends this thread reaches the driver only as event
            self._events.put(WorkerFailed(as_crash_error(error)))

    def _run_shards(self, loaded: LoadedWorker) -> None:
        """Join the plan of the first assignment; run shards as they are assigned, until closed."""
        from batchjob.worker.plan_session import PlanSession
        from batchjob.worker.worker import Worker

        is_stopped = self._closed.is_set
        if (first := self._wait_for_assignment()) is None:
            return
        session = PlanSession.join(loaded, first.plan_number, is_stopped)
        with closing(Worker(loaded, session, on_event=self._events.put, is_stopped=is_stopped)) as worker:
            self._worker = worker
            shards = ShardQueue(partial(self._read_next_shard, session), is_open=lambda: not is_stopped())
            while self._wait_for_assignment() is not None:
                worker.run(shards)

    def _wait_for_assignment(self) -> Assignment | None:
        """Return the first assignment in line, which stays there; None once closed."""
        with self._changed:
            self._changed.wait_for(lambda: self._assignments or self._closed.is_set())
            return None if self._closed.is_set() else self._assignments[0]

    def _read_next_shard(self, session: PlanSession) -> Shard | None:
        """Read the shard of the next assignment, None if there is none now. A shard that cannot be read has failed."""
        while True:
            with self._changed:
                if not self._assignments:
                    return None
                assignment = self._assignments.popleft()
            try:
                return session.read_shard(assignment.key, assignment.reattempt)
            except Exception as error:  # noqa: BLE001 - ends this attempt, the others go on
                self._events.put(ShardFailed(assignment.key, as_batchjob_error(error)))

    def _watch(self) -> None:
        """Report the first step that hangs."""
        while not self._closed.wait(_WATCHDOG_SECONDS):
            if self._worker is not None and (stall := self._worker.find_stall()) is not None:
                self._events.put(WorkerFailed(stall))
                return
