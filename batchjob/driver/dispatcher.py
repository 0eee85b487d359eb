"""Dispatcher: give shards to the worker pool, take in its events, and decide which faults end the run."""

from __future__ import annotations

import time
from collections.abc import Callable

from batchjob.driver.control_loop import TICK_SECONDS
from batchjob.driver.progress import ProgressReporter
from batchjob.driver.scheduler import Scheduler
from batchjob.errors import AttemptInterrupted, BatchjobError, JobError, Unavailable
from batchjob.output.provenance import ShardResult
from batchjob.pool.pool import Pool
from batchjob.text import format_count
from batchjob.types import ShardKey
from batchjob.worker.messages import (
    PoolNotice,
    ShardCommitted,
    ShardFailed,
    WorkerEvent,
    WorkerFailed,
    WorkerInfo,
    WorkerReady,
    WorkerSetup,
)

__all__ = ["DRAIN_SECONDS", "Dispatcher", "MakePool"]

MakePool = Callable[[], Pool]
# A stopped run ends within 20 s. Closing the pool, giving the lease back and the exit need the rest.
DRAIN_SECONDS = 8.0
_MAX_UNAVAILABLE_IN_A_ROW = 3


class Dispatcher:
    """Worker pool of a run, started when it is needed, and the shards that it is given.

    Args:
        max_attempts: Failed attempts after which a shard is abandoned.
        make_pool: Makes the pool.
        progress: Gets commits and lines for the user.
        on_commit: Called once for each shard that is committed.

    Attributes:
        scheduler: Shards waiting, running, done and abandoned.
        workers: Workers that have loaded.
        on_starting: Called again and again until a worker has loaded, and then once for each that has.
    """

    def __init__(
        self,
        max_attempts: int,
        make_pool: MakePool,
        progress: ProgressReporter,
        on_commit: Callable[[ShardResult], object],
    ) -> None:
        self._make_pool, self._progress, self._on_commit = make_pool, progress, on_commit
        self._pool: Pool | None = None  # before `start`
        self._unavailable_in_a_row = 0
        self.scheduler = Scheduler(max_attempts)
        self.workers: list[WorkerInfo] = []
        self.on_starting: Callable[[], object] = lambda: None

    @property
    def started(self) -> bool:
        """True if the pool has been started."""
        return self._pool is not None

    @property
    def pool_size(self) -> int:
        """Workers that the pool will have; 0 while that is unknown."""
        return self._pool.size if self._pool else 0

    def start(self, setup: WorkerSetup) -> None:
        """Make the pool, and begin to start its workers."""
        self._pool = self._make_pool()
        self._pool.start(setup)

    def collect_events(self, timeout: float) -> None:
        """Take in events of the workers; wait for them for `timeout` seconds at most.

        Raises:
            BatchjobError: An event that ends the run.
        """
        if self._pool is None:
            time.sleep(timeout)
            return
        for event in self._pool.wait(timeout):
            self._handle_event(event)
        if not self.workers:
            self.on_starting()

    def dispatch(self, plan_number: int) -> None:
        """Give the workers as many waiting shards of this plan as they take."""
        while self._pool and self._pool.free_slots() > 0 and (key := self.scheduler.take_next()) is not None:
            self._pool.submit(key, plan_number)

    def speculate(self, plan_number: int) -> None:
        """Give idle workers a second attempt at stragglers; the first commit counts."""
        while self._pool and self._pool.idle_workers() > 0 and (key := self.scheduler.take_straggler()) is not None:
            self._progress.note(f"shard {key.index} is late: a second worker begins it too")
            self._pool.submit_speculative(key, plan_number)

    def drain(self, heartbeat: Callable[[], object]) -> None:
        """Dispatch no more shards, and give the running ones up to 8 s to commit; call `heartbeat` meanwhile."""
        if running := self.scheduler.running:
            self._progress.note(f"stopping: up to {DRAIN_SECONDS:.0f} s for {format_count(running, 'running shard')}")
        deadline = time.monotonic() + DRAIN_SECONDS
        while self.scheduler.running and time.monotonic() < deadline:
            heartbeat()
            self.collect_events(TICK_SECONDS)

    def close(self) -> None:
        """Stop all workers."""
        if self._pool is not None:
            self._pool.close()

    def _handle_event(self, event: WorkerEvent) -> None:
        match event:
            case WorkerReady(worker, info):
                said = {note for other in self.workers for note in other.notes}
                self.workers.append(info)
                self.on_starting()
                self._progress.note(
                    f"worker {worker}: {info.model} on {info.device}, {info.precision}, batches of "
                    f"{info.batch_size}, after {info.seconds:.1f} s"
                )
                if len(self.workers) == 1:
                    for line in info.decision_lines:
                        self._progress.note(line)
                for sentence in info.notes:
                    if sentence not in said:
                        self._progress.note(sentence)
            case ShardCommitted(result):
                self._unavailable_in_a_row = 0
                if self.scheduler.finish(result.key):
                    self._on_commit(result)
                    self._progress.advance(result.key.images_to_read, result.footer.failed)
            case ShardFailed(key, error):
                self._handle_failure(key, error)
            case WorkerFailed(error):
                raise error
            case PoolNotice(text):
                self._progress.note(text)

    def _handle_failure(self, key: ShardKey, error: BatchjobError) -> None:
        """Reschedule a shard whose attempt failed, or raise the error if it ends the run.

        Network and credential faults use up no attempt, but the third in a row ends the run. Other job errors end it
        at once.
        """
        concerns_only_the_shard = isinstance(error, Unavailable) or not isinstance(error, JobError)
        # Another attempt at the shard was quicker.
        if concerns_only_the_shard and not self.scheduler.is_running(key):
            return
        if isinstance(error, Unavailable):
            self._unavailable_in_a_row += 1
            if self._unavailable_in_a_row >= _MAX_UNAVAILABLE_IN_A_ROW:
                raise error
        elif isinstance(error, JobError):
            raise error
        is_interrupted = isinstance(error, AttemptInterrupted)
        uses_attempt = not is_interrupted and not isinstance(error, Unavailable)
        abandoned = self.scheduler.fail(key, error.message, uses_attempt=uses_attempt, to_front=is_interrupted)
        self._progress.note(f"shard {key.index} failed{', given up' if abandoned else ''}: {error.message}")
