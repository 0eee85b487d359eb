"""Shards to workers and back: what a second attempt at a late shard changes, and what it does not."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

import pytest

from batchjob.driver.dispatcher import Dispatcher
from batchjob.driver.progress import NoProgress
from batchjob.errors import AttemptFailed, BatchjobError, CheckFailed, Temporary, Unavailable
from batchjob.output.provenance import PartFooter, ShardResult
from batchjob.pool.placement import Placement
from batchjob.types import ShardKey
from batchjob.worker.messages import ShardCommitted, ShardFailed, WorkerEvent, WorkerInfo, WorkerReady, WorkerSetup

LOADED = WorkerInfo("cpu", "fp32", "fake@000000000000", ("score",), batch_size=4, seconds=0.0)


@dataclass
class Told(NoProgress):
    """Remembers the notes."""

    notes: list[str] = field(default_factory=list)

    def note(self, text: str) -> None:
        self.notes.append(text)


class HandPool:
    """Two workers whose every answer is given by hand. See `Pool`."""

    size = 2

    def __init__(self) -> None:
        self._placement = Placement()
        self._events: list[WorkerEvent] = []
        self.hands: dict[str, list[ShardKey]] = {"0": [], "1": []}

    def start(self, setup: WorkerSetup) -> None:
        for name in self.hands:
            self._placement.add_worker(name)
            self._events.append(WorkerReady(name, LOADED))

    def free_slots(self) -> int:
        return self._placement.free_slots()

    def submit(self, key: ShardKey, plan_number: int) -> None:
        self._placement.submit(key, plan_number)
        self._hand_over()

    def idle_workers(self) -> int:
        return self._placement.idle_workers()

    def submit_speculative(self, key: ShardKey, plan_number: int) -> None:
        self._placement.submit_speculative(key, plan_number)
        self._hand_over()

    def wait(self, timeout: float) -> list[WorkerEvent]:
        events, self._events = self._events, []
        return events

    def close(self) -> None: ...

    def commits(self, worker: str, ours: bool = True) -> None:
        """The worker's oldest shard is committed."""
        key = self.hands[worker].pop(0)
        self._placement.finish(worker, key)
        self._events.append(ShardCommitted(result(key, ours)))

    def fails(self, worker: str, error: BatchjobError) -> None:
        """The attempt at its oldest shard has failed."""
        key = self.hands[worker].pop(0)
        self._placement.fail(worker, key)
        self._events.append(ShardFailed(key, error))

    def _hand_over(self) -> None:
        for due in self._placement.take_assignments():
            self.hands[due.worker].append(due.key)


def result(key: ShardKey, ours: bool) -> ShardResult:
    made: dict[str, Any] = {"rows": key.rows, "failed": 1, "errors": {"decode/truncated": 1}}
    provenance = PartFooter("plan", key.id, key.index, "attempt", 0, "f", "m", seconds={}, versions={}, **made)
    return ShardResult(key, provenance, {}, ours, "tag")


@pytest.fixture
def late() -> Iterator[tuple[Dispatcher, HandPool, list[ShardResult], Told]]:
    """Four shards, of which worker 1 has committed its two, and 0 none when 100 s have passed; both try the first."""
    pool, committed, told, now = HandPool(), list[ShardResult](), Told(), [0.0]
    dispatch = Dispatcher(3, lambda: pool, told, committed.append)
    dispatch.scheduler.clock = lambda: now[0]
    dispatch.start(WorkerSetup({}, "."))
    dispatch.collect_events(0)
    dispatch.scheduler.add(ShardKey(index, f"id-{index}", 10, 0, 10 * index) for index in range(4))
    dispatch.dispatch(0)
    dispatch.speculate(0)
    for _ in range(2):
        now[0] += 1
        pool.commits("1")
    dispatch.collect_events(0)
    dispatch.speculate(0)
    assert pool.hands["1"] == [], "nothing is late yet"
    now[0] += 100
    dispatch.speculate(0)
    dispatch.speculate(0)
    assert [key.index for key in pool.hands["1"]] == [0]
    assert [note for note in told.notes if "late" in note] == ["shard 0 is late: a second worker begins it too"]
    yield dispatch, pool, committed, told
    assert len(committed) == len({result.key.index for result in committed})


def end(dispatch: Dispatcher, pool: HandPool) -> None:
    while not dispatch.scheduler.idle:
        pool.commits("0" if pool.hands["0"] else "1")
        dispatch.collect_events(0)


@pytest.mark.parametrize("loser", ["commits", "fails", "is cut off"])
def test_the_second_attempt_wins(late: tuple[Dispatcher, HandPool, list[ShardResult], Told], loser: str) -> None:
    dispatch, pool, committed, told = late
    pool.commits("1")
    dispatch.collect_events(0)
    assert [result.key.index for result in committed] == [1, 3, 0]
    before = len(told.notes)
    match loser:
        case "commits":
            pool.commits("0", ours=False)
        case "fails":
            pool.fails("0", AttemptFailed("worker 0 was lost"))
        case "is cut off":
            for _ in range(5):
                dispatch._handle_event(ShardFailed(pool.hands["0"][0], Unavailable("no network")))
            pool.fails("0", Unavailable("no network"))
    dispatch.collect_events(0)
    assert len(told.notes) == before, "nobody needs to hear of it"
    end(dispatch, pool)
    assert (dispatch.scheduler.done, dispatch.scheduler.given_up, len(committed)) == (4, [], 4)


def test_the_first_attempt_wins_after_all(late: tuple[Dispatcher, HandPool, list[ShardResult], Told]) -> None:
    dispatch, pool, committed, _ = late
    pool.commits("0")
    dispatch.collect_events(0)
    pool.commits("1", ours=False)
    end(dispatch, pool)
    dispatch.collect_events(0)
    assert (dispatch.scheduler.done, len(committed)) == (4, 4)


def test_one_of_the_two_may_fail(late: tuple[Dispatcher, HandPool, list[ShardResult], Told]) -> None:
    dispatch, pool, committed, _ = late
    pool.fails("1", AttemptFailed("out of luck"))
    dispatch.collect_events(0)
    assert dispatch.scheduler.waiting == 0, "the other one is at it"
    end(dispatch, pool)
    assert (dispatch.scheduler.done, len(committed)) == (4, 4)


@pytest.mark.parametrize("error", [CheckFailed("a foreign part"), Temporary("the plan was discarded")])
def test_what_the_slower_one_finds_wrong_with_the_output_still_ends_the_run(
    late: tuple[Dispatcher, HandPool, list[ShardResult], Told], error: BatchjobError
) -> None:
    dispatch, pool, _, _ = late
    pool.commits("1")
    dispatch.collect_events(0)
    pool.fails("0", error)
    with pytest.raises(type(error)):
        dispatch.collect_events(0)
