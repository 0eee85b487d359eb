"""Whole runs over a pool that misbehaves as scripted: what is handed out, what is committed, how it ends."""

from __future__ import annotations

import json
import re
import shutil
import signal
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from scripted_pool import (
    WORKER_INFO,
    AttemptScript,
    ScriptedPool,
    call_first,
    commit,
    commit_after,
    commit_twice,
    fail,
    fail_after_commit,
    fail_worker,
    hang,
    make_job,
)

from batchjob.driver import driver
from batchjob.driver.control_loop import StopSignals
from batchjob.driver.lease import EXPIRY_SECONDS, Lease
from batchjob.driver.progress import NoProgress, ProgressReporter
from batchjob.errors import BatchjobError, CheckFailed, InvalidJob, JobError, Temporary, Unavailable
from batchjob.job.job import Job
from batchjob.output.commit import list_parts as parts_of_commit
from batchjob.plan.head import discard_plan as bury_of_head
from batchjob.plan.head import read_current_head
from batchjob.pool.pool import Pool
from batchjob.report.run_result import RunResult
from batchjob.storage.store import open_store
from batchjob.worker.messages import WorkerEvent, WorkerFailed, WorkerReady

TWELVE = [f"{number:03}.png" for number in range(12)]  # six shards


class Heard(NoProgress):
    """Remembers what a person would have been told."""

    def __init__(self) -> None:
        self.notes: list[str] = []
        self.done = self.before = self.failed = self.total = 0
        self.final = self.started = self.stopped = False

    def start(self, planned: int | None) -> None:
        assert planned is None
        self.started = True

    def set_planned(self, images: int, final: bool) -> None:
        self.total, self.final = images, final

    def add_resumed(self, images: int) -> None:
        self.before += images

    def advance(self, images: int, failed: int) -> None:
        self.done += images
        self.failed += failed

    def note(self, text: str) -> None:
        self.notes.append(text)

    def stop(self) -> None:
        self.stopped = True


class Rival:
    """Another driver, whose clock runs as fast as it sleeps, so that 20 s of silence are over at once."""

    def __init__(self, output: str) -> None:
        self._output, self._now = output, 0.0
        self.lease: Lease | None = None

    def takes_over(self) -> None:
        self.lease = Lease.acquire(open_store(self._output), clock=lambda: self._now, sleep=self._sleep)
        assert self._now >= EXPIRY_SECONDS

    def _sleep(self, seconds: float) -> None:
        self._now += seconds


def no_pool() -> Pool:
    raise AssertionError("no worker is needed for this")


def run(
    the: Job,
    pool: Pool | None = None,
    *,
    allow_empty: bool = False,
    repair: bool = False,
    progress: ProgressReporter | None = None,
) -> RunResult:
    make_pool: Callable[[], Pool] = no_pool if pool is None else lambda: pool
    return driver.run(the, make_pool, allow_empty=allow_empty, repair=repair, progress=progress or NoProgress())


def positions(output: Path) -> list[int]:
    """Of all rows, part by part."""
    parts = sorted((output / "predictions").glob("*.parquet"))
    return [row for part in parts for row in pq.read_table(part).column("position").to_pylist()]


def parts(output: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in (output / "predictions").iterdir()}


def files(output: Path) -> dict[str, tuple[int, int]]:
    """All files, by inode and time of writing."""
    found = (path for path in output.rglob("*") if path.is_file())
    return {str(path): (path.stat().st_ino, path.stat().st_mtime_ns) for path in found}


def success(output: Path) -> dict[str, Any]:
    facts: dict[str, Any] = json.loads((output / "_SUCCESS").read_text())
    return facts


def heads(output: Path) -> list[str]:
    return sorted(path.parent.name for path in output.glob("_batchjob/plans/*/head.json"))


def meanwhile(happens: Callable[[], object]) -> Iterator[None]:
    """Workers that never get ready, and what happens while one waits for them."""
    yield None
    happens()


def bury(output: Path) -> None:
    """The first step of a discard."""
    store = open_store(str(output))
    _, head = read_current_head(store)
    assert head is not None
    bury_of_head(store, head)


def term() -> None:
    signal.raise_signal(signal.SIGTERM)


@pytest.fixture
def out(tmp_path: Path) -> Path:
    return tmp_path / "out"


@pytest.fixture(autouse=True)
def handlers_come_back() -> Iterator[None]:
    """However a run ends, the two signals mean what they meant before."""
    before = [signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT)]
    yield
    assert [signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT)] == before


@pytest.fixture(autouse=True)
def lease_released(out: Path) -> Iterator[None]:
    """However a run ends, the next driver need not wait."""
    yield
    for path in sorted(out.glob("_batchjob/lease/*.json"))[-1:]:
        assert json.loads(path.read_bytes())["released"]


@pytest.fixture
def quick_beats(monkeypatch: pytest.MonkeyPatch) -> None:
    """The lease is looked at in every turn."""
    monkeypatch.setattr("batchjob.driver.lease.HEARTBEAT_SECONDS", 0.0)


# --- a whole run ----------------------------------------------------------------------------------------------------


def test_every_shard_is_committed_once(tmp_path: Path, out: Path) -> None:
    pool, heard = ScriptedPool(), Heard()
    outcome = run(make_job(tmp_path, TWELVE), pool, progress=heard)
    assert (outcome.status, outcome.exit_code) == ("complete", 0)
    assert (outcome.planned, outcome.predicted, outcome.failed) == (12, 12, 0)
    assert outcome.output == str(out)
    assert pool.submitted == list(range(6))
    assert pool.closed
    assert positions(out) == list(range(12))
    assert (heard.done, heard.total, heard.final, heard.stopped) == (12, 12, True, True)
    assert any("fake@" in note and "cpu" in note for note in heard.notes)


def test_success_and_report_say_what_is_there(tmp_path: Path, out: Path) -> None:
    run(make_job(tmp_path, TWELVE), ScriptedPool())
    facts = success(out)
    assert facts["counts"] == {"planned": 12, "predicted": 12, "failed": 0}
    assert [part["name"] for part in facts["parts"]] == sorted(f"predictions/{name}" for name in parts(out))
    there = parts_of_commit(open_store(str(out)))
    assert {part["name"]: part["etag"] for part in facts["parts"]} == {key: stat.etag for key, stat in there.items()}
    assert sum(part["rows"] for part in facts["parts"]) == 12
    report = json.loads((out / "_batchjob/report.json").read_text())
    assert report.pop("tuning", []) == []
    assert report == {key: value for key, value in facts.items() if key != "parts"}
    assert [worker["model"] for worker in report["workers"]] == [WORKER_INFO.model]


def test_workers_are_told_what_they_need(tmp_path: Path, out: Path) -> None:
    pool = ScriptedPool()
    run(make_job(tmp_path, TWELVE), pool)
    assert pool.setup is not None
    assert pool.setup.job_folder == str(tmp_path)
    assert pool.setup.small_input_bytes == sum((tmp_path / "images" / name).stat().st_size for name in TWELVE)
    assert [Path(location).name for location in pool.setup.sample] == TWELVE
    assert pool.setup.visibility_check is not None
    key, word = pool.setup.visibility_check
    assert word in (out / key).read_text()


def test_a_plan_of_many_chunks_is_done_whole(tmp_path: Path, out: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("batchjob.plan.chunks.CHUNK_ROWS", 4)
    pool = ScriptedPool()
    assert run(make_job(tmp_path, [*TWELVE, "last.png"]), pool).status == "complete"
    assert len(list(out.glob("_batchjob/plans/0000/chunk-*"))) == 4
    assert sorted(pool.submitted) == list(range(7))
    assert positions(out) == list(range(13))


def test_answers_may_come_in_any_order(tmp_path: Path, out: Path) -> None:
    script: dict[int, list[AttemptScript]] = {0: [commit_after(9)], 1: [commit_after(5)], 4: [commit_after(3)]}
    pool = ScriptedPool(script, newest_first=True)
    assert run(make_job(tmp_path, TWELVE), pool).status == "complete"
    assert pool.attempts == dict.fromkeys(range(6), 1)
    assert positions(out) == list(range(12))


def test_an_answer_that_comes_twice_counts_once(tmp_path: Path) -> None:
    heard = Heard()
    outcome = run(
        make_job(tmp_path, TWELVE),
        ScriptedPool({0: [commit_twice], 2: [commit_twice], 5: [commit_after(20)]}),
        progress=heard,
    )
    assert (outcome.status, outcome.planned, outcome.predicted) == ("complete", 12, 12)
    assert heard.done == 12


def test_no_more_is_handed_out_than_workers_take(tmp_path: Path) -> None:
    pool = ScriptedPool({0: [commit_after(5)]}, size=1)  # asserts in `submit`
    assert run(make_job(tmp_path, TWELVE), pool).status == "complete"


@pytest.mark.parametrize(("asked", "shards"), [("auto", 1), (5, 3), (100, 1)])
def test_shard_size_is_the_jobs_or_fits_the_input(tmp_path: Path, out: Path, asked: object, shards: int) -> None:
    run(make_job(tmp_path, TWELVE, runtime={"shard_size": asked}), ScriptedPool())
    assert len(parts(out)) == shards


def test_a_shard_that_would_exceed_a_part_is_refused(tmp_path: Path, out: Path) -> None:
    with pytest.raises(InvalidJob, match=r"runtime.shard_size: 1,000,000 rows .* at most 262,144"):
        run(make_job(tmp_path, TWELVE, runtime={"shard_size": 1_000_000}), ScriptedPool())
    assert heads(out) == []


# --- failed attempts ------------------------------------------------------------------------------------------------


def test_a_lost_attempt_is_made_again(tmp_path: Path, out: Path) -> None:
    pool, heard = ScriptedPool({1: [fail(), fail()], 4: [fail()]}), Heard()
    outcome = run(make_job(tmp_path, TWELVE), pool, progress=heard)
    assert (outcome.status, outcome.predicted) == ("complete", 12)
    assert pool.attempts == {0: 1, 1: 3, 2: 1, 3: 1, 4: 2, 5: 1}
    assert "shard 4 failed: worker 0 was lost" in heard.notes
    assert positions(out) == list(range(12))


def test_a_shard_that_fails_every_attempt_is_given_up_and_the_others_are_done(tmp_path: Path, out: Path) -> None:
    the, pool, heard = make_job(tmp_path, TWELVE), ScriptedPool({1: [fail()] * 9}), Heard()
    outcome = run(the, pool, progress=heard)
    assert (outcome.status, outcome.exit_code) == ("incomplete", 4)
    assert (outcome.planned, outcome.predicted, outcome.failed) == (12, 10, 0)
    assert "1 shard gave up" in outcome.message
    assert "number 1, with: worker 0 was lost" in outcome.message
    assert any("shard 1 failed, given up" in note for note in heard.notes)
    assert pool.attempts[1] == 3
    assert not (out / "_SUCCESS").exists()
    before = parts(out)

    again = ScriptedPool()
    outcome = run(the, again)
    assert (outcome.status, outcome.exit_code, outcome.predicted) == ("complete", 0, 12)
    assert again.submitted == [1]
    assert parts(out).items() > before.items()
    assert len(success(out)["parts"]) == 6


@pytest.mark.parametrize("attempts", [1, 2])
def test_the_job_says_how_many_attempts(tmp_path: Path, attempts: int) -> None:
    pool = ScriptedPool({1: [fail()] * 9})
    assert run(make_job(tmp_path, TWELVE, errors={"attempts": attempts}), pool).exit_code == 4
    assert pool.attempts[1] == attempts


def test_what_a_lost_worker_did_commit_is_committed(tmp_path: Path, out: Path) -> None:
    pool = ScriptedPool({1: [fail_after_commit], 2: [fail(), fail(), fail_after_commit]})
    outcome = run(make_job(tmp_path, TWELVE), pool)
    assert (outcome.status, outcome.predicted) == ("complete", 12)  # shard 2 used up its attempts, and is there
    assert pool.attempts[1] == 2
    assert positions(out) == list(range(12))


# --- faults that are nobody's ---------------------------------------------------------------------------------------


def test_temporary_faults_use_up_no_attempts(tmp_path: Path) -> None:
    away = Unavailable("the store does not answer")
    pool = ScriptedPool({1: [fail(away), fail(away)], 3: [fail(away), fail(away)]}, size=1)
    assert run(make_job(tmp_path, TWELVE, errors={"attempts": 1}), pool).status == "complete"
    assert pool.attempts == {0: 1, 1: 3, 2: 1, 3: 3, 4: 1, 5: 1}


def test_temporary_faults_that_persist_end_the_run(tmp_path: Path, out: Path) -> None:
    the, pool = (
        make_job(tmp_path, TWELVE),
        ScriptedPool({n: [fail(Unavailable("credentials expired"))] * 9 for n in (2, 3)}),
    )
    with pytest.raises(Unavailable, match="credentials expired") as caught:
        run(the, pool)
    assert (caught.value.exit_code, caught.value.status) == (75, "temporary")
    assert pool.closed
    assert not (out / "_SUCCESS").exists()
    before = parts(out)
    assert before
    again = ScriptedPool()
    assert run(the, again).status == "complete"
    assert len(again.submitted) == 6 - len(before)
    assert positions(out) == list(range(12))


# --- errors that end the run ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("wrapped", [fail, fail_worker])
@pytest.mark.parametrize(
    ("error", "code"),
    [(InvalidJob("another worker loaded other weights"), 2), (CheckFailed("alarm"), 3), (Temporary("Ray is gone"), 75)],
)
def test_an_error_of_the_whole_job_ends_it_now(
    tmp_path: Path, wrapped: Callable[[BatchjobError], AttemptScript], error: JobError, code: int
) -> None:
    the, pool = make_job(tmp_path, TWELVE), ScriptedPool({1: [wrapped(error)], 2: [hang]}, size=1)
    with pytest.raises(type(error), match=error.message) as caught:
        run(the, pool)
    assert caught.value.exit_code == code
    assert pool.closed
    assert len(pool.submitted) <= 3
    assert run(the, ScriptedPool()).status == "complete"


def test_a_worker_that_cannot_load_freezes_nothing(tmp_path: Path, out: Path) -> None:
    pool = ScriptedPool(ready=[None, WorkerFailed(InvalidJob("runtime.device: no CUDA here"))])
    with pytest.raises(InvalidJob, match="no CUDA"):
        run(make_job(tmp_path, TWELVE), pool)
    assert pool.closed
    assert heads(out) == []
    assert run(make_job(tmp_path, TWELVE, runtime={"shard_size": 3}), ScriptedPool()).status == "complete"


def test_an_error_that_ends_a_run_carries_its_counts(tmp_path: Path) -> None:
    names, errors = ["000-bad.png", *TWELVE[1:]], {"max_rate": 0.5}
    gone = Temporary("Ray is gone")
    for failing, predicted in ((3, 5), (4, 7)):  # the second run goes on from the first
        pool = ScriptedPool({failing: [fail_worker(gone)]}, size=1)
        with pytest.raises(Temporary) as caught:
            run(make_job(tmp_path, names, errors=errors), pool)
        outcome = RunResult.from_error(caught.value)
        assert (outcome.planned, outcome.predicted, outcome.failed) == (12, predicted, 1)
    assert caught.value.counts == (12, 7, 1)


def test_a_drain_carries_its_counts(tmp_path: Path) -> None:
    with pytest.raises(Temporary) as caught:
        run(make_job(tmp_path, TWELVE), ScriptedPool({1: [call_first(term, commit_after(2))]}, size=1))
    planned, predicted, failed = caught.value.counts
    assert (planned, failed) == (12, 0)
    assert predicted >= 4


# --- signals --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_lets_running_shards_commit_and_hands_out_no_more(
    tmp_path: Path, out: Path, number: signal.Signals
) -> None:
    the, heard = make_job(tmp_path, TWELVE), Heard()
    pool = ScriptedPool(
        {0: [call_first(lambda: signal.raise_signal(number), commit_after(3))], 1: [commit_after(5)]}, size=1
    )
    with pytest.raises(Temporary, match="stopped by a signal; the same command resumes") as caught:
        run(the, pool, progress=heard)
    assert caught.value.exit_code == 75
    assert pool.submitted == [0, 1]
    assert pool.closed
    assert any("stopping: up to 8 s for 2 running shards" in note for note in heard.notes)
    assert positions(out) == [0, 1, 2, 3]
    before = parts(out)

    again = ScriptedPool()
    assert run(the, again).status == "complete"
    assert again.submitted == [2, 3, 4, 5]
    assert parts(out).items() > before.items()


def test_a_drain_waits_only_so_long(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("batchjob.driver.dispatcher.DRAIN_SECONDS", 0.05)
    pool = ScriptedPool({0: [call_first(term, hang)]})
    with pytest.raises(Temporary, match="stopped by a signal"):
        run(make_job(tmp_path, TWELVE), pool)
    assert pool.closed


def test_a_second_signal_is_obeyed_at_once(tmp_path: Path, out: Path) -> None:
    pool = ScriptedPool({0: [call_first(term, hang)], 1: [call_first(term, hang)]})
    with pytest.raises(Temporary, match="second signal") as caught:
        run(make_job(tmp_path, TWELVE), pool)
    assert caught.value.exit_code == 75
    assert pool.closed
    assert not (out / "predictions").exists()


def test_a_signal_is_heard_while_workers_start(tmp_path: Path, out: Path) -> None:
    pool = ScriptedPool(ready=meanwhile(term))
    with pytest.raises(Temporary, match="stopped by a signal"):
        run(make_job(tmp_path, TWELVE), pool)
    assert pool.closed
    assert pool.submitted == []
    assert heads(out) == []


def test_a_signal_is_heard_though_workers_took_the_handler(tmp_path: Path) -> None:
    def waking() -> Iterator[WorkerEvent | None]:
        signal.signal(signal.SIGTERM, signal.SIG_IGN)  # Ray takes it when it starts
        yield WorkerReady("0", WORKER_INFO)

    pool = ScriptedPool({0: [call_first(term)]}, ready=waking())
    with pytest.raises(Temporary, match="stopped by a signal"):
        run(make_job(tmp_path, TWELVE), pool)


def test_a_signal_outside_the_main_thread_is_nobodys(tmp_path: Path) -> None:
    """`batchjob.run` may be called from any thread, though only the main one may set handlers."""
    before, found = signal.getsignal(signal.SIGTERM), list[object]()

    def drained() -> None:
        with StopSignals() as drain:
            found.extend([signal.getsignal(signal.SIGTERM), drain.requested.is_set()])

    thread = threading.Thread(target=drained)
    thread.start()
    thread.join()
    assert found == [before, False]


def test_handlers_that_a_library_took_are_taken_back() -> None:
    with StopSignals() as drain:
        signal.signal(signal.SIGTERM, signal.SIG_IGN)  # as Ray does when it starts
        drain.install()
        term()
        assert drain.requested.is_set()


# --- the lease ------------------------------------------------------------------------------------------------------


@pytest.mark.usefixtures("quick_beats")
def test_a_driver_that_lost_its_lease_hands_out_no_more(tmp_path: Path, out: Path) -> None:
    the, rival = make_job(tmp_path, TWELVE), Rival(str(out))
    pool = ScriptedPool({1: [call_first(rival.takes_over)]}, size=1)
    with pytest.raises(Temporary, match=r"another driver .* is at work") as caught:
        run(the, pool)
    assert caught.value.exit_code == 75
    assert pool.closed
    assert max(pool.submitted) <= 2
    assert not (out / "_SUCCESS").exists()
    newest = max(out.glob("_batchjob/lease/*.json"))
    assert not json.loads(newest.read_bytes())["released"]  # the rival's is left as it is
    assert rival.lease is not None
    rival.lease.release()
    assert run(the, ScriptedPool()).status == "complete"
    assert positions(out) == list(range(12))


@pytest.mark.usefixtures("quick_beats")
def test_a_driver_that_lost_its_lease_while_workers_start_freezes_nothing(tmp_path: Path, out: Path) -> None:
    the, rival = make_job(tmp_path, TWELVE), Rival(str(out))

    with pytest.raises(Temporary, match="at work"):
        run(the, ScriptedPool(ready=meanwhile(rival.takes_over)))
    assert heads(out) == []
    assert rival.lease is not None
    rival.lease.release()


@pytest.mark.usefixtures("quick_beats")
def test_nobody_discards_or_plans_under_a_driver_at_work(tmp_path: Path, out: Path) -> None:
    the, go_on, started = make_job(tmp_path, TWELVE), threading.Event(), threading.Event()

    def until_told(pool: ScriptedPool, key: Any) -> Iterator[Any]:
        started.set()
        while not go_on.is_set():
            yield None
        yield from commit(pool, key)

    found: list[RunResult] = []
    at_work = threading.Thread(target=lambda: found.append(run(the, ScriptedPool({0: [until_told]}))))
    at_work.start()
    try:
        assert started.wait(60)
        with pytest.raises(Temporary, match="another driver"):
            driver.discard(str(out))
        with pytest.raises(Temporary, match="another driver"):
            driver.make_plan(the, allow_empty=False, progress=NoProgress())
        with pytest.raises(Temporary, match="another driver"):
            run(the)
    finally:
        go_on.set()
        at_work.join()
    assert [outcome.status for outcome in found] == ["complete"]
    assert not list(out.glob("_batchjob/plans/*/discarded"))


def test_two_drivers_at_once_do_no_harm(tmp_path: Path, out: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The lease saves work; that each part is there once does not rest on it."""
    monkeypatch.setattr(
        "batchjob.driver.lease.HEARTBEAT_SECONDS", 1e9
    )  # so that the first learns of the second only at its end
    the = make_job(tmp_path, TWELVE)
    rivals: list[dict[str, bytes]] = []

    def another_runs() -> None:
        for path in out.glob("_batchjob/lease/*.json"):
            path.unlink()
        assert run(the, ScriptedPool()).status == "complete"
        rivals.append(parts(out))

    pool = ScriptedPool({2: [call_first(another_runs)]})
    with pytest.raises(Temporary, match="another driver"):
        run(the, pool)
    assert pool.submitted == list(range(6))
    assert [parts(out)] == rivals
    assert positions(out) == list(range(12))
    assert run(the).status == "already_complete"


def test_a_plan_that_another_job_froze_meanwhile_is_not_taken_for_ours(
    tmp_path: Path, out: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("batchjob.driver.lease.HEARTBEAT_SECONDS", 1e9)
    the = make_job(tmp_path, TWELVE)
    other = make_job(tmp_path, TWELVE, task={"type": "embedding", "normalize": True})

    def waking() -> Iterator[WorkerEvent | None]:
        for path in out.glob("_batchjob/lease/*.json"):
            path.unlink()
        driver.make_plan(other, allow_empty=False, progress=NoProgress())
        yield WorkerReady("0", WORKER_INFO)

    pool = ScriptedPool(ready=waking())
    with pytest.raises(InvalidJob, match="belongs to another job"):
        run(the, pool)
    assert pool.submitted == []
    assert heads(out) == ["0000"]


# --- the error budget -----------------------------------------------------------------------------------------------

BAD = ["000-bad.png", *TWELVE[1:6], "006-bad.png", "007-bad.png", *TWELVE[8:]]
TO_THE_END = {"abort_early": False}


def test_over_the_error_budget_there_is_no_success(tmp_path: Path, out: Path) -> None:
    heard = Heard()
    outcome = run(make_job(tmp_path, BAD, errors=TO_THE_END), ScriptedPool(), progress=heard)
    assert (outcome.status, outcome.exit_code) == ("over_budget", 3)
    assert (outcome.planned, outcome.predicted, outcome.failed) == (12, 9, 3)
    assert "3 of 12 images failed, errors.max_rate allows 1.00%" in outcome.message
    assert "decode/truncated (3, such as " in outcome.message
    assert "000-bad.png: ends too early)" in outcome.message
    assert f"batchjob errors {out}" in outcome.message
    assert not (out / "_SUCCESS").exists()
    assert positions(out) == list(range(12))
    assert json.loads((out / "_batchjob/report.json").read_text())["errors"] == {"decode/truncated": 3}
    assert heard.failed == 3


def test_a_higher_budget_finishes_an_output_without_new_work(tmp_path: Path, out: Path) -> None:
    run(make_job(tmp_path, BAD, errors=TO_THE_END), ScriptedPool())
    before = parts(out)
    assert run(make_job(tmp_path, BAD)).exit_code == 3  # the same again changes nothing, and needs no worker
    assert run(make_job(tmp_path, BAD, errors={"max_rate": 0.24})).exit_code == 3
    outcome = run(make_job(tmp_path, BAD, errors={"max_rate": 0.25}))
    assert (outcome.status, outcome.exit_code, outcome.failed) == ("complete", 0, 3)
    assert parts(out) == before
    assert success(out)["errors"] == {"decode/truncated": 3}


def test_an_incomplete_run_says_so_first(tmp_path: Path) -> None:
    assert run(make_job(tmp_path, BAD, errors=TO_THE_END), ScriptedPool({5: [fail()] * 3})).exit_code == 4


def test_a_run_that_is_surely_over_the_budget_stops_early(tmp_path: Path, out: Path) -> None:
    the, pool, heard = make_job(tmp_path, BAD, errors={"max_rate": 0.1}), ScriptedPool(size=1), Heard()
    outcome = run(the, pool, progress=heard)
    assert (outcome.status, outcome.exit_code) == ("over_budget", 3)
    assert pool.closed
    assert 5 not in pool.submitted  # shard 3 broke the budget, and what ran beside it was let through
    assert re.search(r"stopped early: 3 of \d+ images failed so far, of 12 planned, errors.max_rate", outcome.message)
    assert "most often decode/truncated (3, such as " in outcome.message
    assert f"batchjob errors {out}" in outcome.message
    assert not (out / "_SUCCESS").exists()
    assert json.loads((out / "_batchjob/report.json").read_text())["stopped_early"]

    before = parts(out)
    again = run(the)  # no worker is started for it
    assert (again.exit_code, again.failed, parts(out)) == (3, 3, before)
    raised = run(make_job(tmp_path, BAD, errors={"max_rate": 0.5}), ScriptedPool())
    assert (raised.status, raised.predicted, raised.failed) == ("complete", 9, 3)
    assert positions(out) == list(range(12))


def test_a_count_stops_a_run_before_its_plan_is_whole(
    tmp_path: Path, out: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("batchjob.plan.chunks.CHUNK_ROWS", 2)
    monkeypatch.setattr(driver, "_MAX_WAITING_SHARDS", 1)
    names = [f"{number:03}-bad.png" for number in range(60)]
    the = make_job(tmp_path, names, errors={"max_rate": 1.0, "max_count": 3})
    outcome = run(the, ScriptedPool(size=1))
    assert outcome.exit_code == 3
    assert "errors.max_count allows 3; most often decode/truncated" in outcome.message
    assert 4 <= outcome.failed < 60
    assert run(the).exit_code == 3
    raised = run(make_job(tmp_path, names, errors={"max_rate": 1.0, "max_count": 60}), ScriptedPool())
    assert (raised.status, raised.failed) == ("complete", 60)


def test_what_fails_at_the_end_stops_nothing_early(tmp_path: Path, out: Path) -> None:
    outcome = run(make_job(tmp_path, [*TWELVE[:11], "011-bad.png"]), ScriptedPool(size=1))
    assert outcome.exit_code == 3
    assert outcome.message.startswith("1 of 12 images failed, errors.max_rate allows 1.00%")
    assert positions(out) == list(range(12))


# --- foreign and missing parts --------------------------------------------------------------------------------------


def interrupted(tmp_path: Path, done: int = 3) -> Job:
    """A job with its first shards committed."""
    the = make_job(tmp_path, TWELVE)
    with pytest.raises(Temporary):
        run(the, ScriptedPool({done: [fail_worker(Temporary("Ray is gone"))]}, size=1))
    return the


def a_stranger(output: Path) -> str:
    """A Parquet file that is no part of ours."""
    (output / "predictions").mkdir(parents=True, exist_ok=True)
    pq.write_table(pa.table({"position": [1]}), output / "predictions/part-0000000-stranger.parquet")
    return r"predictions/part-0000000-stranger.parquet was not written by batchjob"


def a_relative(output: Path, tmp_path: Path) -> str:
    """A part of another output."""
    (tmp_path / "other").mkdir()
    run(make_job(tmp_path / "other", ["elsewhere.png"]), ScriptedPool())
    part = next((tmp_path / "other/out/predictions").iterdir())
    (output / "predictions").mkdir(parents=True, exist_ok=True)
    shutil.copy2(part, output / "predictions" / part.name)
    return f"{part.name} is a part of plan .*, not of this output"


@pytest.mark.parametrize("kind", ["stranger", "relative"])
def test_a_foreign_part_stops_a_resume_and_is_named(tmp_path: Path, out: Path, kind: str) -> None:
    the = interrupted(tmp_path)
    said = a_stranger(out) if kind == "stranger" else a_relative(out, tmp_path)
    with pytest.raises(CheckFailed, match=said) as caught:
        run(the, ScriptedPool({3: [hang]}))  # before the work, not after it
    assert caught.value.exit_code == 3
    assert "remove it" in caught.value.message
    assert not (out / "_SUCCESS").exists()


@pytest.mark.parametrize("kind", ["stranger", "relative"])
def test_a_foreign_part_without_a_plan_stops_a_run(tmp_path: Path, out: Path, kind: str) -> None:
    said = a_stranger(out) if kind == "stranger" else a_relative(out, tmp_path)
    with pytest.raises(JobError, match=said):
        run(make_job(tmp_path, TWELVE), ScriptedPool())
    assert heads(out) == []


@pytest.mark.parametrize("kind", ["stranger", "relative"])
def test_a_foreign_part_that_appears_meanwhile_is_found_at_the_end(tmp_path: Path, out: Path, kind: str) -> None:
    said: list[str] = []
    appears = call_first(lambda: said.append(a_stranger(out) if kind == "stranger" else a_relative(out, tmp_path)))
    with pytest.raises(CheckFailed) as caught:
        run(make_job(tmp_path, TWELVE), ScriptedPool({5: [appears]}))
    assert caught.match(said[0])
    assert not (out / "_SUCCESS").exists()


def test_a_part_that_vanishes_after_its_commit_is_missed(tmp_path: Path, out: Path) -> None:
    the = make_job(tmp_path, TWELVE)
    gone: list[str] = []

    def vanish() -> None:
        path = min((out / "predictions").iterdir())
        gone.append(path.name)
        path.unlink()

    with pytest.raises(CheckFailed, match="vanished after its commit; run again") as caught:
        run(the, ScriptedPool({5: [call_first(vanish, commit_after(1))]}))
    assert gone[0] in caught.value.message
    again = ScriptedPool()
    assert run(the, again).status == "complete"
    assert again.submitted == [0]


@pytest.mark.parametrize("damage", ["gone", "replaced", "added"])
def test_a_finished_output_that_was_tampered_with_is_an_alarm(tmp_path: Path, out: Path, damage: str) -> None:
    the = make_job(tmp_path, TWELVE)
    run(the, ScriptedPool())
    part = min((out / "predictions").iterdir())
    if damage == "added":
        shutil.copy2(part, part.with_name("part-0000099-copy.parquet"))
    else:
        part.unlink()
    if damage == "replaced":
        part.write_bytes(b"something else")
    before = files(out)
    with pytest.raises(
        CheckFailed, match="_SUCCESS stands, but what it lists does not: 1 part gone, changed"
    ) as caught:
        run(the)
    assert caught.value.exit_code == 3
    assert ("copy" if damage == "added" else part.name) in caught.value.message
    assert files(out) == before  # nothing is computed anew, nothing written


def test_what_is_gone_from_a_finished_output_can_be_made_again(tmp_path: Path, out: Path) -> None:
    the = make_job(tmp_path, TWELVE)
    run(the, ScriptedPool())
    gone = min((out / "predictions").iterdir())
    gone.unlink()
    with pytest.raises(CheckFailed, match=rf"{gone.name}.*`batchjob run --repair`"):
        run(the)
    before, pool = parts(out), ScriptedPool()
    assert run(the, pool, repair=True).status == "complete"
    assert pool.submitted == [0]
    assert parts(out).items() > before.items()
    assert positions(out) == list(range(12))
    assert run(the).status == "already_complete"


def test_a_repair_that_is_cut_short_is_resumed(tmp_path: Path, out: Path) -> None:
    the = make_job(tmp_path, TWELVE)
    run(the, ScriptedPool())
    min((out / "predictions").iterdir()).unlink()
    with pytest.raises(Temporary):
        run(the, ScriptedPool({0: [fail_worker(Temporary("Ray is gone"))]}), repair=True)
    assert not (out / "_SUCCESS").exists()
    assert run(the, ScriptedPool()).status == "complete"


def test_a_repair_of_what_is_whole_does_nothing(tmp_path: Path, out: Path) -> None:
    the = make_job(tmp_path, TWELVE)
    run(the, ScriptedPool())
    before = files(out)
    assert run(the, repair=True).status == "already_complete"
    assert files(out) == before


def test_a_repair_deletes_nothing_that_it_does_not_know(tmp_path: Path, out: Path) -> None:
    the = make_job(tmp_path, TWELVE)
    run(the, ScriptedPool())
    said = a_stranger(out)
    with pytest.raises(CheckFailed, match=said):
        run(the, repair=True)
    (out / "predictions/part-0000000-stranger.parquet").unlink()
    assert run(the, repair=True).status == "complete"


# --- again ----------------------------------------------------------------------------------------------------------


def test_a_finished_output_is_left_alone(tmp_path: Path, out: Path) -> None:
    the = make_job(tmp_path, TWELVE)
    run(the, ScriptedPool())
    before = files(out)
    outcome = run(the)
    assert (outcome.status, outcome.exit_code) == ("already_complete", 0)
    assert (outcome.planned, outcome.predicted, outcome.failed) == (12, 12, 0)
    assert files(out) == before


def test_a_resume_does_only_what_is_missing(tmp_path: Path, out: Path) -> None:
    the = interrupted(tmp_path)
    before = parts(out)
    assert len(before) == 3
    pool, heard = ScriptedPool(), Heard()
    outcome = run(the, pool, progress=heard)
    assert (outcome.status, outcome.planned, outcome.predicted) == ("complete", 12, 12)
    assert pool.submitted == [3, 4, 5]
    assert parts(out).items() > before.items()
    assert heard.before + heard.done == 12
    assert any("resuming plan" in note and "3 parts committed" in note for note in heard.notes)
    assert positions(out) == list(range(12))


def test_what_was_committed_before_is_no_measure_of_speed(tmp_path: Path) -> None:
    the, heard = interrupted(tmp_path), Heard()
    run(the, ScriptedPool(), progress=heard)
    assert (heard.before, heard.done) == (6, 6)


def test_a_missing_part_of_an_unfinished_output_is_made_again(tmp_path: Path, out: Path) -> None:
    the = interrupted(tmp_path)
    min((out / "predictions").iterdir()).unlink()
    pool = ScriptedPool()
    assert run(the, pool).status == "complete"
    assert pool.submitted == [0, 3, 4, 5]


def test_all_there_but_success_needs_no_worker(tmp_path: Path, out: Path) -> None:
    the = make_job(tmp_path, TWELVE)
    run(the, ScriptedPool())
    listed = success(out)["parts"]
    (out / "_SUCCESS").unlink()
    assert run(the).status == "complete"
    assert success(out)["parts"] == listed


@pytest.mark.parametrize("left", [0, 1, 2])
def test_a_plan_that_was_cut_short_is_written_to_its_end(
    tmp_path: Path, out: Path, monkeypatch: pytest.MonkeyPatch, left: int
) -> None:
    monkeypatch.setattr("batchjob.plan.chunks.CHUNK_ROWS", 4)
    the = make_job(tmp_path, TWELVE)
    made = driver.make_plan(the, allow_empty=False, progress=NoProgress())
    for chunk in sorted(out.glob("_batchjob/plans/0000/chunk-*"))[left:]:
        chunk.unlink()
    assert run(the, ScriptedPool()).status == "complete"
    assert success(out)["plan"] == made.plan
    assert positions(out) == list(range(12))


def test_a_resume_goes_by_the_plan_not_by_the_input(tmp_path: Path, out: Path) -> None:
    interrupted(tmp_path)
    the = make_job(tmp_path, ["0.png", *TWELVE, "zzz.png"])
    assert run(the, ScriptedPool()).planned == 12
    assert positions(out) == list(range(12))


@pytest.mark.parametrize("finished", [True, False])
def test_another_job_on_the_output_is_refused_with_the_difference(tmp_path: Path, out: Path, finished: bool) -> None:
    interrupted(tmp_path)
    if finished:
        run(make_job(tmp_path, TWELVE), ScriptedPool())
    before = files(out)
    with pytest.raises(InvalidJob, match=r"belongs to another job:\n  task.normalize: not set there, true here\n"):
        run(make_job(tmp_path, TWELVE, task={"type": "embedding", "normalize": True}))
    assert files(out) == before


# --- inputs ---------------------------------------------------------------------------------------------------------


def test_an_empty_input_is_refused_before_anything_is_frozen(tmp_path: Path, out: Path) -> None:
    with pytest.raises(InvalidJob, match=r"no images there .*--allow-empty"):
        run(make_job(tmp_path, []))
    assert heads(out) == []


def test_an_empty_input_may_be_allowed(tmp_path: Path, out: Path) -> None:
    the = make_job(tmp_path, [])
    outcome = run(the, ScriptedPool(), allow_empty=True)
    assert (outcome.status, outcome.exit_code, outcome.planned) == ("complete", 0, 0)
    (part,) = (out / "predictions").iterdir()
    assert pq.read_table(part).num_rows == 0
    assert success(out)["counts"] == {"planned": 0, "predicted": 0, "failed": 0}
    assert run(the).status == "already_complete"


@pytest.mark.parametrize("require", [{"marker": "_DONE"}, {"min_images": 13}])
def test_an_input_that_is_not_there_yet_freezes_nothing(tmp_path: Path, out: Path, require: dict[str, object]) -> None:
    the = make_job(tmp_path, TWELVE, input={"type": "prefix", "uri": "images/", "require": require})
    with pytest.raises(Temporary) as caught:
        run(the)
    assert caught.value.exit_code == 75
    assert heads(out) == []
    make_job(tmp_path, ["zzz.png"])
    (tmp_path / "images/_DONE").touch()
    assert run(the, ScriptedPool()).planned == 13


def test_model_code_that_is_missing_is_said_before_any_worker_starts(tmp_path: Path) -> None:
    the = make_job(tmp_path, TWELVE, model={"type": "python", "target": "nets:build"})
    with pytest.raises(InvalidJob, match=r"nets\.py: not there"):
        run(the)


# --- planning alone -------------------------------------------------------------------------------------------------


def test_a_plan_is_frozen_without_workers_and_run_later(tmp_path: Path, out: Path) -> None:
    the = make_job(tmp_path, TWELVE)
    made = driver.make_plan(the, allow_empty=False, progress=NoProgress())
    assert (made.images, made.shards, made.shard_size, made.output) == (12, 6, 2, str(out))
    assert not (out / "predictions").exists()
    again = driver.make_plan(the, allow_empty=False, progress=NoProgress())
    assert (again.plan, again.images, again.shards) == (made.plan, 12, 6)
    assert run(make_job(tmp_path, ["later.png"]), ScriptedPool()).planned == 12
    assert success(out)["plan"] == made.plan


def test_a_plan_of_many_chunks_is_written_whole(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("batchjob.plan.chunks.CHUNK_ROWS", 4)
    heard = Heard()
    made = driver.make_plan(make_job(tmp_path, [*TWELVE, "last.png"]), allow_empty=False, progress=heard)
    assert (made.images, made.shards) == (13, 7)
    assert (heard.total, heard.final) == (13, True)


def test_a_signal_ends_planning(tmp_path: Path, out: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("batchjob.plan.chunks.CHUNK_ROWS", 2)
    heard, the = Heard(), make_job(tmp_path, [f"{number:03}.png" for number in range(100)])
    monkeypatch.setattr(heard, "set_planned", lambda n, final: term() if n == 2 else None)
    with pytest.raises(Temporary, match="stopped by a signal"):
        driver.make_plan(the, allow_empty=False, progress=heard)
    assert len(list(out.glob("_batchjob/plans/0000/chunk-*"))) < 50
    assert driver.make_plan(the, allow_empty=False, progress=NoProgress()).images == 100


def test_planning_is_seen_to_begin_and_to_end(tmp_path: Path) -> None:
    heard = Heard()
    driver.make_plan(make_job(tmp_path, TWELVE), allow_empty=False, progress=heard)
    assert (heard.started, heard.stopped) == (True, True)


def test_planning_refuses_what_a_run_refuses(tmp_path: Path, out: Path) -> None:
    with pytest.raises(InvalidJob, match="no images there"):
        driver.make_plan(make_job(tmp_path, []), allow_empty=False, progress=NoProgress())
    made = driver.make_plan(make_job(tmp_path, []), allow_empty=True, progress=NoProgress())
    assert (made.images, made.shards) == (0, 1)
    with pytest.raises(InvalidJob, match="belongs to another job"):
        driver.make_plan(
            make_job(tmp_path, [], task={"type": "embedding", "normalize": True}),
            allow_empty=True,
            progress=NoProgress(),
        )


# --- discarding -----------------------------------------------------------------------------------------------------


def test_a_discarded_output_is_free_for_another_job(tmp_path: Path, out: Path) -> None:
    run(make_job(tmp_path, TWELVE), ScriptedPool())
    said = driver.discard(str(out))
    assert "deleted 6 parts" in said
    assert "(number 0)" in said
    assert list((out / "predictions").iterdir()) == []
    assert not (out / "_SUCCESS").exists()
    other = make_job(tmp_path, TWELVE, task={"type": "embedding", "normalize": True})
    assert run(other, ScriptedPool()).status == "complete"
    assert heads(out) == ["0000", "0001"]
    assert positions(out) == list(range(12))


def test_a_half_done_output_can_be_discarded(tmp_path: Path, out: Path) -> None:
    the = interrupted(tmp_path)
    assert "deleted 3 parts" in driver.discard(str(out))
    pool = ScriptedPool()
    assert run(the, pool).status == "complete"
    assert pool.submitted == list(range(6))


def test_nothing_to_discard_is_said(tmp_path: Path, out: Path) -> None:
    with pytest.raises(InvalidJob, match="nothing to discard"):
        driver.discard(str(out))


def test_discard_deletes_nothing_where_nothing_was_ever_planned(tmp_path: Path, out: Path) -> None:
    a_stranger(out)
    before = parts(out)
    with pytest.raises(InvalidJob, match="nothing to discard"):
        driver.discard(str(out))
    assert parts(out) == before


def test_a_discard_that_was_cut_short_can_be_finished(tmp_path: Path, out: Path) -> None:
    run(make_job(tmp_path, TWELVE), ScriptedPool())
    bury(out)
    assert "an earlier plan's leftovers, deleted 6 parts" in driver.discard(str(out))
    assert not (out / "_SUCCESS").exists()


def test_a_run_after_a_discard_that_was_cut_short_takes_success_away(tmp_path: Path, out: Path) -> None:
    run(make_job(tmp_path, TWELVE), ScriptedPool())
    bury(out)
    assert run(make_job(tmp_path, TWELVE), ScriptedPool({0: [fail()] * 3})).exit_code == 4
    assert not (out / "_SUCCESS").exists()


@pytest.mark.parametrize("when", ["before", "during"])
def test_a_part_of_a_discarded_plan_is_deleted_when_met(tmp_path: Path, out: Path, when: str) -> None:
    the = make_job(tmp_path, TWELVE)
    run(the, ScriptedPool())
    old = min((out / "predictions").iterdir())
    shutil.copy2(old, tmp_path / "late")
    driver.discard(str(out))

    def comes_late() -> None:
        shutil.copy2(tmp_path / "late", old)

    if when == "before":
        comes_late()
    acts: list[AttemptScript] = [call_first(comes_late)] if when == "during" else []
    assert run(the, ScriptedPool({4: acts})).status == "complete"
    assert not old.exists()
    assert positions(out) == list(range(12))


def test_discarding_at_a_mistyped_place_leaves_no_trace(tmp_path: Path) -> None:
    with pytest.raises(InvalidJob, match="nothing to discard"):
        driver.discard(str(tmp_path / "mistyped"))
    assert not (tmp_path / "mistyped").exists()
