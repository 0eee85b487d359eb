"""The pool of one: the worker in a thread of this process, for debugging and for machines without Ray."""

from __future__ import annotations

import queue
import threading
from collections.abc import Callable
from pathlib import Path

from batchjob.errors import DeviceFault, as_batchjob_error, as_crash_error, describe_error
from batchjob.inference.device_errors import classify_device_error
from batchjob.job.job import Job
from batchjob.loader.shard_queue import ShardQueue
from batchjob.pool.placement import Assignment
from batchjob.types import Shard
from batchjob.worker.messages import ShardFailed, WorkerEvent, WorkerFailed, WorkerReady, WorkerSetup
from batchjob.worker.worker import Worker

_NAME = "local"
_CLOSE_SECONDS = 5.0
_LOOK_SECONDS = 0.5


class WorkerThread:
    """The worker's thread: loads, then works through the shards that are submitted, until closed."""

    def __init__(
        self, setup: WorkerSetup, job_folder: Path, cores: int, on_event: Callable[[WorkerEvent], None]
    ) -> None:
        self._setup, self._base, self._cores, self._tell = setup, job_folder, cores, on_event
        self._due: queue.SimpleQueue[Assignment | None] = queue.SimpleQueue()
        self._next: Assignment | None = None
        self._closed = threading.Event()
        self._worker: Worker | None = None
        self._thread = threading.Thread(target=self._work, name="worker", daemon=True)
        self._thread.start()
        threading.Thread(target=self._look_out, name="watchdog", daemon=True).start()

    def submit(self, assignment: Assignment) -> None:
        self._due.put(assignment)

    def close(self) -> None:
        self._closed.set()
        if self._worker is not None:
            self._worker.stop()
        self._due.put(None)
        self._thread.join(_CLOSE_SECONDS)

    def _next_shard(self) -> Shard | None:
        """Read the next shard if one is assigned now."""
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
                return self._worker.read_shard(due.key, due.reattempt)
            except Exception as error:  # noqa: BLE001 - this shard's attempt ends, the feed goes on
                self._tell(ShardFailed(due.key, as_batchjob_error(error)))
        return None

    def _work(self) -> None:
        try:
            job = Job.deserialize(self._setup.job, self._base, Path(self._setup.job_folder))
            self._worker = worker = Worker(job, self._setup, self._cores, self._tell)
            try:
                self._tell(WorkerReady(_NAME, worker.load()))
                self._go_round(worker)
            finally:
                worker.close()
        except BaseException as error:  # noqa: BLE001 - the driver is told: nobody else hears what ends this thread
            self._tell(WorkerFailed(as_crash_error(self._device_fault(error) or error)))

    def _device_fault(self, error: BaseException) -> DeviceFault | None:
        """What is said of an error that a broken device has caused while the worker loaded or began."""
        if isinstance(error, DeviceFault) or self._worker is None or classify_device_error(error) is None:
            return None
        device = self._worker.device
        return DeviceFault(f"{device} failed: {describe_error(error)}; the same command resumes", device)

    def _look_out(self) -> None:
        """In a thread of its own: the worker's cannot tell that it hangs, nor be ended."""
        while not self._closed.wait(_LOOK_SECONDS):
            if self._worker is not None and (overdue := self._worker.find_stall()) is not None:
                self._tell(WorkerFailed(overdue))
                return

    def _go_round(self, worker: Worker) -> None:
        """Wait for a shard, then work until none is there; again until closed."""
        queue = ShardQueue(self._next_shard, lambda: not self._closed.is_set())
        while (due := self._due.get()) is not None:
            self._next = due
            worker.join_plan(due.plan_number)
            worker.run(queue)
            if self._closed.is_set():
                return
