"""Watchdog: finds the step that exceeds its limit by the most, with its thread."""

from __future__ import annotations

import threading
from pathlib import Path

import pytest

from batchjob.types import StalledStep
from batchjob.worker.monitored_store import MonitoredStore
from batchjob.worker.watchdog import Watchdog
from tests.support.memory_store import Killed, MemoryStore


def test_step_that_is_longest_over_its_limit_is_found_in_all_threads() -> None:
    now, entered, release = [0.0], threading.Event(), threading.Event()
    watchdog = Watchdog(lambda: now[0])

    def enter_first_step() -> None:
        with watchdog.step("first"):
            entered.set()
            release.wait()

    thread = threading.Thread(target=enter_first_step)
    assert watchdog.stalled_step(0.0, 0.0) is None
    thread.start()
    entered.wait()
    now[0] = 5.0
    with watchdog.step("second"):
        now[0] = 6.0
        assert watchdog.stalled_step(6.0, 0.0) is None
        assert watchdog.stalled_step(0.0, 0.0) == StalledStep("first", thread.ident or 0, 6.0)
        release.set()
        thread.join()
        assert watchdog.stalled_step(0.0, 0.0) == StalledStep("second", threading.get_ident(), 1.0)
    assert watchdog.stalled_step(0.0, 0.0) is None


def test_storage_steps_have_a_limit_of_their_own() -> None:
    now = [0.0]
    watchdog = Watchdog(lambda: now[0])
    with watchdog.step("a PUT", storage=True):
        now[0] = 50.0
        assert watchdog.stalled_step(10.0, 60.0) is None
        now[0] = 61.0
        assert watchdog.stalled_step(10.0, 60.0) == StalledStep("a PUT", threading.get_ident(), 61.0, storage=True)


def test_signs_of_progress_and_inner_steps_restart_the_clock() -> None:
    now, progress = [0.0], [0.0]
    watchdog = Watchdog(lambda: now[0])
    with watchdog.step("outer", last_progress=lambda: progress[0]):
        now[0], progress[0] = 9.0, 7.0
        assert watchdog.stalled_step(5.0, 5.0) is None
        assert watchdog.stalled_step(1.0, 1.0) == StalledStep("outer", threading.get_ident(), 2.0)
        with watchdog.step("inner"):
            now[0] = 20.0
            assert watchdog.stalled_step(5.0, 5.0) == StalledStep("inner", threading.get_ident(), 11.0)
        now[0] = 24.0
        assert watchdog.stalled_step(5.0, 5.0) is None
        now[0] = 26.0
        assert watchdog.stalled_step(5.0, 5.0) == StalledStep("outer", threading.get_ident(), 6.0)


@pytest.mark.parametrize(("mib", "limit"), [(1, 960.0), (512, 2760.0), (4096, 16_200.0)])
def test_upload_of_a_large_part_may_take_its_timeout_twice(mib: int, limit: float, tmp_path: Path) -> None:
    now, is_stalled = [0.0], list[bool]()
    watchdog, store = Watchdog(lambda: now[0]), MemoryStore()
    with (tmp_path / "part").open("wb") as file:
        file.truncate(mib << 20)

    def upload_slowly() -> None:
        for seconds in (limit - 1, limit + 1):
            now[0] = seconds
            is_stalled.append(watchdog.stalled_step(600.0, 960.0) is not None)
        raise Killed

    store.inject("put_if_absent", "predictions/*", upload_slowly)
    with pytest.raises(Killed):
        MonitoredStore(store, watchdog).put_if_absent("predictions/part-0.parquet", tmp_path / "part")
    assert is_stalled == [False, True]
