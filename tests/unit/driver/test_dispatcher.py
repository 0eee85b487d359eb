"""Dispatcher: effects of a speculative attempt at a straggler."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field

import pytest

from batchjob.driver.dispatcher import Dispatcher
from batchjob.driver.progress import NoProgress
from batchjob.errors import AttemptFailed, BatchjobError, CheckFailed, Temporary, Unavailable
from batchjob.output.provenance import ShardResult
from batchjob.pool.placement import Placement
from batchjob.types import ShardKey
from batchjob.worker.messages import ShardCommitted, ShardFailed, WorkerEvent, WorkerInfo, WorkerReady, WorkerSetup
from tests.support.part_footers import make_footer

WORKER_INFO = WorkerInfo("cpu", "fp32", "fake@000000000000", ("score",), batch_size=4, seconds=0.0)


@dataclass
class RecordingProgress(NoProgress):
    """Progress reporter that remembers its notes."""

    notes: list[str] = field(default_factory=list)

    def note(self, text: str) -> None:
        self.notes.append(text)


class ManualPool:
    """Pool of two workers whose events the test makes."""

    size = 2

    def __init__(self) -> None:
        self._placement = Placement()
        self._events: list[WorkerEvent] = []
        self.running: dict[str, list[ShardKey]] = {"0": [], "1": []}

    def start(self, setup: WorkerSetup) -> None:
        for name in self.running:
            self._placement.add_worker(name)
            self._events.append(WorkerReady(name, WORKER_INFO))

    def free_slots(self) -> int:
        return self._placement.free_slots()

    def submit(self, key: ShardKey, plan_number: int) -> None:
        self._placement.submit(key, plan_number)
        self._deliver_assignments()

    def idle_workers(self) -> int:
        return self._placement.idle_workers()

    def submit_speculative(self, key: ShardKey, plan_number: int) -> None:
        self._placement.submit_speculative(key, plan_number)
        self._deliver_assignments()

    def wait(self, timeout: float) -> list[WorkerEvent]:
        events, self._events = self._events, []
        return events

    def close(self) -> None: ...

    def commit(self, worker: str, committed_here: bool = True) -> None:
        """Commit the worker's oldest shard."""
        key = self.running[worker].pop(0)
        self._placement.finish(worker, key)
        self._events.append(ShardCommitted(make_result(key, committed_here)))

    def fail(self, worker: str, error: BatchjobError) -> None:
        """Fail the attempt at the worker's oldest shard."""
        key = self.running[worker].pop(0)
        self._placement.fail(worker, key)
        self._events.append(ShardFailed(key, error))

    def _deliver_assignments(self) -> None:
        for assignment in self._placement.take_assignments():
            self.running[assignment.worker].append(assignment.key)


def make_result(key: ShardKey, committed_here: bool) -> ShardResult:
    footer = make_footer(key, failed=1, errors={"decode/truncated": 1})
    return ShardResult(key, footer, {}, committed_here, "tag")


StragglingRun = tuple[Dispatcher, ManualPool, list[ShardResult], RecordingProgress]


@pytest.fixture
def straggling_run() -> Iterator[StragglingRun]:
    """Run four shards: worker 1 has committed two, worker 0 none after 100 s; both have shard 0 now."""
    pool, committed, progress, now = ManualPool(), list[ShardResult](), RecordingProgress(), [0.0]
    dispatcher = Dispatcher(3, lambda: pool, progress, committed.append)
    dispatcher.scheduler.clock = lambda: now[0]
    dispatcher.start(WorkerSetup({}, "."))
    dispatcher.collect_events(0)
    dispatcher.scheduler.add(ShardKey(index, f"id-{index}", 10, 0, 10 * index) for index in range(4))
    dispatcher.dispatch(0)
    dispatcher.speculate(0)
    for _ in range(2):
        now[0] += 1
        pool.commit("1")
    dispatcher.collect_events(0)
    dispatcher.speculate(0)
    assert pool.running["1"] == [], "no shard is a straggler yet"
    now[0] += 100
    dispatcher.speculate(0)
    dispatcher.speculate(0)
    assert [key.index for key in pool.running["1"]] == [0]
    assert [note for note in progress.notes if "late" in note] == ["shard 0 is late: a second worker begins it too"]
    yield dispatcher, pool, committed, progress
    assert len(committed) == len({result.key.index for result in committed})


def commit_all(dispatcher: Dispatcher, pool: ManualPool) -> None:
    while not dispatcher.scheduler.idle:
        pool.commit("0" if pool.running["0"] else "1")
        dispatcher.collect_events(0)


@pytest.mark.parametrize("loser", ["commits", "fails", "is cut off"])
def test_speculative_attempt_that_commits_first_counts(straggling_run: StragglingRun, loser: str) -> None:
    dispatcher, pool, committed, progress = straggling_run
    pool.commit("1")
    dispatcher.collect_events(0)
    assert [result.key.index for result in committed] == [1, 3, 0]
    before = len(progress.notes)
    match loser:
        case "commits":
            pool.commit("0", committed_here=False)
        case "fails":
            pool.fail("0", AttemptFailed("worker 0 was lost"))
        case "is cut off":
            for _ in range(5):
                dispatcher._handle_event(ShardFailed(pool.running["0"][0], Unavailable("no network")))
            pool.fail("0", Unavailable("no network"))
    dispatcher.collect_events(0)
    assert len(progress.notes) == before, "the slower attempt is not reported"
    commit_all(dispatcher, pool)
    assert (dispatcher.scheduler.done, dispatcher.scheduler.given_up, len(committed)) == (4, [], 4)


def test_first_attempt_that_commits_first_counts(straggling_run: StragglingRun) -> None:
    dispatcher, pool, committed, _ = straggling_run
    pool.commit("0")
    dispatcher.collect_events(0)
    pool.commit("1", committed_here=False)
    commit_all(dispatcher, pool)
    dispatcher.collect_events(0)
    assert (dispatcher.scheduler.done, len(committed)) == (4, 4)


def test_one_of_two_attempts_may_fail(straggling_run: StragglingRun) -> None:
    dispatcher, pool, committed, _ = straggling_run
    pool.fail("1", AttemptFailed("out of luck"))
    dispatcher.collect_events(0)
    assert dispatcher.scheduler.waiting == 0, "the other attempt is running"
    commit_all(dispatcher, pool)
    assert (dispatcher.scheduler.done, len(committed)) == (4, 4)


@pytest.mark.parametrize("error", [CheckFailed("a foreign part"), Temporary("the plan was discarded")])
def test_output_error_of_the_slower_attempt_still_ends_the_run(
    straggling_run: StragglingRun, error: BatchjobError
) -> None:
    dispatcher, pool, _, _ = straggling_run
    pool.commit("1")
    dispatcher.collect_events(0)
    pool.fail("0", error)
    with pytest.raises(type(error)):
        dispatcher.collect_events(0)
