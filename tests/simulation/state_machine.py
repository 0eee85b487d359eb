"""State machine of the simulation: two drivers that run or retry, their three workers, and discards, in any order."""

from __future__ import annotations

import tempfile
import threading
from collections import Counter
from functools import cache, partial
from pathlib import Path
from typing import ClassVar, Literal

from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, precondition, rule

from batchjob.errors import BatchjobError, CheckFailed, InvalidJob, Temporary
from batchjob.job.job import Job
from tests.simulation.actor import KILLS, Actor
from tests.simulation.driver_process import SimulatedDriver
from tests.simulation.invariants import Invariants
from tests.simulation.simulated_pool import SimulatedWorker
from tests.support.memory_store import WRITE_METHODS, Call, Fault, MemoryStore
from tests.support.scripted_pool import make_job

__all__ = ["DriversMachine"]

# Workers of the first and of the second driver.
_POOL_SIZES = (1, 2)
# Far more calls than any run makes.
_MAX_CALLS = 3000
_FAULTS = (Fault.DOWN, Fault.LOST, Fault.REPEATED, Fault.CONFLICT, *KILLS, Fault.STALE)
_IMAGES = ["0.png", "1.png", "bad-2.png", *(f"{n}.png" for n in range(3, 13))]

indexes = st.integers(0, 9)


class DriversMachine(RuleBasedStateMachine):
    """One output and all processes that work on it.

    Attributes:
        tally: Numbers of schedules played, of parts committed, and of processes by how they ended.
    """

    tally: ClassVar[Counter[str]] = Counter()

    def __init__(self) -> None:
        super().__init__()
        self._shared = MemoryStore()
        self._drivers: list[SimulatedDriver] = []
        self._count = 0
        self._images: list[str] = []
        self._last_step = "take over"
        self._invariants = Invariants([])
        self._repaired = threading.Event()

    # -- rules ---------------------------------------------------------------------------------------------------------

    @initialize(
        images=st.sampled_from((13, 13, 12, 9, 5, 2, 0)),
        first=st.sampled_from(("begin", "plan", "dispatch", "dispatch", "dispatch", "finish", "complete")),
        last=st.sampled_from(("take over", "let finish", "discard")),
    )
    def start(self, images: int, first: str, last: str) -> None:
        """Start a driver and let it run up to the point `first`; `last` is the first step of `teardown`."""
        self._last_step = last
        self._images = _IMAGES[:images]
        self._invariants = Invariants(self._images)
        self._start_driver("run")
        driver = self._drivers[0]
        if first == "plan":
            self._advance(driver, 25)
        elif first == "finish":
            self._advance_to_end(driver, "_SUCCESS")
        elif first == "complete":
            self._advance_to_end(driver)
        while first == "dispatch" and not driver.ended and not any(worker.todo for worker in driver.pool.workers):
            self._advance(driver, 5)
            for worker in driver.pool.workers:
                self._advance(worker, 1)

    @precondition(lambda self: sum(not d.ended and not d.is_discard for d in self._drivers) < len(_POOL_SIZES))
    @rule(calls=st.integers(0, 60))
    def start_driver(self, calls: int) -> None:
        self._start_driver("run")
        self._advance(self._drivers[-1], calls)

    @precondition(
        lambda self: not any(not d.ended and d.is_discard for d in self._drivers) and self._invariants.current_plan
    )
    @rule(calls=st.integers(0, 30))
    def start_discard(self, calls: int) -> None:
        self._start_driver("discard")
        self._advance(self._drivers[-1], calls)

    @precondition(lambda self: sum(not d.ended and not d.is_discard for d in self._drivers) < len(_POOL_SIZES))
    @precondition(lambda self: self._invariants.current_plan)
    @rule(calls=st.integers(0, 60))
    def start_retry(self, calls: int) -> None:
        self._start_driver("retry")
        self._advance(self._drivers[-1], calls)

    @precondition(lambda self: not self._repaired.is_set())
    @rule()
    def repair_bad_image(self) -> None:
        self._repaired.set()

    @precondition(lambda self: self._runnable)
    @rule(index=indexes, calls=st.integers(1, 12), fault=st.sampled_from((None, *_FAULTS)))
    def advance_one(self, index: int, calls: int, fault: Fault | None) -> None:
        """Let a process make a few calls, the last with a fault."""
        self._advance(self._pick(index), calls, fault)

    @precondition(lambda self: self._runnable)
    @rule(index=indexes, fault=st.sampled_from((None, None, *_FAULTS)))
    def advance_one_to_write(self, index: int, fault: Fault | None) -> None:
        """Let a process come to a write; with a fault the write is made and goes wrong."""
        self._advance_to_write(self._pick(index), fault)

    @precondition(lambda self: self._busy_workers)
    @rule(index=indexes, fault=st.sampled_from((None, *_FAULTS)))
    def advance_worker_to_commit(self, index: int, fault: Fault | None) -> None:
        """Let a worker come to the PUT of its part; with a fault the PUT is made and goes wrong."""
        self._advance_to_write(self._busy_workers[index % len(self._busy_workers)], fault, "predictions/")

    @precondition(lambda self: any(not driver.ended for driver in self._drivers))
    @rule(index=indexes, fault=st.sampled_from((None, None, *_FAULTS)))
    def advance_driver_to_success(self, index: int, fault: Fault | None) -> None:
        """Let a driver come to the PUT of `_SUCCESS`; with a fault the PUT is made and goes wrong."""
        running = [driver for driver in self._drivers if not driver.ended]
        self._advance_to_end(running[index % len(running)], "_SUCCESS")
        if fault is not None:
            self._advance(running[index % len(running)], 1, fault)

    @precondition(lambda self: self._runnable)
    @rule(index=indexes)
    def advance_one_to_end(self, index: int) -> None:
        """Let a driver and its workers, or a worker, run to the end without a break."""
        self._advance_to_end(self._pick(index))

    @precondition(lambda self: self._runnable)
    @rule(turns=st.lists(st.tuples(indexes, st.integers(1, 9)), min_size=2, max_size=12))
    def interleave(self, turns: list[tuple[int, int]]) -> None:
        for index, calls in turns:
            if self._runnable:
                self._advance(self._pick(index), calls)

    @precondition(lambda self: self._runnable)
    @rule(index=indexes, with_workers=st.booleans())
    def kill_one(self, index: int, with_workers: bool) -> None:
        """Kill a driver, with or without its workers, or a worker."""
        actor = self._pick(index)
        self._advance(actor, 1, Fault.KILLED_BEFORE)
        if with_workers and isinstance(actor, SimulatedDriver):
            for worker in list(actor.pool.workers):
                worker.kill()

    @precondition(lambda self: self._runnable)
    @rule(index=indexes, seconds=st.sampled_from((1.0, 3.0, 30.0)))
    def suspend_one(self, index: int, seconds: float) -> None:
        """Advance the clock of a process, as if it had been suspended or its machine were slow."""
        actor = self._pick(index)
        actor.clock += seconds
        if isinstance(actor, SimulatedDriver):
            actor.pool.last_look += seconds

    @precondition(lambda self: any(not driver.ended for driver in self._drivers))
    @rule(index=indexes)
    def send_stop_signal(self, index: int) -> None:
        running = [driver for driver in self._drivers if not driver.ended]
        running[index % len(running)].signal.set()

    def teardown(self) -> None:
        """Check that a driver without faults completes any output, and that late processes do no harm afterwards."""
        try:
            if self._last_step == "discard" and self._invariants.current_plan:
                self._start_driver("discard")
                self._advance_to_end(self._drivers[-1])
                assert self._invariants.is_empty, "a discard without faults left something"
            elif self._last_step == "let finish":
                self._advance_all_to_end()
            self._complete()
            stale_before = self._invariants.stale_parts
            discards = [actor for actor in self._drivers if actor.is_discard and not actor.ended]
            self._advance_all_to_end()
            left = self._invariants.stale_parts - stale_before
            assert not left & self._invariants.late_parts, "a late process left a part of a discarded plan"
            assert not left or any(actor.batchjob_error for actor in discards), "a discard left a part without an error"
            self._complete()
            self._invariants.check_complete()
            self._complete("retry")
            self._invariants.check_complete(repaired=self._repaired.is_set())
            self.tally["schedules"] += 1
            self.tally["commits"] += self._invariants.commits
            self.tally["replacements"] += self._invariants.replacements
        finally:
            for driver in self._drivers:
                for actor in (driver, *driver.pool.workers):
                    actor.kill()

    # -- helpers -------------------------------------------------------------------------------------------------------

    def _advance_all_to_end(self) -> None:
        for driver in self._drivers:
            self._advance_to_end(driver)

    def _start_driver(self, what: Literal["run", "retry", "discard"]) -> None:
        self._count += 1
        size = _POOL_SIZES[any(not driver.ended for driver in self._drivers)]
        job = None if what == "discard" else _job()
        name, is_retry = f"{what} {self._count}", what == "retry"
        self._drivers.append(SimulatedDriver(name, self._shared, job, self._images, size, self._repaired, is_retry))
        self._drivers[-1].discards_at_start = self._invariants.discards

    @property
    def _busy_workers(self) -> list[SimulatedWorker]:
        """Workers with something to do."""
        workers = (worker for driver in self._drivers for worker in driver.pool.workers)
        return [worker for worker in workers if not worker.ended and not worker.is_resting]

    @property
    def _runnable(self) -> list[Actor]:
        """Processes that have something to do."""
        return [*(driver for driver in self._drivers if not driver.ended), *self._busy_workers]

    def _pick(self, index: int) -> Actor:
        runnable = self._runnable
        return runnable[index % len(runnable)]

    def _advance(self, actor: Actor, calls: int, fault: Fault | None = None, *, stop_at_rest: bool = False) -> None:
        if calls and not self._has_nothing_to_do(actor):
            actor.after = partial(self._check_objects, actor)
            actor.advance(calls, fault, stop_at_rest=stop_at_rest)
            self._check_ended(actor)

    def _has_nothing_to_do(self, actor: Actor) -> bool:
        return actor.ended or (isinstance(actor, SimulatedWorker) and actor.is_resting)

    def _check_objects(self, actor: Actor) -> None:
        self._invariants.check(self._shared.state.objects, actor.store.calls)

    def _check_ended(self, actor: Actor) -> None:
        """Handle an actor that has ended: replace a worker, close a driver's pool, raise unexpected errors."""
        if not actor.ended:
            return
        if isinstance(actor, SimulatedWorker):
            if actor.error is not None:
                raise actor.error
            if actor.dead:
                actor.pool.replace_lost_worker(actor)
        elif isinstance(actor, SimulatedDriver):
            error = actor.batchjob_error
            self.tally[type(error).__name__ if error else "killed" if actor.dead else "ended"] += 1
            actor.pool.close()
            if error is not None and not isinstance(error, Temporary) and not self._is_excused(actor, error):
                raise error

    def _is_excused(self, driver: SimulatedDriver, error: BatchjobError) -> bool:
        """Return True if an error is allowed: the driver saw an old listing, or its plan was discarded meanwhile."""
        discarded = self._invariants.discards > driver.discards_at_start
        if isinstance(error, InvalidJob):
            return driver.is_retry and discarded
        return isinstance(error, CheckFailed) and (driver.stale > 0 or discarded)

    def _advance_to_write(self, actor: Actor, fault: Fault | None, prefix: str = "") -> None:
        for _ in range(80):
            if actor.stop is None or self._has_nothing_to_do(actor):
                return
            if actor.stop.method in WRITE_METHODS and actor.stop.key.startswith(prefix):
                break
            self._advance(actor, 1)
        if fault is not None:
            self._advance(actor, 1, fault)

    def _advance_to_end(self, actor: Actor, write: str | None = None) -> None:
        """Run an actor and its workers to the end; or, with `write`, only to its PUT of this key."""
        workers = actor.pool.workers if isinstance(actor, SimulatedDriver) else []
        for _ in range(_MAX_CALLS):
            running = [one for one in (actor, *workers) if not self._has_nothing_to_do(one)]
            if not running or (write and actor.ended):
                return
            for one in running:
                if write is None or one is not actor:
                    self._advance(one, 50, stop_at_rest=True)
                elif self._advance_towards(one, write):
                    return
        raise AssertionError(f"{actor.name} does not end")

    def _advance_towards(self, actor: Actor, write: str) -> bool:
        """Make some calls, and tell whether the actor has come to the PUT of this key or has ended."""
        for _ in range(20):
            if actor.stop is None or (actor.stop.key == write and actor.stop.method in WRITE_METHODS):
                return True
            self._advance(actor, 1, stop_at_rest=True)
            if actor.stop == Call("wait", ""):
                break
        return False

    def _complete(self, what: Literal["run", "retry"] = "run") -> None:
        self._start_driver(what)
        driver = self._drivers[-1]
        self._advance_to_end(driver)
        if driver.batchjob_error is not None:
            raise driver.batchjob_error
        assert driver.result is not None, driver.name
        assert driver.result.exit_code == 0, driver.result


@cache
def _job() -> Job:
    folder = Path(tempfile.mkdtemp(prefix="batchjob-simulation-"))
    errors = {"max_rate": 1.0, "abort_early": False, "outage_seconds": 3.0, "attempts": 2}
    return make_job(folder, [], errors=errors)
