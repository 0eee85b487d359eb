"""Runs, plans and discards of a whole driver over a scripted pool: dispatches, commits, results and errors."""

from __future__ import annotations

import json
import os
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

from batchjob.driver import driver
from batchjob.driver.control_loop import StopSignals
from batchjob.driver.lease import EXPIRY_SECONDS, Lease
from batchjob.driver.progress import NoProgress, ProgressReporter
from batchjob.errors import BatchjobError, CheckFailed, InvalidJob, JobError, Temporary, Unavailable
from batchjob.job.job import Job
from batchjob.output.commit import list_parts
from batchjob.plan.head import discard_plan, read_current_head
from batchjob.pool.pool import Pool
from batchjob.report.output_status import read_status
from batchjob.report.run_result import RunResult
from batchjob.storage.store import open_store
from batchjob.worker.messages import WorkerEvent, WorkerFailed, WorkerReady
from tests.support.memory_store import Fault, Killed, MemoryStore
from tests.support.scripted_pool import (
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

IMAGES = [f"{number:03}.png" for number in range(12)]  # six shards


class RecordingProgress(NoProgress):
    """Progress reporter that records its calls."""

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


class RivalDriver:
    """Another driver whose clock advances only in its sleep, so that the lease expires at once."""

    def __init__(self, output: str) -> None:
        self._output, self._now = output, 0.0
        self.lease: Lease | None = None

    def take_over(self) -> None:
        self.lease = Lease.acquire(open_store(self._output), clock=lambda: self._now, sleep=self._sleep)
        assert self._now >= EXPIRY_SECONDS

    def _sleep(self, seconds: float) -> None:
        self._now += seconds


def no_pool() -> Pool:
    raise AssertionError("no worker is needed for this")


def run_job(
    job: Job,
    pool: Pool | None = None,
    *,
    allow_empty: bool = False,
    repair: bool = False,
    fresh: bool = False,
    check_input: bool = False,
    progress: ProgressReporter | None = None,
) -> RunResult:
    make_pool: Callable[[], Pool] = no_pool if pool is None else lambda: pool
    return driver.run(
        job,
        make_pool,
        allow_empty=allow_empty,
        repair=repair,
        fresh=fresh,
        check_input=check_input,
        progress=progress or NoProgress(),
    )


def read_positions(output: Path) -> list[int]:
    """Read the positions of all rows, part by part."""
    paths = sorted((output / "predictions").glob("*.parquet"))
    return [row for path in paths for row in pq.read_table(path).column("position").to_pylist()]


def read_parts(output: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in (output / "predictions").iterdir()}


def list_files(output: Path) -> dict[str, tuple[int, int]]:
    """Return inode and modification time of all files."""
    found = (path for path in output.rglob("*") if path.is_file())
    return {str(path): (path.stat().st_ino, path.stat().st_mtime_ns) for path in found}


def read_success(output: Path) -> dict[str, Any]:
    success: dict[str, Any] = json.loads((output / "_SUCCESS").read_text())
    return success


def list_heads(output: Path) -> list[str]:
    return sorted(path.parent.name for path in output.glob("_batchjob/plans/*/head.json"))


def call_while_starting(call: Callable[[], object]) -> Iterator[None]:
    """Start events of workers that never get ready; call something while the driver waits for them."""
    yield None
    call()


def put_tombstone(output: Path) -> None:
    """Make the first step of a discard."""
    store = open_store(str(output))
    _, head = read_current_head(store)
    assert head is not None
    discard_plan(store, head)


def send_sigterm() -> None:
    signal.raise_signal(signal.SIGTERM)


@pytest.fixture
def output(tmp_path: Path) -> Path:
    return tmp_path / "out"


@pytest.fixture(autouse=True)
def restore_signal_handlers() -> Iterator[None]:
    """Check that a run restores the handlers of both signals, no matter how it ends."""
    before = [signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT)]
    yield
    assert [signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT)] == before


@pytest.fixture(autouse=True)
def check_lease_is_released(output: Path) -> Iterator[None]:
    """Check that a run releases its lease, no matter how it ends."""
    yield
    for path in sorted(output.glob("_batchjob/lease/*.json"))[-1:]:
        assert json.loads(path.read_bytes())["released"]


@pytest.fixture
def heartbeat_in_every_tick(monkeypatch: pytest.MonkeyPatch) -> None:
    """Check the lease in every tick."""
    monkeypatch.setattr("batchjob.driver.lease.HEARTBEAT_SECONDS", 0.0)


# --- a whole run ----------------------------------------------------------------------------------------------------


def test_run_commits_every_shard_once(tmp_path: Path, output: Path) -> None:
    pool, progress = ScriptedPool(), RecordingProgress()
    result = run_job(make_job(tmp_path, IMAGES), pool, progress=progress)
    assert (result.status, result.exit_code) == ("complete", 0)
    assert (result.planned, result.predicted, result.failed) == (12, 12, 0)
    assert result.output == str(output)
    assert pool.submitted == list(range(6))
    assert pool.closed
    assert read_positions(output) == list(range(12))
    assert (progress.done, progress.total, progress.final, progress.stopped) == (12, 12, True, True)
    assert any("fake@" in note and "cpu" in note for note in progress.notes)


def test_success_and_report_list_the_parts_and_counts(tmp_path: Path, output: Path) -> None:
    run_job(make_job(tmp_path, IMAGES), ScriptedPool())
    success = read_success(output)
    assert success["counts"] == {"planned": 12, "predicted": 12, "failed": 0}
    assert [part["name"] for part in success["parts"]] == sorted(f"predictions/{name}" for name in read_parts(output))
    listing = list_parts(open_store(str(output)))
    assert {part["name"]: part["etag"] for part in success["parts"]} == {
        key: info.etag for key, info in listing.items()
    }
    assert sum(part["rows"] for part in success["parts"]) == 12
    report = json.loads((output / "_batchjob/report.json").read_text())
    assert report.pop("tuning", []) == []
    assert report == {key: value for key, value in success.items() if key != "parts"}
    assert [worker["model"] for worker in report["workers"]] == [WORKER_INFO.model]


def test_worker_setup_has_folder_sample_and_visibility_check(tmp_path: Path, output: Path) -> None:
    pool = ScriptedPool()
    run_job(make_job(tmp_path, IMAGES), pool)
    assert pool.setup is not None
    assert pool.setup.job_folder == str(tmp_path)
    assert pool.setup.small_input_bytes == sum((tmp_path / "images" / name).stat().st_size for name in IMAGES)
    assert [Path(location).name for location in pool.setup.sample] == IMAGES
    assert pool.setup.visibility_check is not None
    key, word = pool.setup.visibility_check
    assert word in (output / key).read_text()


def test_run_covers_a_plan_of_many_chunks(tmp_path: Path, output: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("batchjob.plan.chunks.CHUNK_ROWS", 4)
    pool = ScriptedPool()
    assert run_job(make_job(tmp_path, [*IMAGES, "last.png"]), pool).status == "complete"
    assert len(list(output.glob("_batchjob/plans/0000/chunk-*"))) == 4
    assert sorted(pool.submitted) == list(range(7))
    assert read_positions(output) == list(range(13))


def test_events_may_come_in_any_order(tmp_path: Path, output: Path) -> None:
    script: dict[int, list[AttemptScript]] = {0: [commit_after(9)], 1: [commit_after(5)], 4: [commit_after(3)]}
    pool = ScriptedPool(script, newest_first=True)
    assert run_job(make_job(tmp_path, IMAGES), pool).status == "complete"
    assert pool.attempts == dict.fromkeys(range(6), 1)
    assert read_positions(output) == list(range(12))


def test_repeated_commit_event_counts_once(tmp_path: Path) -> None:
    progress = RecordingProgress()
    result = run_job(
        make_job(tmp_path, IMAGES),
        ScriptedPool({0: [commit_twice], 2: [commit_twice], 5: [commit_after(20)]}),
        progress=progress,
    )
    assert (result.status, result.planned, result.predicted) == ("complete", 12, 12)
    assert progress.done == 12


def test_dispatch_never_exceeds_free_slots(tmp_path: Path) -> None:
    pool = ScriptedPool({0: [commit_after(5)]}, size=1)  # `submit` asserts it
    assert run_job(make_job(tmp_path, IMAGES), pool).status == "complete"


@pytest.mark.parametrize(("requested", "shards"), [("auto", 1), (5, 3), (100, 1)])
def test_shard_size_is_taken_from_the_job_or_fitted_to_the_input(
    tmp_path: Path, output: Path, requested: object, shards: int
) -> None:
    run_job(make_job(tmp_path, IMAGES, runtime={"shard_size": requested}), ScriptedPool())
    assert len(read_parts(output)) == shards


def test_shard_size_above_the_part_limit_is_refused(tmp_path: Path, output: Path) -> None:
    with pytest.raises(InvalidJob, match=r"runtime.shard_size: 1,000,000 rows .* at most 262,144"):
        run_job(make_job(tmp_path, IMAGES, runtime={"shard_size": 1_000_000}), ScriptedPool())
    assert list_heads(output) == []


# --- failed attempts ------------------------------------------------------------------------------------------------


def test_failed_attempt_is_repeated(tmp_path: Path, output: Path) -> None:
    pool, progress = ScriptedPool({1: [fail(), fail()], 4: [fail()]}), RecordingProgress()
    result = run_job(make_job(tmp_path, IMAGES), pool, progress=progress)
    assert (result.status, result.predicted) == ("complete", 12)
    assert pool.attempts == {0: 1, 1: 3, 2: 1, 3: 1, 4: 2, 5: 1}
    assert "shard 4 failed: worker 0 was lost" in progress.notes
    assert read_positions(output) == list(range(12))


def test_shard_is_abandoned_after_its_attempts_and_the_others_are_committed(tmp_path: Path, output: Path) -> None:
    job, pool, progress = make_job(tmp_path, IMAGES), ScriptedPool({1: [fail()] * 9}), RecordingProgress()
    result = run_job(job, pool, progress=progress)
    assert (result.status, result.exit_code) == ("incomplete", 4)
    assert (result.planned, result.predicted, result.failed) == (12, 10, 0)
    assert "1 shard gave up" in result.message
    assert "number 1, with: worker 0 was lost" in result.message
    assert any("shard 1 failed, given up" in note for note in progress.notes)
    assert pool.attempts[1] == 3
    assert not (output / "_SUCCESS").exists()
    before = read_parts(output)

    second_pool = ScriptedPool()
    result = run_job(job, second_pool)
    assert (result.status, result.exit_code, result.predicted) == ("complete", 0, 12)
    assert second_pool.submitted == [1]
    assert read_parts(output).items() > before.items()
    assert len(read_success(output)["parts"]) == 6


@pytest.mark.parametrize("attempts", [1, 2])
def test_number_of_attempts_is_taken_from_the_job(tmp_path: Path, attempts: int) -> None:
    pool = ScriptedPool({1: [fail()] * 9})
    assert run_job(make_job(tmp_path, IMAGES, errors={"attempts": attempts}), pool).exit_code == 4
    assert pool.attempts[1] == attempts


def test_part_of_a_lost_worker_counts_as_committed(tmp_path: Path, output: Path) -> None:
    pool = ScriptedPool({1: [fail_after_commit], 2: [fail(), fail(), fail_after_commit]})
    result = run_job(make_job(tmp_path, IMAGES), pool)
    assert (result.status, result.predicted) == ("complete", 12)  # shard 2 used up its attempts, but its part is there
    assert pool.attempts[1] == 2
    assert read_positions(output) == list(range(12))


# --- unavailable store ----------------------------------------------------------------------------------------------


def test_unavailable_store_uses_up_no_attempts(tmp_path: Path) -> None:
    away = Unavailable("the store does not answer")
    pool = ScriptedPool({1: [fail(away), fail(away)], 3: [fail(away), fail(away)]}, size=1)
    assert run_job(make_job(tmp_path, IMAGES, errors={"attempts": 1}), pool).status == "complete"
    assert pool.attempts == {0: 1, 1: 3, 2: 1, 3: 3, 4: 1, 5: 1}


def test_persistent_unavailability_ends_the_run(tmp_path: Path, output: Path) -> None:
    job, pool = (
        make_job(tmp_path, IMAGES),
        ScriptedPool({n: [fail(Unavailable("credentials expired"))] * 9 for n in (2, 3)}),
    )
    with pytest.raises(Unavailable, match="credentials expired") as raised:
        run_job(job, pool)
    assert (raised.value.exit_code, raised.value.status) == (75, "temporary")
    assert pool.closed
    assert not (output / "_SUCCESS").exists()
    before = read_parts(output)
    assert before
    second_pool = ScriptedPool()
    assert run_job(job, second_pool).status == "complete"
    assert len(second_pool.submitted) == 6 - len(before)
    assert read_positions(output) == list(range(12))


# --- errors that end the run ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("make_script", [fail, fail_worker])
@pytest.mark.parametrize(
    ("error", "code"),
    [(InvalidJob("another worker loaded other weights"), 2), (CheckFailed("alarm"), 3), (Temporary("Ray is gone"), 75)],
)
def test_job_error_ends_the_run_at_once(
    tmp_path: Path, make_script: Callable[[BatchjobError], AttemptScript], error: JobError, code: int
) -> None:
    job, pool = make_job(tmp_path, IMAGES), ScriptedPool({1: [make_script(error)], 2: [hang]}, size=1)
    with pytest.raises(type(error), match=error.message) as raised:
        run_job(job, pool)
    assert raised.value.exit_code == code
    assert pool.closed
    assert len(pool.submitted) <= 3
    assert run_job(job, ScriptedPool()).status == "complete"


def test_worker_that_cannot_load_leaves_no_plan(tmp_path: Path, output: Path) -> None:
    pool = ScriptedPool(ready=[None, WorkerFailed(InvalidJob("runtime.device: no CUDA here"))])
    with pytest.raises(InvalidJob, match="no CUDA"):
        run_job(make_job(tmp_path, IMAGES), pool)
    assert pool.closed
    assert list_heads(output) == []
    assert run_job(make_job(tmp_path, IMAGES, runtime={"shard_size": 3}), ScriptedPool()).status == "complete"


def test_error_of_a_run_carries_its_counts(tmp_path: Path) -> None:
    names, errors = ["000-bad.png", *IMAGES[1:]], {"max_rate": 0.5}
    gone = Temporary("Ray is gone")
    for failing, predicted in ((3, 5), (4, 7)):  # the second run resumes the first
        pool = ScriptedPool({failing: [fail_worker(gone)]}, size=1)
        with pytest.raises(Temporary) as raised:
            run_job(make_job(tmp_path, names, errors=errors), pool)
        result = RunResult.from_error(raised.value)
        assert (result.planned, result.predicted, result.failed) == (12, predicted, 1)
    assert raised.value.counts == (12, 7, 1)


def test_stop_signal_error_carries_the_counts(tmp_path: Path) -> None:
    with pytest.raises(Temporary) as raised:
        run_job(make_job(tmp_path, IMAGES), ScriptedPool({1: [call_first(send_sigterm, commit_after(2))]}, size=1))
    planned, predicted, failed = raised.value.counts
    assert (planned, failed) == (12, 0)
    assert predicted >= 4


# --- signals --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_stop_signal_lets_running_shards_commit_and_dispatches_no_more(
    tmp_path: Path, output: Path, number: signal.Signals
) -> None:
    job, progress = make_job(tmp_path, IMAGES), RecordingProgress()
    pool = ScriptedPool(
        {0: [call_first(lambda: signal.raise_signal(number), commit_after(3))], 1: [commit_after(5)]}, size=1
    )
    with pytest.raises(Temporary, match="stopped by a signal; the same command resumes") as raised:
        run_job(job, pool, progress=progress)
    assert raised.value.exit_code == 75
    assert pool.submitted == [0, 1]
    assert pool.closed
    assert any("stopping: up to 8 s for 2 running shards" in note for note in progress.notes)
    assert read_positions(output) == [0, 1, 2, 3]
    before = read_parts(output)

    second_pool = ScriptedPool()
    assert run_job(job, second_pool).status == "complete"
    assert second_pool.submitted == [2, 3, 4, 5]
    assert read_parts(output).items() > before.items()


def test_drain_has_a_time_limit(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("batchjob.driver.dispatcher.DRAIN_SECONDS", 0.05)
    pool = ScriptedPool({0: [call_first(send_sigterm, hang)]})
    with pytest.raises(Temporary, match="stopped by a signal"):
        run_job(make_job(tmp_path, IMAGES), pool)
    assert pool.closed


def test_second_signal_stops_at_once(tmp_path: Path, output: Path) -> None:
    pool = ScriptedPool({0: [call_first(send_sigterm, hang)], 1: [call_first(send_sigterm, hang)]})
    with pytest.raises(Temporary, match="second signal") as raised:
        run_job(make_job(tmp_path, IMAGES), pool)
    assert raised.value.exit_code == 75
    assert pool.closed
    assert not (output / "predictions").exists()


def test_stop_signal_ends_the_run_while_workers_start(tmp_path: Path, output: Path) -> None:
    pool = ScriptedPool(ready=call_while_starting(send_sigterm))
    with pytest.raises(Temporary, match="stopped by a signal"):
        run_job(make_job(tmp_path, IMAGES), pool)
    assert pool.closed
    assert pool.submitted == []
    assert list_heads(output) == []


def test_stop_signal_works_although_a_worker_replaced_the_handler(tmp_path: Path) -> None:
    def start_events() -> Iterator[WorkerEvent | None]:
        signal.signal(signal.SIGTERM, signal.SIG_IGN)  # as Ray does when it starts
        yield WorkerReady("0", WORKER_INFO)

    pool = ScriptedPool({0: [call_first(send_sigterm)]}, ready=start_events())
    with pytest.raises(Temporary, match="stopped by a signal"):
        run_job(make_job(tmp_path, IMAGES), pool)


def test_stop_signals_do_nothing_outside_the_main_thread(tmp_path: Path) -> None:
    """`batchjob.run` may be called in any thread, although only the main thread may set handlers."""
    before, found = signal.getsignal(signal.SIGTERM), list[object]()

    def enter_stop_signals() -> None:
        with StopSignals() as signals:
            found.extend([signal.getsignal(signal.SIGTERM), signals.requested.is_set()])

    thread = threading.Thread(target=enter_stop_signals)
    thread.start()
    thread.join()
    assert found == [before, False]


def test_replaced_signal_handlers_are_installed_again() -> None:
    with StopSignals() as signals:
        signal.signal(signal.SIGTERM, signal.SIG_IGN)  # as Ray does when it starts
        signals.install()
        send_sigterm()
        assert signals.requested.is_set()


# --- the lease ------------------------------------------------------------------------------------------------------


@pytest.mark.usefixtures("heartbeat_in_every_tick")
def test_driver_that_lost_its_lease_dispatches_no_more(tmp_path: Path, output: Path) -> None:
    job, rival = make_job(tmp_path, IMAGES), RivalDriver(str(output))
    pool = ScriptedPool({1: [call_first(rival.take_over)]}, size=1)
    with pytest.raises(Temporary, match=r"another driver .* is at work") as raised:
        run_job(job, pool)
    assert raised.value.exit_code == 75
    assert pool.closed
    assert max(pool.submitted) <= 2
    assert not (output / "_SUCCESS").exists()
    newest = max(output.glob("_batchjob/lease/*.json"))
    assert not json.loads(newest.read_bytes())["released"]  # the rival's lease is unchanged
    assert rival.lease is not None
    rival.lease.release()
    assert run_job(job, ScriptedPool()).status == "complete"
    assert read_positions(output) == list(range(12))


@pytest.mark.usefixtures("heartbeat_in_every_tick")
def test_driver_that_lost_its_lease_while_workers_start_leaves_no_plan(tmp_path: Path, output: Path) -> None:
    job, rival = make_job(tmp_path, IMAGES), RivalDriver(str(output))

    with pytest.raises(Temporary, match="at work"):
        run_job(job, ScriptedPool(ready=call_while_starting(rival.take_over)))
    assert list_heads(output) == []
    assert rival.lease is not None
    rival.lease.release()


@pytest.mark.usefixtures("heartbeat_in_every_tick")
def test_discard_and_run_are_refused_beside_a_running_driver(tmp_path: Path, output: Path) -> None:
    job, go_on, started = make_job(tmp_path, IMAGES), threading.Event(), threading.Event()

    def commit_when_told(pool: ScriptedPool, key: Any) -> Iterator[Any]:
        started.set()
        while not go_on.is_set():
            yield None
        yield from commit(pool, key)

    found: list[RunResult] = []
    thread = threading.Thread(target=lambda: found.append(run_job(job, ScriptedPool({0: [commit_when_told]}))))
    thread.start()
    try:
        assert started.wait(60)
        with pytest.raises(Temporary, match="another driver"):
            driver.discard(str(output))
        # The running driver has planned all of it, so there is nothing to write.
        assert not driver.make_plan(job, allow_empty=False, progress=NoProgress()).written
        with pytest.raises(Temporary, match="another driver"):
            run_job(job)
    finally:
        go_on.set()
        thread.join()
    assert [result.status for result in found] == ["complete"]
    assert not list(output.glob("_batchjob/plans/*/discarded"))


def test_two_drivers_at_once_commit_each_part_once(
    tmp_path: Path, output: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The lease only saves work: each part is committed once without it, too."""
    # The first driver learns of the second one only at its end.
    monkeypatch.setattr("batchjob.driver.lease.HEARTBEAT_SECONDS", 1e9)
    job = make_job(tmp_path, IMAGES)
    rival_parts: list[dict[str, bytes]] = []

    def run_rival() -> None:
        for path in output.glob("_batchjob/lease/*.json"):
            path.unlink()
        assert run_job(job, ScriptedPool()).status == "complete"
        rival_parts.append(read_parts(output))

    pool = ScriptedPool({2: [call_first(run_rival)]})
    with pytest.raises(Temporary, match="another driver"):
        run_job(job, pool)
    assert pool.submitted == list(range(6))
    assert [read_parts(output)] == rival_parts
    assert read_positions(output) == list(range(12))
    assert run_job(job).status == "already_complete"


def test_plan_of_another_job_made_meanwhile_is_refused(
    tmp_path: Path, output: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("batchjob.driver.lease.HEARTBEAT_SECONDS", 1e9)
    job = make_job(tmp_path, IMAGES)
    other = make_job(tmp_path, IMAGES, task={"type": "embedding", "normalize": True})

    def start_events() -> Iterator[WorkerEvent | None]:
        for path in output.glob("_batchjob/lease/*.json"):
            path.unlink()
        driver.make_plan(other, allow_empty=False, progress=NoProgress())
        yield WorkerReady("0", WORKER_INFO)

    pool = ScriptedPool(ready=start_events())
    with pytest.raises(InvalidJob, match="belongs to another job"):
        run_job(job, pool)
    assert pool.submitted == []
    assert list_heads(output) == ["0000"]


# --- the error budget -----------------------------------------------------------------------------------------------

IMAGES_WITH_BAD = ["000-bad.png", *IMAGES[1:6], "006-bad.png", "007-bad.png", *IMAGES[8:]]
NO_EARLY_STOP = {"abort_early": False}


def test_run_over_the_error_budget_writes_no_success(tmp_path: Path, output: Path) -> None:
    progress = RecordingProgress()
    result = run_job(make_job(tmp_path, IMAGES_WITH_BAD, errors=NO_EARLY_STOP), ScriptedPool(), progress=progress)
    assert (result.status, result.exit_code) == ("over_budget", 3)
    assert (result.planned, result.predicted, result.failed) == (12, 9, 3)
    assert "3 of 12 images failed, errors.max_rate allows 1.00%" in result.message
    assert "decode/truncated (3, such as " in result.message
    assert "000-bad.png: ends too early)" in result.message
    assert f"batchjob errors {output}" in result.message
    assert not (output / "_SUCCESS").exists()
    assert read_positions(output) == list(range(12))
    assert json.loads((output / "_batchjob/report.json").read_text())["errors"] == {"decode/truncated": 3}
    assert progress.failed == 3


def test_higher_error_budget_finishes_an_output_without_new_work(tmp_path: Path, output: Path) -> None:
    run_job(make_job(tmp_path, IMAGES_WITH_BAD, errors=NO_EARLY_STOP), ScriptedPool())
    before = read_parts(output)
    # The same job again changes nothing and needs no worker.
    assert run_job(make_job(tmp_path, IMAGES_WITH_BAD)).exit_code == 3
    assert run_job(make_job(tmp_path, IMAGES_WITH_BAD, errors={"max_rate": 0.24})).exit_code == 3
    result = run_job(make_job(tmp_path, IMAGES_WITH_BAD, errors={"max_rate": 0.25}))
    assert (result.status, result.exit_code, result.failed) == ("complete", 0, 3)
    assert read_parts(output) == before
    assert read_success(output)["errors"] == {"decode/truncated": 3}


def test_abandoned_shards_take_precedence_over_the_error_budget(tmp_path: Path) -> None:
    assert (
        run_job(make_job(tmp_path, IMAGES_WITH_BAD, errors=NO_EARLY_STOP), ScriptedPool({5: [fail()] * 3})).exit_code
        == 4
    )


def test_run_that_must_exceed_the_error_budget_stops_early(tmp_path: Path, output: Path) -> None:
    job, pool, progress = (
        make_job(tmp_path, IMAGES_WITH_BAD, errors={"max_rate": 0.1}),
        ScriptedPool(size=1),
        RecordingProgress(),
    )
    result = run_job(job, pool, progress=progress)
    assert (result.status, result.exit_code) == ("over_budget", 3)
    assert pool.closed
    assert 5 not in pool.submitted  # shard 3 exceeded the budget; the shard that ran beside it may commit
    assert re.search(r"stopped early: 3 of \d+ images failed so far, of 12 planned, errors.max_rate", result.message)
    assert "most often decode/truncated (3, such as " in result.message
    assert f"batchjob errors {output}" in result.message
    assert not (output / "_SUCCESS").exists()
    assert json.loads((output / "_batchjob/report.json").read_text())["stopped_early"]

    before = read_parts(output)
    second = run_job(job)  # without a pool
    assert (second.exit_code, second.failed, read_parts(output)) == (3, 3, before)
    raised_budget = run_job(make_job(tmp_path, IMAGES_WITH_BAD, errors={"max_rate": 0.5}), ScriptedPool())
    assert (raised_budget.status, raised_budget.predicted, raised_budget.failed) == ("complete", 9, 3)
    assert read_positions(output) == list(range(12))


def test_max_count_stops_a_run_before_its_plan_is_complete(
    tmp_path: Path, output: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("batchjob.plan.chunks.CHUNK_ROWS", 2)
    monkeypatch.setattr("batchjob.driver.job_run._MAX_WAITING_SHARDS", 1)
    names = [f"{number:03}-bad.png" for number in range(60)]
    job = make_job(tmp_path, names, errors={"max_rate": 1.0, "max_count": 3})
    result = run_job(job, ScriptedPool(size=1))
    assert result.exit_code == 3
    assert "errors.max_count allows 3; most often decode/truncated" in result.message
    assert 4 <= result.failed < 60
    assert run_job(job).exit_code == 3
    raised_budget = run_job(make_job(tmp_path, names, errors={"max_rate": 1.0, "max_count": 60}), ScriptedPool())
    assert (raised_budget.status, raised_budget.failed) == ("complete", 60)


def test_error_in_the_last_shard_stops_nothing_early(tmp_path: Path, output: Path) -> None:
    result = run_job(make_job(tmp_path, [*IMAGES[:11], "011-bad.png"]), ScriptedPool(size=1))
    assert result.exit_code == 3
    assert result.message.startswith("1 of 12 images failed, errors.max_rate allows 1.00%")
    assert read_positions(output) == list(range(12))


# --- foreign and missing parts --------------------------------------------------------------------------------------


def make_interrupted_job(tmp_path: Path, done: int = 3) -> Job:
    """Make a job whose first shards are committed."""
    job = make_job(tmp_path, IMAGES)
    with pytest.raises(Temporary):
        run_job(job, ScriptedPool({done: [fail_worker(Temporary("Ray is gone"))]}, size=1))
    return job


def put_foreign_file(output: Path) -> str:
    """Put a Parquet file that batchjob did not write; return a pattern of the error message."""
    (output / "predictions").mkdir(parents=True, exist_ok=True)
    pq.write_table(pa.table({"position": [1]}), output / "predictions/part-0000000-stranger.parquet")
    return r"predictions/part-0000000-stranger.parquet was not written by batchjob"


def put_part_of_other_output(output: Path, tmp_path: Path) -> str:
    """Put a part of another output; return a pattern of the error message."""
    (tmp_path / "other").mkdir()
    run_job(make_job(tmp_path / "other", ["elsewhere.png"]), ScriptedPool())
    part = next((tmp_path / "other/out/predictions").iterdir())
    (output / "predictions").mkdir(parents=True, exist_ok=True)
    shutil.copy2(part, output / "predictions" / part.name)
    return f"{part.name} is a part of plan .*, not of this output"


@pytest.mark.parametrize("kind", ["foreign", "other output"])
def test_foreign_part_stops_a_resume(tmp_path: Path, output: Path, kind: str) -> None:
    job = make_interrupted_job(tmp_path)
    message = put_foreign_file(output) if kind == "foreign" else put_part_of_other_output(output, tmp_path)
    with pytest.raises(CheckFailed, match=message) as raised:
        run_job(job, ScriptedPool({3: [hang]}))  # found before the work
    assert raised.value.exit_code == 3
    assert "remove it" in raised.value.message
    assert not (output / "_SUCCESS").exists()


@pytest.mark.parametrize("kind", ["foreign", "other output"])
def test_foreign_part_without_a_plan_stops_a_run(tmp_path: Path, output: Path, kind: str) -> None:
    message = put_foreign_file(output) if kind == "foreign" else put_part_of_other_output(output, tmp_path)
    with pytest.raises(JobError, match=message):
        run_job(make_job(tmp_path, IMAGES))  # found before a pool is made
    assert list_heads(output) == []


@pytest.mark.parametrize("kind", ["foreign", "other output"])
def test_foreign_part_put_during_a_run_is_found_at_its_end(tmp_path: Path, output: Path, kind: str) -> None:
    message: list[str] = []
    put_part = call_first(
        lambda: message.append(
            put_foreign_file(output) if kind == "foreign" else put_part_of_other_output(output, tmp_path)
        )
    )
    with pytest.raises(CheckFailed) as raised:
        run_job(make_job(tmp_path, IMAGES), ScriptedPool({5: [put_part]}))
    assert raised.match(message[0])
    assert not (output / "_SUCCESS").exists()


def test_part_that_vanishes_after_its_commit_is_an_error(tmp_path: Path, output: Path) -> None:
    job = make_job(tmp_path, IMAGES)
    gone: list[str] = []

    def vanish() -> None:
        path = min((output / "predictions").iterdir())
        gone.append(path.name)
        path.unlink()

    with pytest.raises(CheckFailed, match="vanished after its commit; run again") as raised:
        run_job(job, ScriptedPool({5: [call_first(vanish, commit_after(1))]}))
    assert gone[0] in raised.value.message
    second_pool = ScriptedPool()
    assert run_job(job, second_pool).status == "complete"
    assert second_pool.submitted == [0]


@pytest.mark.parametrize("damage", ["gone", "replaced", "added"])
def test_changed_finished_output_is_an_error(tmp_path: Path, output: Path, damage: str) -> None:
    job = make_job(tmp_path, IMAGES)
    run_job(job, ScriptedPool())
    part = min((output / "predictions").iterdir())
    if damage == "added":
        shutil.copy2(part, part.with_name("part-0000099-copy.parquet"))
    else:
        part.unlink()
    if damage == "replaced":
        part.write_bytes(b"something else")
    before = list_files(output)
    with pytest.raises(
        CheckFailed, match="_SUCCESS stands, but what it lists does not: 1 part gone, changed"
    ) as raised:
        run_job(job)
    assert raised.value.exit_code == 3
    assert ("copy" if damage == "added" else part.name) in raised.value.message
    assert list_files(output) == before  # nothing was computed or written


def copy_with_new_times(source: Path, target: Path) -> None:
    shutil.copytree(source, target, copy_function=shutil.copy)  # as `cp -r`


def copy_with_times_in_seconds(source: Path, target: Path) -> None:
    copy_with_new_times(source, target)
    for path in source.rglob("*"):  # as an archive that a backup restores
        os.utime(target / path.relative_to(source), (0, int(path.stat().st_mtime)))


@pytest.mark.parametrize("copy", [copy_with_new_times, copy_with_times_in_seconds, shutil.move])
def test_copied_output_is_finished(tmp_path: Path, output: Path, copy: Callable[[Path, Path], object]) -> None:
    job = make_job(tmp_path, [*IMAGES, "bad.png"], errors={"max_rate": 0.5})
    run_job(job, ScriptedPool())
    copy(output, tmp_path / "copy")
    copied = make_job(tmp_path, [], errors={"max_rate": 0.5}, output={"uri": "copy"})
    assert run_job(copied).status == "already_complete"
    assert read_status(open_store(copied.output.uri)).status == "complete"
    pool = ScriptedPool()
    assert driver.run(copied, lambda: pool, allow_empty=True, progress=NoProgress(), retry=True).failed == 0
    assert pool.submitted == [6]
    assert read_status(open_store(copied.output.uri)).status == "complete"


def test_copied_half_done_output_is_resumed(tmp_path: Path, output: Path) -> None:
    job = make_job(tmp_path, IMAGES)
    with pytest.raises(Temporary):
        run_job(job, ScriptedPool({2: [fail_worker(Temporary("Ray is gone"))]}))
    done = set(read_parts(output))
    copy_with_new_times(output, tmp_path / "copy")
    assert run_job(make_job(tmp_path, [], output={"uri": "copy"}), ScriptedPool()).status == "complete"
    assert done < set(read_parts(tmp_path / "copy"))


def rewrite_footer(part: Path) -> None:
    """Write the part as another attempt would have, with a file of the same size."""
    size, old = part.stat().st_size, re.search(rb'"attempt": "([0-9a-f]{16})"', part.read_bytes())
    assert old is not None
    part.write_bytes(part.read_bytes().replace(old[1], b"f" * 16))
    assert part.stat().st_size == size


def swap_parts(part: Path) -> None:
    """Put the bytes of another plan's part there, filled up to the same size."""
    other = max(part.parent.iterdir()).read_bytes()
    part.write_bytes(b"PAR1".ljust(part.stat().st_size - len(other[4:]), b" ") + other[4:])


@pytest.mark.parametrize("change", [rewrite_footer, swap_parts])
def test_changed_part_of_the_same_size_is_found_in_a_copy(
    tmp_path: Path, output: Path, change: Callable[[Path], None]
) -> None:
    run_job(make_job(tmp_path, IMAGES), ScriptedPool())
    copy_with_new_times(output, tmp_path / "copy")
    part = min((tmp_path / "copy" / "predictions").iterdir())
    change(part)
    copied = make_job(tmp_path, [], output={"uri": "copy"})
    with pytest.raises(CheckFailed, match=rf"1 part gone, changed or added \(predictions/{part.name}\)"):
        run_job(copied)
    status = read_status(open_store(copied.output.uri))
    assert (status.status, len(status.mismatches)) == ("damaged", 1)
    assert f"1 part gone, changed or added since _SUCCESS: {status.mismatches[0]}; restore" in status.lines()[-1]


def test_repair_makes_missing_parts_again(tmp_path: Path, output: Path) -> None:
    job = make_job(tmp_path, IMAGES)
    run_job(job, ScriptedPool())
    gone = min((output / "predictions").iterdir())
    gone.unlink()
    with pytest.raises(CheckFailed, match=rf"{gone.name}.*`batchjob run --repair`"):
        run_job(job)
    before, pool = read_parts(output), ScriptedPool()
    assert run_job(job, pool, repair=True).status == "complete"
    assert pool.submitted == [0]
    assert read_parts(output).items() > before.items()
    assert read_positions(output) == list(range(12))
    assert run_job(job).status == "already_complete"


def test_interrupted_repair_is_resumed_by_a_run(tmp_path: Path, output: Path) -> None:
    job = make_job(tmp_path, IMAGES)
    run_job(job, ScriptedPool())
    min((output / "predictions").iterdir()).unlink()
    with pytest.raises(Temporary):
        run_job(job, ScriptedPool({0: [fail_worker(Temporary("Ray is gone"))]}), repair=True)
    assert not (output / "_SUCCESS").exists()
    assert run_job(job, ScriptedPool()).status == "complete"


def test_repair_of_a_complete_output_does_nothing(tmp_path: Path, output: Path) -> None:
    job = make_job(tmp_path, IMAGES)
    run_job(job, ScriptedPool())
    before = list_files(output)
    assert run_job(job, repair=True).status == "already_complete"
    assert list_files(output) == before


def test_repair_deletes_no_foreign_file(tmp_path: Path, output: Path) -> None:
    job = make_job(tmp_path, IMAGES)
    run_job(job, ScriptedPool())
    message = put_foreign_file(output)
    with pytest.raises(CheckFailed, match=message):
        run_job(job, repair=True)
    assert (output / "_SUCCESS").exists()
    (output / "predictions/part-0000000-stranger.parquet").unlink()
    assert run_job(job, repair=True).status == "already_complete"


# --- resume ---------------------------------------------------------------------------------------------------------


def test_finished_output_is_left_unchanged(tmp_path: Path, output: Path) -> None:
    job = make_job(tmp_path, IMAGES)
    run_job(job, ScriptedPool())
    before = list_files(output)
    result = run_job(job)
    assert (result.status, result.exit_code) == ("already_complete", 0)
    assert (result.planned, result.predicted, result.failed) == (12, 12, 0)
    assert list_files(output) == before


def test_resume_skips_committed_parts(tmp_path: Path, output: Path) -> None:
    job = make_interrupted_job(tmp_path)
    before = read_parts(output)
    assert len(before) == 3
    pool, progress = ScriptedPool(), RecordingProgress()
    result = run_job(job, pool, progress=progress)
    assert (result.status, result.planned, result.predicted) == ("complete", 12, 12)
    assert pool.submitted == [3, 4, 5]
    assert read_parts(output).items() > before.items()
    assert progress.before + progress.done == 12
    assert any("resuming plan" in note and "3 parts committed" in note for note in progress.notes)
    assert read_positions(output) == list(range(12))


def test_resumed_images_are_reported_apart_from_new_ones(tmp_path: Path) -> None:
    job, progress = make_interrupted_job(tmp_path), RecordingProgress()
    run_job(job, ScriptedPool(), progress=progress)
    assert (progress.before, progress.done) == (6, 6)


def test_resume_makes_a_missing_part_again(tmp_path: Path, output: Path) -> None:
    job = make_interrupted_job(tmp_path)
    min((output / "predictions").iterdir()).unlink()
    pool = ScriptedPool()
    assert run_job(job, pool).status == "complete"
    assert pool.submitted == [0, 3, 4, 5]


def test_missing_success_is_written_without_workers(tmp_path: Path, output: Path) -> None:
    job = make_job(tmp_path, IMAGES)
    run_job(job, ScriptedPool())
    listed = read_success(output)["parts"]
    (output / "_SUCCESS").unlink()
    assert run_job(job).status == "complete"
    assert read_success(output)["parts"] == listed


@pytest.mark.parametrize("left", [0, 1, 2])
def test_run_completes_an_interrupted_plan(
    tmp_path: Path, output: Path, monkeypatch: pytest.MonkeyPatch, left: int
) -> None:
    monkeypatch.setattr("batchjob.plan.chunks.CHUNK_ROWS", 4)
    job = make_job(tmp_path, IMAGES)
    summary = driver.make_plan(job, allow_empty=False, progress=NoProgress())
    for chunk in sorted(output.glob("_batchjob/plans/0000/chunk-*"))[left:]:
        chunk.unlink()
    assert run_job(job, ScriptedPool()).status == "complete"
    assert read_success(output)["plan"] == summary.plan
    assert read_positions(output) == list(range(12))


def test_resume_ignores_images_added_to_the_input(tmp_path: Path, output: Path) -> None:
    make_interrupted_job(tmp_path)
    job = make_job(tmp_path, ["0.png", *IMAGES, "zzz.png"])
    assert run_job(job, ScriptedPool()).planned == 12
    assert read_positions(output) == list(range(12))


@pytest.mark.parametrize("finished", [True, False])
def test_another_job_on_the_output_is_refused_with_the_difference(tmp_path: Path, output: Path, finished: bool) -> None:
    make_interrupted_job(tmp_path)
    if finished:
        run_job(make_job(tmp_path, IMAGES), ScriptedPool())
    before = list_files(output)
    with pytest.raises(InvalidJob, match=r"belongs to another job:\n  task.normalize: not set there, true here\n"):
        run_job(make_job(tmp_path, IMAGES, task={"type": "embedding", "normalize": True}))
    assert list_files(output) == before


# --- inputs ---------------------------------------------------------------------------------------------------------


def test_empty_input_is_refused_before_a_plan_is_made(tmp_path: Path, output: Path) -> None:
    with pytest.raises(InvalidJob, match=r"no images there .*--allow-empty"):
        run_job(make_job(tmp_path, []))
    assert list_heads(output) == []


def test_empty_input_can_be_allowed(tmp_path: Path, output: Path) -> None:
    job = make_job(tmp_path, [])
    result = run_job(job, ScriptedPool(), allow_empty=True)
    assert (result.status, result.exit_code, result.planned) == ("complete", 0, 0)
    (part,) = (output / "predictions").iterdir()
    assert pq.read_table(part).num_rows == 0
    assert read_success(output)["counts"] == {"planned": 0, "predicted": 0, "failed": 0}
    assert run_job(job).status == "already_complete"


@pytest.mark.parametrize("require", [{"marker": "_DONE"}, {"min_images": 13}])
def test_incomplete_input_leaves_no_plan(tmp_path: Path, output: Path, require: dict[str, object]) -> None:
    job = make_job(tmp_path, IMAGES, input={"type": "prefix", "uri": "images/", "require": require})
    with pytest.raises(Temporary) as raised:
        run_job(job)
    assert raised.value.exit_code == 75
    assert list_heads(output) == []
    make_job(tmp_path, ["zzz.png"])
    (tmp_path / "images/_DONE").touch()
    assert run_job(job, ScriptedPool()).planned == 13


def test_missing_model_code_is_reported_before_workers_start(tmp_path: Path) -> None:
    job = make_job(tmp_path, IMAGES, model={"type": "python", "target": "nets:build"})
    with pytest.raises(InvalidJob, match=r"nets\.py: not there"):
        run_job(job)


# --- planning alone -------------------------------------------------------------------------------------------------


def test_plan_is_made_without_workers_and_run_later(tmp_path: Path, output: Path) -> None:
    job = make_job(tmp_path, IMAGES)
    summary = driver.make_plan(job, allow_empty=False, progress=NoProgress())
    assert (summary.images, summary.shards, summary.shard_size, summary.output) == (12, 6, 2, str(output))
    assert not (output / "predictions").exists()
    before = list_files(output)
    again = driver.make_plan(job, allow_empty=False, progress=NoProgress())
    assert (again.plan, again.images, again.shards, again.written) == (summary.plan, 12, 6, False)
    assert "there since" in again.lines()[0]
    assert "nothing was written" in again.lines()[0]
    assert list_files(output) == before
    assert run_job(make_job(tmp_path, ["later.png"]), ScriptedPool()).planned == 12
    assert read_success(output)["plan"] == summary.plan


def test_make_plan_writes_many_chunks(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("batchjob.plan.chunks.CHUNK_ROWS", 4)
    progress = RecordingProgress()
    summary = driver.make_plan(make_job(tmp_path, [*IMAGES, "last.png"]), allow_empty=False, progress=progress)
    assert (summary.images, summary.shards) == (13, 7)
    assert (progress.total, progress.final) == (13, True)


def test_stop_signal_ends_planning(tmp_path: Path, output: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("batchjob.plan.chunks.CHUNK_ROWS", 2)
    progress, job = RecordingProgress(), make_job(tmp_path, [f"{number:03}.png" for number in range(100)])
    monkeypatch.setattr(progress, "set_planned", lambda n, final: send_sigterm() if n == 2 else None)
    with pytest.raises(Temporary, match="stopped by a signal"):
        driver.make_plan(job, allow_empty=False, progress=progress)
    assert len(list(output.glob("_batchjob/plans/0000/chunk-*"))) < 50
    assert driver.make_plan(job, allow_empty=False, progress=NoProgress()).images == 100


def test_planning_reports_start_and_stop(tmp_path: Path) -> None:
    progress = RecordingProgress()
    driver.make_plan(make_job(tmp_path, IMAGES), allow_empty=False, progress=progress)
    assert (progress.started, progress.stopped) == (True, True)


def test_planning_refuses_the_same_jobs_as_a_run(tmp_path: Path, output: Path) -> None:
    with pytest.raises(InvalidJob, match="no images there"):
        driver.make_plan(make_job(tmp_path, []), allow_empty=False, progress=NoProgress())
    summary = driver.make_plan(make_job(tmp_path, []), allow_empty=True, progress=NoProgress())
    assert (summary.images, summary.shards) == (0, 1)
    with pytest.raises(InvalidJob, match="belongs to another job"):
        driver.make_plan(
            make_job(tmp_path, [], task={"type": "embedding", "normalize": True}),
            allow_empty=True,
            progress=NoProgress(),
        )


# --- discarding -----------------------------------------------------------------------------------------------------


def test_discarded_output_accepts_another_job(tmp_path: Path, output: Path) -> None:
    run_job(make_job(tmp_path, IMAGES), ScriptedPool())
    message = driver.discard(str(output))
    assert "deleted 6 parts" in message
    assert "(number 0)" in message
    assert list((output / "predictions").iterdir()) == []
    assert not (output / "_SUCCESS").exists()
    other = make_job(tmp_path, IMAGES, task={"type": "embedding", "normalize": True})
    assert run_job(other, ScriptedPool()).status == "complete"
    assert list_heads(output) == ["0000", "0001"]
    assert read_positions(output) == list(range(12))


def test_retry_after_a_discard_says_that_the_plan_was_discarded(tmp_path: Path, output: Path) -> None:
    job = make_job(tmp_path, IMAGES)
    run_job(job, ScriptedPool())
    driver.discard(str(output))
    with pytest.raises(InvalidJob, match="its plan was discarded and nothing has been run since"):
        driver.run(job, no_pool, allow_empty=True, progress=NoProgress(), retry=True)


def test_unfinished_output_can_be_discarded(tmp_path: Path, output: Path) -> None:
    job = make_interrupted_job(tmp_path)
    assert "deleted 3 parts" in driver.discard(str(output))
    pool = ScriptedPool()
    assert run_job(job, pool).status == "complete"
    assert pool.submitted == list(range(6))


def test_discard_of_an_empty_output_is_refused(tmp_path: Path, output: Path) -> None:
    with pytest.raises(InvalidJob, match="nothing to discard"):
        driver.discard(str(output))


def test_discard_deletes_nothing_without_a_plan(tmp_path: Path, output: Path) -> None:
    put_foreign_file(output)
    before = read_parts(output)
    with pytest.raises(InvalidJob, match="nothing to discard"):
        driver.discard(str(output))
    assert read_parts(output) == before


def test_interrupted_discard_can_be_finished(tmp_path: Path, output: Path) -> None:
    run_job(make_job(tmp_path, IMAGES), ScriptedPool())
    put_tombstone(output)
    assert "an earlier plan's leftovers, deleted 6 parts" in driver.discard(str(output))
    assert not (output / "_SUCCESS").exists()


def test_run_after_an_interrupted_discard_deletes_the_old_success(tmp_path: Path, output: Path) -> None:
    run_job(make_job(tmp_path, IMAGES), ScriptedPool())
    put_tombstone(output)
    assert run_job(make_job(tmp_path, IMAGES), ScriptedPool({0: [fail()] * 3})).exit_code == 4
    assert not (output / "_SUCCESS").exists()


@pytest.mark.parametrize("when", ["before", "during"])
def test_late_part_of_a_discarded_plan_is_deleted(tmp_path: Path, output: Path, when: str) -> None:
    job = make_job(tmp_path, IMAGES)
    run_job(job, ScriptedPool())
    old = min((output / "predictions").iterdir())
    shutil.copy2(old, tmp_path / "late")
    driver.discard(str(output))

    def put_late_part() -> None:
        shutil.copy2(tmp_path / "late", old)

    if when == "before":
        put_late_part()
    acts: list[AttemptScript] = [call_first(put_late_part)] if when == "during" else []
    assert run_job(job, ScriptedPool({4: acts})).status == "complete"
    assert not old.exists()
    assert read_positions(output) == list(range(12))


def test_discard_of_a_mistyped_output_leaves_no_trace(tmp_path: Path) -> None:
    with pytest.raises(InvalidJob, match="nothing to discard"):
        driver.discard(str(tmp_path / "mistyped"))
    assert not (tmp_path / "mistyped").exists()


# -- fresh runs and checks of the input


def make_other_job(folder: Path) -> Job:
    return make_job(folder, IMAGES, task={"type": "embedding", "normalize": True})


@pytest.mark.parametrize("other", [False, True])
def test_fresh_run_replaces_a_finished_or_foreign_output(tmp_path: Path, output: Path, other: bool) -> None:
    run_job(make_job(tmp_path, IMAGES), ScriptedPool())
    before = set(read_parts(output))
    job = make_other_job(tmp_path) if other else make_job(tmp_path, [*IMAGES, "new.png"])
    progress, pool = RecordingProgress(), ScriptedPool()
    result = run_job(job, pool, fresh=True, progress=progress)
    assert result.status == "complete"
    assert result.planned == (12 if other else 13)
    assert read_positions(output) == list(range(result.planned))
    assert not before & set(read_parts(output))
    assert list_heads(output) == ["0000", "0001"]
    assert any("discarded plan" in note for note in progress.notes)
    assert run_job(job).status == "already_complete"


def test_fresh_run_on_an_empty_output_is_a_run(tmp_path: Path, output: Path) -> None:
    assert run_job(make_job(tmp_path, IMAGES), ScriptedPool(), fresh=True).status == "complete"
    assert list_heads(output) == ["0000"]


def test_fresh_run_resumes_its_own_unfinished_plan(tmp_path: Path, output: Path) -> None:
    job = make_job(tmp_path, IMAGES)
    run_job(job, ScriptedPool())
    with pytest.raises(Temporary):
        run_job(job, ScriptedPool({3: [fail_worker(Temporary("Ray is gone"))]}), fresh=True)
    committed = set(read_parts(output))
    assert committed
    pool = ScriptedPool()
    assert run_job(job, pool, fresh=True).status == "complete"
    assert committed < set(read_parts(output))
    assert len(pool.submitted) == 6 - len(committed)
    assert list_heads(output) == ["0000", "0001"]


def test_fresh_run_discards_an_unfinished_plan_made_with_other_code(tmp_path: Path, output: Path) -> None:
    job = make_job(tmp_path, IMAGES)
    run_job(job, ScriptedPool())
    (output / "_SUCCESS").unlink()
    (tmp_path / "net.py").write_text("def build():\n    return 1\n")
    with pytest.raises(InvalidJob, match="other files"):
        run_job(job)
    assert run_job(job, ScriptedPool(), fresh=True).status == "complete"
    assert list_heads(output) == ["0000", "0001"]


@pytest.mark.parametrize("kind", ["foreign", "other output"])
def test_fresh_run_beside_a_foreign_part_discards_nothing(tmp_path: Path, output: Path, kind: str) -> None:
    job = make_job(tmp_path, IMAGES)
    run_job(job, ScriptedPool())
    message = put_foreign_file(output) if kind == "foreign" else put_part_of_other_output(output, tmp_path)
    with pytest.raises(CheckFailed, match=message):
        run_job(job, fresh=True)
    assert (output / "_SUCCESS").exists()
    assert list_heads(output) == ["0000"]


@pytest.mark.parametrize("name", [".DS_Store", ".part-0000000-ab.parquet.Xy12ab"])
def test_stray_file_beside_parts_changes_nothing(tmp_path: Path, output: Path, name: str) -> None:
    (output / "predictions").mkdir(parents=True)
    (output / "predictions" / name).touch()
    job = make_job(tmp_path, IMAGES)
    assert run_job(job, ScriptedPool()).status == "complete"
    assert run_job(job).status == "already_complete"
    assert run_job(job, ScriptedPool(), fresh=True).status == "complete"
    assert (output / "predictions" / name).exists()


@pytest.mark.parametrize("was_there", [False, True])
def test_refused_run_leaves_the_output_as_it_was(tmp_path: Path, output: Path, was_there: bool) -> None:
    if was_there:
        output.mkdir()
    for fault in (InvalidJob("the weights do not fit"), Temporary("no Ray answers")):
        with pytest.raises(type(fault)):
            run_job(make_job(tmp_path, IMAGES), ScriptedPool(ready=[WorkerFailed(fault)]))
        assert output.exists() == was_there
    assert not was_there or not list(output.iterdir())


def test_refused_run_leaves_what_others_have_put_there(tmp_path: Path, output: Path) -> None:
    (output / "_batchjob").mkdir(parents=True)
    (output / "notes.txt").touch()
    (output / "_batchjob/notes.txt").touch()
    with pytest.raises(InvalidJob):
        run_job(make_job(tmp_path, []), ScriptedPool())
    assert {path.name for path in output.rglob("*.txt")} == {"notes.txt"}
    assert list(output.glob("_batchjob/lease")) == list(output.glob("_batchjob/probe")) == []


@pytest.mark.parametrize("fault", ["no images", "no code", "worker"])
def test_fresh_run_that_cannot_begin_discards_nothing(tmp_path: Path, output: Path, fault: str) -> None:
    job = make_job(tmp_path, IMAGES)
    run_job(job, ScriptedPool())
    before = read_parts(output)
    pool = ScriptedPool()
    if fault == "no images":
        shutil.rmtree(tmp_path / "images")
        (tmp_path / "images").mkdir()
    elif fault == "no code":
        (tmp_path / "net.py").unlink()
    else:
        pool = ScriptedPool(ready=[WorkerFailed(InvalidJob("the weights do not fit"))])
    with pytest.raises(InvalidJob):
        run_job(job, pool, fresh=True)
    assert read_parts(output) == before
    assert (output / "_SUCCESS").exists()
    assert list_heads(output) == ["0000"]


@pytest.mark.parametrize(("repair", "check_input"), [(True, False), (False, True)])
def test_fresh_excludes_what_keeps_rows(tmp_path: Path, repair: bool, check_input: bool) -> None:
    with pytest.raises(InvalidJob, match=r"--fresh makes every row anew.*give one of them"):
        run_job(make_job(tmp_path, IMAGES), fresh=True, repair=repair, check_input=check_input)


@pytest.mark.parametrize("fault", [Fault.KILLED_BEFORE, Fault.KILLED_AFTER])
@pytest.mark.parametrize(
    ("method", "pattern"),
    [
        ("put_if_absent", "*/0000/discarded"),
        ("delete_if_match", "_SUCCESS"),
        ("delete", "predictions/*"),
        ("put_if_absent", "*/0001/head.json"),
        ("put_if_absent", "*/0001/chunk-0000000.arrow"),
        ("put_if_absent", "predictions/*"),
    ],
)
def test_killed_fresh_run_is_repeated(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, method: str, pattern: str, fault: Fault
) -> None:
    store = MemoryStore()
    for module in ("batchjob.driver.driver", "tests.support.scripted_pool"):
        monkeypatch.setattr(f"{module}.open_store", lambda *_, **__: store)
    run_job(make_job(tmp_path, IMAGES), ScriptedPool())
    job = make_other_job(tmp_path)
    store.inject(method, pattern, fault)
    with pytest.raises(Killed):
        run_job(job, ScriptedPool(), fresh=True)
    parts, success = list_parts(store), "_SUCCESS" in store.stored_keys()
    # A reader never sees rows of both plans under a `_SUCCESS`.
    assert not success or len(parts) == 6
    assert run_job(job, ScriptedPool(), fresh=True).status == "complete"
    assert len(list_parts(store)) == 6
    number, head = read_current_head(store)
    assert head is not None
    assert (number, head.fingerprint) == (1, job.fingerprint())
    assert run_job(job).status == "already_complete"


def test_driver_that_lost_its_lease_discards_nothing(tmp_path: Path, output: Path) -> None:
    job, rival = make_job(tmp_path, IMAGES), RivalDriver(str(output))
    run_job(job, ScriptedPool())

    def take_over() -> Iterator[WorkerEvent | None]:
        rival.take_over()
        yield WorkerReady("0", WORKER_INFO)

    with pytest.raises(Temporary, match="another driver"):
        run_job(job, ScriptedPool(ready=take_over()), fresh=True)
    assert (output / "_SUCCESS").exists()
    assert list_heads(output) == ["0000"]
    assert rival.lease is not None
    rival.lease.release()


def test_check_of_an_unchanged_input_says_so(tmp_path: Path, output: Path) -> None:
    job = make_job(tmp_path, IMAGES)
    assert run_job(job, ScriptedPool(), check_input=True).message == ""  # it was listed just now
    before = list_files(output)
    result = run_job(job, check_input=True)
    assert (result.status, result.exit_code) == ("already_complete", 0)
    assert "listed again, and has the images of the plan and no others" in result.message
    assert list_files(output) == before


def test_check_of_a_changed_input_counts_and_names_the_images(tmp_path: Path, output: Path) -> None:
    job = make_job(tmp_path, IMAGES)
    run_job(job, ScriptedPool())
    images = tmp_path / "images"
    for number in range(4):
        (images / f"new{number}.png").write_bytes(b"new")
    (images / "003.png").unlink()
    (images / "005.png").write_bytes(b"another image")
    assert run_job(job).status == "already_complete"
    with pytest.raises(InvalidJob) as raised:
        run_job(job, check_input=True)
    message = raised.value.message
    assert re.search(r"4 images added \(\S+new0.png, \S+new1.png, \S+new2.png, …\)", message)
    assert re.search(r"1 image gone \(\S+003.png\), 1 image changed \(\S+005.png\)", message)
    assert "`batchjob run --fresh`" in message
    assert raised.value.counts == (12, 12, 0)


def test_check_of_an_earlier_versions_output_lists_as_that_version_did(tmp_path: Path, output: Path) -> None:
    asked = make_job(tmp_path, IMAGES)
    (tmp_path / "images" / ".hidden.png").write_bytes(b"hidden")
    run_job(asked.model_copy(update={"input": asked.input.model_copy(update={"hidden": True})}), ScriptedPool())
    # Earlier versions took hidden names, and had no field for that.
    head_file = output / "_batchjob/plans/0000/head.json"
    head = json.loads(head_file.read_text())
    for fields in (head["fingerprint"]["input"], head["job"]["input"], head["defaults"]["input"]):
        fields.pop("hidden", None)
    head_file.write_text(json.dumps(head))
    assert run_job(asked, check_input=True).planned == 13


def test_check_after_a_resumed_run_looks_at_the_input(tmp_path: Path) -> None:
    job = make_job(tmp_path, IMAGES)
    with pytest.raises(Temporary):
        run_job(job, ScriptedPool({3: [fail_worker(Temporary("Ray is gone"))]}))
    (tmp_path / "images" / "new.png").write_bytes(b"new")
    with pytest.raises(InvalidJob, match=r"is complete, but input.uri .* 1 image added"):
        run_job(job, ScriptedPool(), check_input=True)
    assert run_job(job).status == "already_complete"
