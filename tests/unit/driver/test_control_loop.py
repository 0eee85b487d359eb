"""Control loop: the lease is renewed and stop signals are noticed during every slow step."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from batchjob.driver import driver
from batchjob.driver.control_loop import ControlLoop, StopSignals
from batchjob.driver.lease import Lease
from batchjob.driver.progress import NoProgress
from batchjob.errors import Temporary, Unavailable
from batchjob.job.job import Job
from batchjob.output import commit
from batchjob.plan.head import PlanHead, read_current_head
from batchjob.report.run_result import RunResult
from batchjob.sources.listing import SourceListing
from batchjob.storage.disk_store import DiskStore
from batchjob.storage.objects import ObjectInfo
from batchjob.storage.store import Store
from tests.support.memory_store import MemoryStore
from tests.support.scripted_pool import ScriptedPool, make_job

TIMEOUT_SECONDS = 60.0  # for what another thread does at once
IMAGES = [f"{number:03}.png" for number in range(12)]


@pytest.fixture
def output(tmp_path: Path) -> Path:
    return tmp_path / "out"


@pytest.fixture(autouse=True)
def heartbeat_in_every_tick(monkeypatch: pytest.MonkeyPatch) -> None:
    """Send a heartbeat in every tick."""
    monkeypatch.setattr("batchjob.driver.lease.HEARTBEAT_SECONDS", 0.0)


def run_job(job: Job) -> RunResult:
    return driver.run(job, ScriptedPool, allow_empty=False, progress=NoProgress())


def read_heartbeats(output: Path) -> int:
    newest = max(output.glob("_batchjob/lease/*.json"))
    count: int = json.loads(newest.read_bytes())["beats"]
    return count


def wait_for_heartbeats(output: Path) -> None:
    """Wait until the driver has sent two more heartbeats."""
    before, pause = read_heartbeats(output), threading.Event()
    for _ in range(int(TIMEOUT_SECONDS * 100)):
        if read_heartbeats(output) >= before + 2:
            return
        pause.wait(0.01)
    raise AssertionError("the driver sends no heartbeats")


def slow_first_call(monkeypatch: pytest.MonkeyPatch, owner: type, name: str, wait: Callable[[], object]) -> list[str]:
    """Let the first call of a method wait for something; return the list of its calls."""
    calls: list[str] = []
    real = getattr(owner, name)

    def slow_call(self: Any, *args: Any, **kwargs: Any) -> Any:
        calls.append(name)
        if len(calls) == 1:
            wait()
        return real(self, *args, **kwargs)

    monkeypatch.setattr(owner, name, slow_call)
    return calls


def test_discard_of_many_parts_keeps_the_lease(tmp_path: Path, output: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run_job(make_job(tmp_path, IMAGES))
    part_names = [key.removeprefix("predictions/") for key in sorted(commit.list_parts(DiskStore(output)))]
    real = DiskStore.delete

    def delete(self: DiskStore, key: str) -> None:
        if key.endswith(part_names[3]):
            wait_for_heartbeats(output)
        real(self, key)

    monkeypatch.setattr(DiskStore, "delete", delete)
    assert "deleted 6 parts" in driver.discard(str(output))
    assert not list((output / "predictions").iterdir())


def test_stop_signal_ends_a_discard_that_can_be_finished(
    tmp_path: Path, output: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run_job(make_job(tmp_path, IMAGES))
    resume, real = threading.Event(), DiskStore.delete
    signalled = threading.Lock()

    def delete(self: DiskStore, key: str) -> None:
        if key.startswith("predictions/"):
            if signalled.acquire(blocking=False):
                os.kill(os.getpid(), signal.SIGTERM)
            resume.wait(TIMEOUT_SECONDS)  # as long as the process lives
        else:
            real(self, key)

    with monkeypatch.context() as patched:
        patched.setattr(DiskStore, "delete", delete)
        with pytest.raises(Temporary):
            driver.discard(str(output))
    resume.set()
    assert "an earlier plan's leftovers, deleted 6 parts" in driver.discard(str(output))
    assert not list((output / "predictions").iterdir())


def test_discard_that_lost_its_lease_discards_nothing(
    tmp_path: Path, output: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run_job(make_job(tmp_path, IMAGES))
    real, reads = read_current_head, list[int]()

    def read_head_and_lose_lease(store: Store) -> tuple[int, PlanHead | None]:
        reads.append(len(reads))
        if len(reads) == 2:  # the read under the lease
            Lease.acquire(DiskStore(output), expiry_seconds=0.0)
        return real(store)

    with monkeypatch.context() as patched:
        patched.setattr("batchjob.driver.existing_output.read_current_head", read_head_and_lose_lease)
        with pytest.raises(Temporary, match="another driver"):
            driver.discard(str(output))
    assert real(DiskStore(output))[1] is not None
    assert len(commit.list_parts(DiskStore(output))) == 6
    assert (output / "_SUCCESS").exists()


def is_released(output: Path) -> bool:
    return all(json.loads(epoch.read_bytes())["released"] for epoch in output.glob("_batchjob/lease/*.json"))


def test_stop_signal_during_acquire_releases_the_lease(
    tmp_path: Path, output: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    real, calls = Lease._delete_old_epochs, list[int]()

    def delete_old_epochs_and_signal(self: Lease) -> None:
        calls.append(1)
        os.kill(os.getpid(), signal.SIGTERM)
        threading.Event().wait(1.0)  # like a slow listing
        real(self)

    monkeypatch.setattr(Lease, "_delete_old_epochs", delete_old_epochs_and_signal)
    with pytest.raises(Temporary, match="stopped by a signal; the same command resumes"):
        run_job(make_job(tmp_path, IMAGES))
    assert len(calls) == 1
    assert is_released(output)


def test_stop_signal_during_the_release_changes_nothing(
    tmp_path: Path, output: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    real, calls = ControlLoop.release_lease, list[int]()

    def release_and_signal(self: ControlLoop, is_unused: Callable[[], bool]) -> None:
        calls.append(1)
        os.kill(os.getpid(), signal.SIGTERM)
        real(self, is_unused)

    monkeypatch.setattr(ControlLoop, "release_lease", release_and_signal)
    assert run_job(make_job(tmp_path, IMAGES)).status == "complete"
    assert len(calls) == 1
    assert is_released(output)


def test_stop_signal_ends_the_wait_for_another_drivers_lease(
    tmp_path: Path, output: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    job, other = make_job(tmp_path, IMAGES), Lease.acquire(DiskStore(output))

    def wait(self: NoProgress, text: str) -> None:
        if "waiting up to" in text:
            os.kill(os.getpid(), signal.SIGTERM)

    monkeypatch.setattr(NoProgress, "note", wait)
    with pytest.raises(Temporary, match="stopped by a signal"):
        run_job(job)
    other.confirm_ownership()


@pytest.mark.parametrize("call", ["refs", "check_requirements"])
def test_slow_listing_keeps_the_lease(tmp_path: Path, output: Path, monkeypatch: pytest.MonkeyPatch, call: str) -> None:
    slow_first_call(monkeypatch, SourceListing, call, lambda: wait_for_heartbeats(output))
    assert driver.make_plan(make_job(tmp_path, IMAGES), allow_empty=False, progress=NoProgress()).images == 12
    assert run_job(make_job(tmp_path, IMAGES)).status == "complete"


def test_slow_chunk_keeps_the_lease(tmp_path: Path, output: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    real = SourceListing.check_unchanged  # called by the prefetcher before it lists

    def slow_call(self: SourceListing, planned_version: str | None) -> None:
        wait_for_heartbeats(output)
        real(self, planned_version)

    monkeypatch.setattr(SourceListing, "check_unchanged", slow_call)
    assert driver.make_plan(make_job(tmp_path, IMAGES), allow_empty=False, progress=NoProgress()).images == 12


def test_stop_signal_is_noticed_while_a_chunk_is_slow(
    tmp_path: Path, output: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    resume = threading.Event()

    def hang(self: SourceListing, planned_version: str | None) -> None:
        os.kill(os.getpid(), signal.SIGTERM)
        resume.wait(TIMEOUT_SECONDS)

    with monkeypatch.context() as patched:
        patched.setattr(SourceListing, "check_unchanged", hang)
        with pytest.raises(Temporary, match="stopped by a signal"):
            driver.make_plan(make_job(tmp_path, IMAGES), allow_empty=False, progress=NoProgress())
    resume.set()
    assert driver.make_plan(make_job(tmp_path, IMAGES), allow_empty=False, progress=NoProgress()).images == 12


def test_slow_reads_of_stale_parts_keep_the_lease(
    tmp_path: Path, output: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run_job(make_job(tmp_path, IMAGES))
    stale_part = min((output / "predictions").iterdir())
    content = stale_part.read_bytes()
    driver.discard(str(output))
    stale_part.write_bytes(content)
    slow_first_call(monkeypatch, DiskStore, "read_tail", lambda: wait_for_heartbeats(output))
    assert run_job(make_job(tmp_path, IMAGES)).status == "complete"
    assert not stale_part.exists()


def test_stop_signal_is_noticed_while_parts_are_summed(
    tmp_path: Path, output: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A signal comes while the footers of an earlier run's parts are read."""
    run_job(make_job(tmp_path, IMAGES))
    (output / "_SUCCESS").unlink()
    resume = threading.Event()

    def hang() -> None:
        os.kill(os.getpid(), signal.SIGTERM)
        resume.wait(TIMEOUT_SECONDS)

    with monkeypatch.context() as patched:
        slow_first_call(patched, DiskStore, "read_tail", hang)
        with pytest.raises(Temporary, match="stopped by a signal"):
            run_job(make_job(tmp_path, IMAGES))
    resume.set()
    assert run_job(make_job(tmp_path, IMAGES)).status == "complete"


class SilentStore(MemoryStore):
    """Store that keeps requests waiting, and then raises Unavailable."""

    def __init__(self) -> None:
        super().__init__()
        self.is_silent, self.was_asked, self.may_answer = False, threading.Event(), threading.Event()
        self.silent_requests = 1 << 30  # that fail before it answers again

    def list(self, prefix: str) -> Iterator[ObjectInfo]:
        if self.is_silent:
            self.was_asked.set()
            self.may_answer.wait(TIMEOUT_SECONDS)
            self.silent_requests -= 1
            self.is_silent = self.silent_requests > 0
            raise Unavailable("memory://out: the store does not answer; run again")
        return super().list(prefix)


@pytest.fixture
def store() -> SilentStore:
    return SilentStore()


def make_control_loop(store: SilentStore, signals: StopSignals, outage_seconds: float) -> ControlLoop:
    return ControlLoop(Lease.acquire(store), signals, store.uri, outage_seconds)


def tick_often(control_loop: ControlLoop) -> None:
    for _ in range(100):
        control_loop.tick(0.01)


def test_silent_store_does_not_block_ticks(store: SilentStore) -> None:
    signals = StopSignals()
    control_loop = make_control_loop(store, signals, 300.0)
    control_loop.heartbeat()
    store.is_silent = True
    for _ in range(3):
        control_loop.tick(0.0)
    assert store.was_asked.wait(TIMEOUT_SECONDS)
    signals.requested.set()
    with pytest.raises(Temporary, match="stopped by a signal"):
        control_loop.heartbeat()
    control_loop.release_lease()  # although it cannot be released
    store.may_answer.set()


def test_short_outage_of_the_lease_is_tolerated(store: SilentStore) -> None:
    control_loop = make_control_loop(store, StopSignals(), 300.0)
    control_loop.heartbeat()
    store.is_silent = True
    store.may_answer.set()
    for _ in range(10):
        control_loop.tick(0.0)
    store.is_silent = False
    before = len(store.written_keys())
    while len(store.written_keys()) == before:
        control_loop.tick(0.01)
    control_loop.release_lease()
    assert json.loads(store.read(store.stored_keys()[-1]).data)["released"]


def test_lease_confirmation_waits_for_the_end_of_an_outage(store: SilentStore) -> None:
    control_loop = make_control_loop(store, StopSignals(), 300.0)
    store.is_silent, store.silent_requests = True, 2
    store.may_answer.set()
    control_loop.confirm_lease()
    assert not store.is_silent
    control_loop.release_lease()


def test_stop_signal_in_an_outage_does_not_drain(store: SilentStore) -> None:
    signals = StopSignals()
    control_loop = make_control_loop(store, signals, 300.0)
    control_loop.on_stop = lambda: pytest.fail("no shard can commit now")
    control_loop.heartbeat()
    store.is_silent = True
    store.may_answer.set()
    tick_often(control_loop)
    signals.requested.set()
    with pytest.raises(Temporary, match="stopped by a signal"):
        control_loop.heartbeat()
    control_loop.release_lease()


def test_long_outage_of_the_lease_ends_the_run(store: SilentStore) -> None:
    control_loop = make_control_loop(store, StopSignals(), 0.0)
    store.is_silent = True
    store.may_answer.set()
    with pytest.raises(Unavailable, match="does not answer"):
        tick_often(control_loop)
    control_loop.release_lease()


HANGING_LISTING = """
import sys, time
from batchjob.cli.main import main
from batchjob.sources.listing import SourceListing
def refs(self, after):
    print("counting", flush=True)
    time.sleep(600)
    yield
SourceListing.refs = refs
sys.exit(main(["plan", "job.yaml", "--quiet"]))
"""


def test_stop_signal_ends_the_process_although_a_listing_hangs(tmp_path: Path, output: Path) -> None:
    make_job(tmp_path, IMAGES, input={"type": "prefix", "uri": "images/", "require": {"min_images": 5}})
    process = subprocess.Popen(
        [sys.executable, "-c", HANGING_LISTING], cwd=tmp_path, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )
    assert process.stderr is not None
    assert process.stderr.readline() == "counting\n"  # stdout is for results
    process.send_signal(signal.SIGTERM)
    _, stderr = process.communicate(timeout=TIMEOUT_SECONDS)
    assert process.returncode == 75, stderr
    assert "stopped by a signal; the same command resumes" in stderr


@pytest.fixture(autouse=True)
def check_signal_handler_is_restored() -> Iterator[None]:
    before = signal.getsignal(signal.SIGTERM)
    yield
    assert signal.getsignal(signal.SIGTERM) == before
