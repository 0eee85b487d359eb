"""Shards to workers and back: what is handed out, what came of it, which faults end the run."""

from __future__ import annotations

import time
from collections.abc import Callable

from batchjob.driver.control_loop import TURN_SECONDS
from batchjob.driver.progress import Progress
from batchjob.driver.scheduler import Schedule
from batchjob.errors import BatchjobError, Interrupted, JobError, Unavailable
from batchjob.output.provenance import ShardResult
from batchjob.pool.pool import Pool
from batchjob.text import counted
from batchjob.types import ShardKey
from batchjob.worker.messages import Done, Event, Failed, Loaded, Ready, Setup, WorkerFailed

__all__ = ["DRAIN_SECONDS", "Dispatch", "MakePool"]

MakePool = Callable[[], Pool]
DRAIN_SECONDS = 8.0  # of the 20 s in all: the pool's end, the lease's farewell and the exit take their share
_UNAVAILABLE_IN_A_ROW = 3


class Dispatch:
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
        self, attempts: int, make_pool: MakePool, progress: Progress, committed: Callable[[ShardResult], object]
    ) -> None:
        self._make_pool, self._progress, self._committed = make_pool, progress, committed
        self._pool: Pool | None = None
        self._unavailable = 0
        self.schedule = Schedule(attempts)
        self.workers: list[Loaded] = []
        self.starting: Callable[[], object] = lambda: None

    @property
    def started(self) -> bool:
        """Whether there is a pool."""
        return self._pool is not None

    @property
    def size(self) -> int:
        """Workers wanted, 0 as long as that is not known."""
        return self._pool.size if self._pool else 0

    def start(self, setup: Setup) -> None:
        """Begin to start workers."""
        self._pool = self._make_pool()
        self._pool.start(setup)

    def listen(self, seconds: float) -> None:
        """Take in what happened, at the latest after so many seconds. Raises what ends the run."""
        if self._pool is None:
            time.sleep(seconds)
            return
        for event in self._pool.wait(seconds):
            self._handle(event)
        if not self.workers:
            self.starting()

    def hand_out(self, plan: int) -> None:
        """Give workers of plan number `plan` as many shards as they take."""
        assert self._pool is not None, "start comes before hand_out"
        while self._pool.free() > 0 and (key := self.schedule.take()) is not None:
            self._pool.submit(key, plan)

    def back_up(self, plan: int) -> None:
        """Where a worker has nothing to do and a shard is late with another one, have both try it: the first counts."""
        assert self._pool is not None, "start comes before back_up"
        while self._pool.idle() > 0 and (key := self.schedule.take_late()) is not None:
            self._progress.note(f"shard {key.index} is late: a second worker begins it too")
            self._pool.back_up(key, plan)

    def drain(self, beat: Callable[[], object]) -> None:
        """Hand out no more, and give what runs a moment to commit."""
        if running := self.schedule.running:
            self._progress.note(f"stopping: up to {DRAIN_SECONDS:.0f} s for {counted(running, 'running shard')}")
        until = time.monotonic() + DRAIN_SECONDS
        while self._pool is not None and self.schedule.running and time.monotonic() < until:
            beat()
            self.listen(TURN_SECONDS)

    def close(self) -> None:
        """Stop all workers."""
        if self._pool is not None:
            self._pool.close()

    def _handle(self, event: Event) -> None:
        match event:
            case Ready(worker, loaded):
                self.workers.append(loaded)
                self.starting()
                self._progress.note(
                    f"worker {worker}: {loaded.model} on {loaded.device}, {loaded.precision}, batches of "
                    f"{loaded.batch_size}, after {loaded.seconds:.1f} s"
                )
            case Done(result):
                self._unavailable = 0
                if self.schedule.finish(result.key):
                    self._committed(result)
                    self._progress.advance(result.key.images, result.made.failed)
            case Failed(key, error):
                self._attempt_failed(key, error)
            case WorkerFailed(error):
                raise error

    def _attempt_failed(self, key: ShardKey, error: BatchjobError) -> None:
        """Network and credentials use up no attempt, but end the run when they persist; other job errors end it now."""
        if not self.schedule.is_running(key) and (isinstance(error, Unavailable) or not isinstance(error, JobError)):
            return  # another attempt at it was quicker
        if isinstance(error, Unavailable):
            self._unavailable += 1
            if self._unavailable >= _UNAVAILABLE_IN_A_ROW:
                raise error
        elif isinstance(error, JobError):
            raise error
        interrupted = isinstance(error, Interrupted)
        counts = not interrupted and not isinstance(error, Unavailable)
        gave_up = self.schedule.fail(key, error.message, counts=counts, first=interrupted)
        self._progress.note(f"shard {key.index} failed{', given up' if gave_up else ''}: {error.message}")
