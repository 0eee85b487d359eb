"""Shards to workers and back: what is handed out, what came of it, which faults end the run."""

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
DRAIN_SECONDS = 8.0  # of the 20 s in all: the pool's end, the lease's farewell and the exit take their share
_UNAVAILABLE_IN_A_ROW = 3


class Dispatcher:
    """One pool of workers, started when it is first needed, and the shards that it is given.

    Args:
        attempts: how often a shard may fail before it is given up.
        make_pool: makes the pool.
        progress: told what people may want to know.
        committed: told of every shard that is committed, once.

    Attributes:
        schedule: shards waiting, running, done and given up.
        workers: those that have loaded.
        starting: called again and again until a worker has loaded, and then once for each that has.
    """

    def __init__(
        self,
        max_attempts: int,
        make_pool: MakePool,
        progress: ProgressReporter,
        on_commit: Callable[[ShardResult], object],
    ) -> None:
        self._make_pool, self._progress, self._committed = make_pool, progress, on_commit
        self._pool: Pool | None = None
        self._unavailable = 0
        self.scheduler = Scheduler(max_attempts)
        self.workers: list[WorkerInfo] = []
        self.on_starting: Callable[[], object] = lambda: None

    @property
    def started(self) -> bool:
        """Whether there is a pool."""
        return self._pool is not None

    @property
    def pool_size(self) -> int:
        """Workers wanted, 0 as long as that is not known."""
        return self._pool.size if self._pool else 0

    def start(self, setup: WorkerSetup) -> None:
        """Begin to start workers."""
        self._pool = self._make_pool()
        self._pool.start(setup)

    def collect_events(self, timeout: float) -> None:
        """Take in what happened, at the latest after so many seconds. Raises what ends the run."""
        if self._pool is None:
            time.sleep(timeout)
            return
        for event in self._pool.wait(timeout):
            self._handle_event(event)
        if not self.workers:
            self.on_starting()

    def dispatch(self, plan_number: int) -> None:
        """Give workers of plan number `plan` as many shards as they take."""
        assert self._pool is not None, "start comes before hand_out"
        while self._pool.free_slots() > 0 and (key := self.scheduler.take_next()) is not None:
            self._pool.submit(key, plan_number)

    def speculate(self, plan_number: int) -> None:
        """Where a worker has nothing to do and a shard is late with another one, have both try it: the first counts."""
        assert self._pool is not None, "start comes before back_up"
        while self._pool.idle_workers() > 0 and (key := self.scheduler.take_straggler()) is not None:
            self._progress.note(f"shard {key.index} is late: a second worker begins it too")
            self._pool.submit_speculative(key, plan_number)

    def drain(self, heartbeat: Callable[[], object]) -> None:
        """Hand out no more, and give what runs a moment to commit."""
        if running := self.scheduler.running:
            self._progress.note(f"stopping: up to {DRAIN_SECONDS:.0f} s for {format_count(running, 'running shard')}")
        until = time.monotonic() + DRAIN_SECONDS
        while self._pool is not None and self.scheduler.running and time.monotonic() < until:
            heartbeat()
            self.collect_events(TICK_SECONDS)

    def close(self) -> None:
        """Stop all workers."""
        if self._pool is not None:
            self._pool.close()

    def _handle_event(self, event: WorkerEvent) -> None:
        match event:
            case WorkerReady(worker, loaded):
                self.workers.append(loaded)
                self.on_starting()
                self._progress.note(
                    f"worker {worker}: {loaded.model} on {loaded.device}, {loaded.precision}, batches of "
                    f"{loaded.batch_size}, after {loaded.seconds:.1f} s"
                )
            case ShardCommitted(result):
                self._unavailable = 0
                if self.scheduler.finish(result.key):
                    self._committed(result)
                    self._progress.advance(result.key.images_to_read, result.footer.failed)
            case ShardFailed(key, error):
                self._attempt_failed(key, error)
            case WorkerFailed(error):
                raise error

    def _attempt_failed(self, key: ShardKey, error: BatchjobError) -> None:
        """Network and credentials use up no attempt, but end the run when they persist; other job errors end it now."""
        if not self.scheduler.is_running(key) and (isinstance(error, Unavailable) or not isinstance(error, JobError)):
            return  # another attempt at it was quicker
        if isinstance(error, Unavailable):
            self._unavailable += 1
            if self._unavailable >= _UNAVAILABLE_IN_A_ROW:
                raise error
        elif isinstance(error, JobError):
            raise error
        interrupted = isinstance(error, AttemptInterrupted)
        counts = not interrupted and not isinstance(error, Unavailable)
        gave_up = self.scheduler.fail(key, error.message, uses_attempt=counts, to_front=interrupted)
        self._progress.note(f"shard {key.index} failed{', given up' if gave_up else ''}: {error.message}")
