"""The state machine: two drivers that run or retry, their three workers, and whoever discards, in any order."""

from __future__ import annotations

import tempfile
import threading
from collections import Counter
from functools import cache, partial
from pathlib import Path
from typing import ClassVar, Literal

from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, precondition, rule
from memory_store import WRITE_METHODS, Call, Fault, MemoryStore
from scripted_pool import job

from batchjob.errors import BatchjobError, CheckFailed, InvalidJob, Temporary
from batchjob.job.job import Job
from simulation.actor import KILLS, Actor
from simulation.crew import Worker
from simulation.laws import Laws
from simulation.process import Driver

__all__ = ["Drivers"]

_CREWS = (1, 2)  # workers of the two drivers
_WHOLE_RUN = 3000  # calls; far more than any run takes
_FAULTS = (Fault.DOWN, Fault.LOST, Fault.REPEATED, Fault.CONFLICT, *KILLS, Fault.STALE)
_IMAGES = ["0.png", "1.png", "bad-2.png", *(f"{n}.png" for n in range(3, 13))]

who = st.integers(0, 9)


class Drivers(RuleBasedStateMachine):
    """One output, and whoever is at work on it.

    Attributes:
        tally: schedules played, parts committed, and how processes ended.
    """

    tally: ClassVar[Counter[str]] = Counter()

    def __init__(self) -> None:
        super().__init__()
        self._shared = MemoryStore()
        self._drivers: list[Driver] = []
        self._named = 0
        self._images: list[str] = []
        self._last = "take over"
        self._laws = Laws([])
        self._mended = threading.Event()

    # -- rules ---------------------------------------------------------------------------------------------------------

    @initialize(
        images=st.sampled_from((13, 13, 12, 9, 5, 2, 0)),
        first=st.sampled_from(("begin", "plan", "hand out", "hand out", "hand out", "finish", "complete")),
        last=st.sampled_from(("take over", "let finish", "discard")),
    )
    def begin(self, images: int, first: str, last: str) -> None:
        """So many images; how far a first driver has come, and what is done first in the end, see `teardown`."""
        self._last = last
        self._images = _IMAGES[:images]
        self._laws = Laws(self._images)
        self._begin("run")
        driver = self._drivers[0]
        if first == "plan":
            self._advance(driver, 25)
        elif first == "finish":
            self._to_the_end(driver, "_SUCCESS")
        elif first == "complete":
            self._to_the_end(driver)
        while first == "hand out" and not driver.ended and not any(worker.todo for worker in driver.crew.workers):
            self._advance(driver, 5)
            for worker in driver.crew.workers:
                self._advance(worker, 1)

    @precondition(lambda self: sum(not d.ended and not d.discards for d in self._drivers) < len(_CREWS))
    @rule(calls=st.integers(0, 60))
    def a_driver_begins(self, calls: int) -> None:
        self._begin("run")
        self._advance(self._drivers[-1], calls)

    @precondition(lambda self: not any(not d.ended and d.discards for d in self._drivers) and self._laws.in_force)
    @rule(calls=st.integers(0, 30))
    def a_discard_begins(self, calls: int) -> None:
        self._begin("discard")
        self._advance(self._drivers[-1], calls)

    @precondition(lambda self: sum(not d.ended and not d.discards for d in self._drivers) < len(_CREWS))
    @precondition(lambda self: self._laws.in_force)
    @rule(calls=st.integers(0, 60))
    def a_retry_begins(self, calls: int) -> None:
        self._begin("retry")
        self._advance(self._drivers[-1], calls)

    @precondition(lambda self: not self._mended.is_set())
    @rule()
    def the_bad_image_is_mended(self) -> None:
        self._mended.set()

    @precondition(lambda self: self._awake)
    @rule(who=who, calls=st.integers(1, 12), fault=st.sampled_from((None, *_FAULTS)))
    def somebody_goes_on(self, who: int, calls: int, fault: Fault | None) -> None:
        """A few calls, the last of which goes wrong."""
        self._advance(self._pick(who), calls, fault)

    @precondition(lambda self: self._awake)
    @rule(who=who, fault=st.sampled_from((None, None, *_FAULTS)))
    def somebody_goes_on_to_a_write(self, who: int, fault: Fault | None) -> None:
        """Up to a write, which may go wrong, or is still to come."""
        self._to_a_write(self._pick(who), fault)

    @precondition(lambda self: self._busy)
    @rule(who=who, fault=st.sampled_from((None, *_FAULTS)))
    def a_worker_goes_on_to_its_commit(self, who: int, fault: Fault | None) -> None:
        """Up to the PUT of its part, which may go wrong, or is still to come."""
        self._to_a_write(self._busy[who % len(self._busy)], fault, "predictions/")

    @precondition(lambda self: any(not driver.ended for driver in self._drivers))
    @rule(who=who, fault=st.sampled_from((None, None, *_FAULTS)))
    def a_driver_goes_on_to_its_end(self, who: int, fault: Fault | None) -> None:
        """Up to the PUT of `_SUCCESS`, which may go wrong, or is still to come."""
        at_work = [driver for driver in self._drivers if not driver.ended]
        self._to_the_end(at_work[who % len(at_work)], "_SUCCESS")
        if fault is not None:
            self._advance(at_work[who % len(at_work)], 1, fault)

    @precondition(lambda self: self._awake)
    @rule(who=who)
    def somebody_goes_on_to_the_end(self, who: int) -> None:
        """A driver and its workers, without a break."""
        self._to_the_end(self._pick(who))

    @precondition(lambda self: self._awake)
    @rule(turns=st.lists(st.tuples(who, st.integers(1, 9)), min_size=2, max_size=12))
    def they_take_turns(self, turns: list[tuple[int, int]]) -> None:
        for one, calls in turns:
            if self._awake:
                self._advance(self._pick(one), calls)

    @precondition(lambda self: self._awake)
    @rule(who=who, crew=st.booleans())
    def somebody_is_killed(self, who: int, crew: bool) -> None:
        """A driver, with its workers or without; or a worker."""
        one = self._pick(who)
        self._advance(one, 1, Fault.KILLED_BEFORE)
        if crew and isinstance(one, Driver):
            for worker in list(one.crew.workers):
                worker.kill()

    @precondition(lambda self: self._awake)
    @rule(who=who, seconds=st.sampled_from((1.0, 3.0, 30.0)))
    def somebody_sleeps(self, who: int, seconds: float) -> None:
        """Its process was stopped for so long, or its machine was slow."""
        one = self._pick(who)
        one.clock += seconds
        if isinstance(one, Driver):
            one.crew.looked += seconds

    @precondition(lambda self: any(not driver.ended for driver in self._drivers))
    @rule(who=who)
    def a_driver_is_asked_to_stop(self, who: int) -> None:
        at_work = [driver for driver in self._drivers if not driver.ended]
        at_work[who % len(at_work)].signal.set()

    def teardown(self) -> None:
        """A driver that meets no fault completes whatever it finds, and nobody who wakes up later spoils it."""
        try:
            if self._last == "discard" and self._laws.in_force:
                self._begin("discard")
                self._to_the_end(self._drivers[-1])
                assert self._laws.nothing_stands, "a discard that nobody hindered left something"
            elif self._last == "let finish":
                self._all_to_the_end()
            self._completes()
            before = self._laws.strays
            discards = [one for one in self._drivers if one.discards and not one.ended]
            self._all_to_the_end()
            left = self._laws.strays - before
            assert not left & self._laws.late, "who was late left a part of a discarded plan"
            assert not left or any(one.fault for one in discards), "a discard left a part, and said nothing of it"
            self._completes()
            self._laws.complete()
            self._completes("retry")
            self._laws.complete(mended=self._mended.is_set())
            self.tally["schedules"] += 1
            self.tally["commits"] += self._laws.commits
            self.tally["replacements"] += self._laws.replacements
        finally:
            for driver in self._drivers:
                for actor in (driver, *driver.crew.workers):
                    actor.kill()

    # -- how -----------------------------------------------------------------------------------------------------------

    def _all_to_the_end(self) -> None:
        for driver in self._drivers:
            self._to_the_end(driver)

    def _begin(self, what: Literal["run", "retry", "discard"]) -> None:
        self._named += 1
        size = _CREWS[any(not driver.ended for driver in self._drivers)]
        job = None if what == "discard" else _job()
        name, retries = f"{what} {self._named}", what == "retry"
        self._drivers.append(Driver(name, self._shared, job, self._images, size, self._mended, retries))
        self._drivers[-1].discards_before = self._laws.discards

    @property
    def _busy(self) -> list[Worker]:
        """Workers that have something to do."""
        workers = (worker for driver in self._drivers for worker in driver.crew.workers)
        return [worker for worker in workers if not worker.ended and not worker.resting]

    @property
    def _awake(self) -> list[Actor]:
        """Whoever has something to do."""
        return [*(driver for driver in self._drivers if not driver.ended), *self._busy]

    def _pick(self, who: int) -> Actor:
        awake = self._awake
        return awake[who % len(awake)]

    def _advance(self, actor: Actor, calls: int, fault: Fault | None = None, *, to_a_rest: bool = False) -> None:
        if calls and not actor.ended and not (isinstance(actor, Worker) and actor.resting):
            actor.after = partial(self._hold, actor)
            actor.advance(calls, fault, to_a_rest=to_a_rest)
            self._look(actor)

    def _hold(self, actor: Actor) -> None:
        self._laws.hold(self._shared._disk.objects, actor.store.calls)

    def _look(self, actor: Actor) -> None:
        """At what has become of it."""
        if not actor.ended:
            return
        if isinstance(actor, Worker):
            if actor.error is not None:
                raise actor.error
            if actor.dead:
                actor.crew.lose(actor)
        elif isinstance(actor, Driver):
            fault = actor.fault
            self.tally[type(fault).__name__ if fault else "killed" if actor.dead else "ended"] += 1
            actor.crew.close()
            if fault is not None and not isinstance(fault, Temporary) and not self._excused(actor, fault):
                raise fault

    def _excused(self, driver: Driver, fault: BatchjobError) -> bool:
        """Whether parts could seem to be gone: it was shown an old listing, or its plan was discarded meanwhile."""
        discarded = self._laws.discards > driver.discards_before
        if isinstance(fault, InvalidJob):
            return driver.retries and discarded
        return isinstance(fault, CheckFailed) and (driver.stale > 0 or discarded)

    def _to_a_write(self, actor: Actor, fault: Fault | None, what: str = "") -> None:
        for _ in range(80):
            if actor.stop is None or (isinstance(actor, Worker) and actor.resting):
                return
            if actor.stop.method in WRITE_METHODS and actor.stop.key.startswith(what):
                break
            self._advance(actor, 1)
        if fault is not None:
            self._advance(actor, 1, fault)

    def _to_the_end(self, actor: Actor, write: str | None = None) -> None:
        """Of its own run and of all its workers' work; or up to its PUT of this key."""
        crew = actor.crew.workers if isinstance(actor, Driver) else []
        for _ in range(_WHOLE_RUN):
            at_work = [one for one in (actor, *crew) if not one.ended and not (isinstance(one, Worker) and one.resting)]
            if not at_work or (write and actor.ended):
                return
            for one in at_work:
                if write is None or one is not actor:
                    self._advance(one, 50, to_a_rest=True)
                elif self._goes_on(one, write):
                    return
        raise AssertionError(f"{actor.name} comes to no end")

    def _goes_on(self, actor: Actor, write: str) -> bool:
        """Whether it has come to the PUT of that key, within some calls."""
        for _ in range(20):
            if actor.stop is None or (actor.stop.key == write and actor.stop.method in WRITE_METHODS):
                return True
            self._advance(actor, 1, to_a_rest=True)
            if actor.stop == Call("wait", ""):
                break
        return False

    def _completes(self, what: Literal["run", "retry"] = "run") -> None:
        self._begin(what)
        driver = self._drivers[-1]
        self._to_the_end(driver)
        if driver.fault is not None:
            raise driver.fault
        assert driver.outcome is not None, driver.name
        assert driver.outcome.exit_code == 0, driver.outcome


@cache
def _job() -> Job:
    folder = Path(tempfile.mkdtemp(prefix="batchjob-simulation-"))
    errors = {"max_rate": 1.0, "abort_early": False, "outage_seconds": 3.0, "attempts": 2}
    return job(folder, [], errors=errors)
