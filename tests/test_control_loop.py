"""Whatever takes long, the lease is beaten and signals are heard: listing, counting, deleting, adding up."""

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
from memory_store import MemoryStore
from scripted_pool import ScriptedPool, make_job

from batchjob.driver import driver
from batchjob.driver.control_loop import ControlLoop, StopSignals
from batchjob.driver.lease import Lease
from batchjob.driver.progress import NoProgress
from batchjob.errors import Temporary, Unavailable
from batchjob.job.job import Job
from batchjob.output import commit
from batchjob.plan.head import PlanHead
from batchjob.plan.head import read_current_head as current_of_head
from batchjob.report.run_result import RunResult
from batchjob.sources.listing import SourceListing
from batchjob.storage.disk_store import DiskStore
from batchjob.storage.objects import ObjectInfo
from batchjob.storage.store import Store

PATIENCE = 60.0  # seconds, for what another thread does at once
TWELVE = [f"{number:03}.png" for number in range(12)]


@pytest.fixture
def out(tmp_path: Path) -> Path:
    return tmp_path / "out"


@pytest.fixture(autouse=True)
def quick_beats(monkeypatch: pytest.MonkeyPatch) -> None:
    """Each turn beats."""
    monkeypatch.setattr("batchjob.driver.lease.HEARTBEAT_SECONDS", 0.0)


def run(the: Job) -> RunResult:
    return driver.run(the, ScriptedPool, allow_empty=False, progress=NoProgress())


def beats(output: Path) -> int:
    newest = max(output.glob("_batchjob/lease/*.json"))
    count: int = json.loads(newest.read_bytes())["beats"]
    return count


def until_beaten(output: Path) -> None:
    """Goes on only when the driver has shown life twice meanwhile."""
    before, pause = beats(output), threading.Event()
    for _ in range(int(PATIENCE * 100)):
        if beats(output) >= before + 2:
            return
        pause.wait(0.01)
    raise AssertionError("the driver fell silent")


def slowed(monkeypatch: pytest.MonkeyPatch, owner: type, name: str, waits: Callable[[], object]) -> list[str]:
    """Lets the first call of one of our own methods wait for something."""
    calls: list[str] = []
    real = getattr(owner, name)

    def slow(self: Any, *args: Any, **named: Any) -> Any:
        calls.append(name)
        if len(calls) == 1:
            waits()
        return real(self, *args, **named)

    monkeypatch.setattr(owner, name, slow)
    return calls


def test_discarding_many_parts_shows_life(tmp_path: Path, out: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run(make_job(tmp_path, TWELVE))
    deleting = [key.removeprefix("predictions/") for key in sorted(commit.list_parts(DiskStore(out)))]
    real = DiskStore.delete

    def delete(self: DiskStore, key: str) -> None:
        if key.endswith(deleting[3]):
            until_beaten(out)
        real(self, key)

    monkeypatch.setattr(DiskStore, "delete", delete)
    assert "deleted 6 parts" in driver.discard(str(out))
    assert not list((out / "predictions").iterdir())


def test_a_signal_ends_a_discard_that_can_be_finished(
    tmp_path: Path, out: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run(make_job(tmp_path, TWELVE))
    go_on, real = threading.Event(), DiskStore.delete
    asked = threading.Lock()

    def delete(self: DiskStore, key: str) -> None:
        if key.startswith("predictions/"):
            if asked.acquire(blocking=False):
                os.kill(os.getpid(), signal.SIGTERM)
            go_on.wait(PATIENCE)  # and the process has ended
        else:
            real(self, key)

    with monkeypatch.context() as patched:
        patched.setattr(DiskStore, "delete", delete)
        with pytest.raises(Temporary):
            driver.discard(str(out))
    go_on.set()
    assert "an earlier plan's leftovers, deleted 6 parts" in driver.discard(str(out))
    assert not list((out / "predictions").iterdir())


def test_a_discard_that_was_stopped_while_another_driver_took_over_buries_nothing(
    tmp_path: Path, out: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run(make_job(tmp_path, TWELVE))
    real, looks = current_of_head, list[int]()

    def current(store: Store) -> tuple[int, PlanHead | None]:
        looks.append(len(looks))
        if len(looks) == 2:  # the look under the lease
            Lease.acquire(DiskStore(out), expiry_seconds=0.0)
        return real(store)

    with monkeypatch.context() as patched:
        patched.setattr("batchjob.driver.existing_output.read_current_head", current)
        with pytest.raises(Temporary, match="another driver"):
            driver.discard(str(out))
    assert real(DiskStore(out))[1] is not None
    assert len(commit.list_parts(DiskStore(out))) == 6
    assert (out / "_SUCCESS").exists()


def released(output: Path) -> bool:
    newest = max(output.glob("_batchjob/lease/*.json"))
    return bool(json.loads(newest.read_bytes())["released"])


def test_a_signal_as_soon_as_the_lease_is_taken_gives_it_back(
    tmp_path: Path, out: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    real, came = Lease._delete_old_epochs, list[int]()

    def sweep(self: Lease) -> None:
        came.append(1)
        os.kill(os.getpid(), signal.SIGTERM)
        threading.Event().wait(1.0)  # as long as a slow listing takes
        real(self)

    monkeypatch.setattr(Lease, "_delete_old_epochs", sweep)
    with pytest.raises(Temporary, match="stopped by a signal; the same command resumes"):
        run(make_job(tmp_path, TWELVE))
    assert len(came) == 1
    assert released(out)


def test_a_signal_while_the_lease_is_given_back_changes_nothing(
    tmp_path: Path, out: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    real, came = ControlLoop.release_lease, list[int]()

    def leave(self: ControlLoop) -> None:
        came.append(1)
        os.kill(os.getpid(), signal.SIGTERM)
        real(self)

    monkeypatch.setattr(ControlLoop, "release_lease", leave)
    assert run(make_job(tmp_path, TWELVE)).status == "complete"
    assert len(came) == 1
    assert released(out)


def test_a_signal_ends_the_wait_for_another_drivers_lease(
    tmp_path: Path, out: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    the, other = make_job(tmp_path, TWELVE), Lease.acquire(DiskStore(out))

    def waits(self: NoProgress, text: str) -> None:
        if "waiting up to" in text:
            os.kill(os.getpid(), signal.SIGTERM)

    monkeypatch.setattr(NoProgress, "note", waits)
    with pytest.raises(Temporary, match="stopped by a signal"):
        run(the)
    other.confirm_ownership()


@pytest.mark.parametrize("call", ["refs", "check_requirements"])
def test_a_slow_listing_keeps_the_lease(tmp_path: Path, out: Path, monkeypatch: pytest.MonkeyPatch, call: str) -> None:
    slowed(monkeypatch, SourceListing, call, lambda: until_beaten(out))
    assert driver.make_plan(make_job(tmp_path, TWELVE), allow_empty=False, progress=NoProgress()).images == 12
    assert run(make_job(tmp_path, TWELVE)).status == "complete"


def test_a_chunk_that_is_long_in_coming_keeps_the_lease(
    tmp_path: Path, out: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    real = SourceListing.check_unchanged  # called by the feeder, before it lists

    def slow(self: SourceListing, planned_version: str | None) -> None:
        until_beaten(out)
        real(self, planned_version)

    monkeypatch.setattr(SourceListing, "check_unchanged", slow)
    assert driver.make_plan(make_job(tmp_path, TWELVE), allow_empty=False, progress=NoProgress()).images == 12


def test_a_signal_is_heard_while_a_chunk_is_long_in_coming(
    tmp_path: Path, out: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    go_on = threading.Event()

    def hangs(self: SourceListing, planned_version: str | None) -> None:
        os.kill(os.getpid(), signal.SIGTERM)
        go_on.wait(PATIENCE)

    with monkeypatch.context() as patched:
        patched.setattr(SourceListing, "check_unchanged", hangs)
        with pytest.raises(Temporary, match="stopped by a signal"):
            driver.make_plan(make_job(tmp_path, TWELVE), allow_empty=False, progress=NoProgress())
    go_on.set()
    assert driver.make_plan(make_job(tmp_path, TWELVE), allow_empty=False, progress=NoProgress()).images == 12


def test_foreign_parts_are_looked_at_beside_the_turns(
    tmp_path: Path, out: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run(make_job(tmp_path, TWELVE))
    left = min((out / "predictions").iterdir())
    kept = left.read_bytes()
    driver.discard(str(out))
    left.write_bytes(kept)
    slowed(monkeypatch, DiskStore, "read_tail", lambda: until_beaten(out))
    assert run(make_job(tmp_path, TWELVE)).status == "complete"
    assert not left.exists()


def test_adding_up_hears_signals(tmp_path: Path, out: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The footers of an earlier run's parts are read; a signal comes meanwhile."""
    run(make_job(tmp_path, TWELVE))
    (out / "_SUCCESS").unlink()
    go_on = threading.Event()

    def hangs() -> None:
        os.kill(os.getpid(), signal.SIGTERM)
        go_on.wait(PATIENCE)

    with monkeypatch.context() as patched:
        slowed(patched, DiskStore, "read_tail", hangs)
        with pytest.raises(Temporary, match="stopped by a signal"):
            run(make_job(tmp_path, TWELVE))
    go_on.set()
    assert run(make_job(tmp_path, TWELVE)).status == "complete"


class Silent(MemoryStore):
    """A store that keeps whoever asks waiting, and then says that it does not answer."""

    def __init__(self) -> None:
        super().__init__()
        self.silent, self.asked, self.answer = False, threading.Event(), threading.Event()
        self.times = 1 << 30  # that it is asked in vain

    def list(self, prefix: str) -> Iterator[ObjectInfo]:
        if self.silent:
            self.asked.set()
            self.answer.wait(PATIENCE)
            self.times -= 1
            self.silent = self.times > 0
            raise Unavailable("memory://out: the store does not answer; run again")
        return super().list(prefix)


@pytest.fixture
def silent() -> Silent:
    return Silent()


def turns(store: Silent, drain: StopSignals, outage: float) -> ControlLoop:
    return ControlLoop(Lease.acquire(store), drain, store.uri, outage)


def go_round(going: ControlLoop) -> None:
    for _ in range(100):
        going.tick(0.01)


def test_a_store_that_falls_silent_keeps_no_turn_waiting(silent: Silent) -> None:
    drain = StopSignals()
    going = turns(silent, drain, 300.0)
    going.heartbeat()
    silent.silent = True
    for _ in range(3):
        going.tick(0.0)
    assert silent.asked.wait(PATIENCE)
    drain.requested.set()
    with pytest.raises(Temporary, match="stopped by a signal"):
        going.heartbeat()
    going.release_lease()  # though it cannot be given back
    silent.answer.set()


def test_a_lease_that_cannot_be_written_is_forgiven_until_it_lasts(silent: Silent) -> None:
    forgiving = turns(silent, StopSignals(), 300.0)
    forgiving.heartbeat()
    silent.silent = True
    silent.answer.set()
    for _ in range(10):
        forgiving.tick(0.0)
    silent.silent = False
    before = len(silent.written_keys())
    while len(silent.written_keys()) == before:
        forgiving.tick(0.01)
    forgiving.release_lease()
    assert json.loads(silent.read(silent.stored_keys()[-1]).data)["released"]


def test_a_look_at_the_lease_waits_for_an_outage_to_end(silent: Silent) -> None:
    going = turns(silent, StopSignals(), 300.0)
    silent.silent, silent.times = True, 2
    silent.answer.set()
    going.confirm_lease()
    assert not silent.silent
    going.release_lease()


def test_a_signal_in_an_outage_waits_for_no_commit(silent: Silent) -> None:
    drain = StopSignals()
    going = turns(silent, drain, 300.0)
    going.on_stop = lambda: pytest.fail("nothing can be committed")
    going.heartbeat()
    silent.silent = True
    silent.answer.set()
    go_round(going)
    drain.requested.set()
    with pytest.raises(Temporary, match="stopped by a signal"):
        going.heartbeat()
    going.release_lease()


def test_a_lease_that_is_unwritten_for_too_long_ends_the_run(silent: Silent) -> None:
    going = turns(silent, StopSignals(), 0.0)
    silent.silent = True
    silent.answer.set()
    with pytest.raises(Unavailable, match="does not answer"):
        go_round(going)
    going.release_lease()


COUNTING = """
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


def test_a_signal_ends_the_process_though_a_listing_hangs(tmp_path: Path, out: Path) -> None:
    make_job(tmp_path, TWELVE, input={"type": "prefix", "uri": "images/", "require": {"min_images": 5}})
    process = subprocess.Popen(
        [sys.executable, "-c", COUNTING], cwd=tmp_path, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )
    assert process.stdout is not None
    assert process.stdout.readline() == "counting\n"
    process.send_signal(signal.SIGTERM)
    _, said = process.communicate(timeout=PATIENCE)
    assert process.returncode == 75, said
    assert "stopped by a signal; the same command resumes" in said


@pytest.fixture(autouse=True)
def handlers_come_back() -> Iterator[None]:
    before = signal.getsignal(signal.SIGTERM)
    yield
    assert signal.getsignal(signal.SIGTERM) == before
