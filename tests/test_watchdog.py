"""Steps that are under way: the one that is latest is told, with its thread."""

from __future__ import annotations

import threading
from pathlib import Path

import pytest
from memory_store import Killed, MemoryStore

from batchjob.types import StalledStep
from batchjob.worker.monitored_store import MonitoredStore
from batchjob.worker.watchdog import Watchdog


def test_the_latest_of_all_threads_is_told_and_none_when_all_have_ended() -> None:
    now, begun, over = [0.0], threading.Event(), threading.Event()
    stopwatch = Watchdog(lambda: now[0])

    def other() -> None:
        with stopwatch.step("first"):
            begun.set()
            over.wait()

    thread = threading.Thread(target=other)
    assert stopwatch.stalled_step(0.0, 0.0) is None
    thread.start()
    begun.wait()
    now[0] = 5.0
    with stopwatch.step("second"):
        now[0] = 6.0
        assert stopwatch.stalled_step(6.0, 0.0) is None
        assert stopwatch.stalled_step(0.0, 0.0) == StalledStep("first", thread.ident or 0, 6.0)
        over.set()
        thread.join()
        assert stopwatch.stalled_step(0.0, 0.0) == StalledStep("second", threading.get_ident(), 1.0)
    assert stopwatch.stalled_step(0.0, 0.0) is None


def test_a_store_is_given_more_time_than_a_model() -> None:
    now = [0.0]
    stopwatch = Watchdog(lambda: now[0])
    with stopwatch.step("a PUT", storage=True):
        now[0] = 50.0
        assert stopwatch.stalled_step(10.0, 60.0) is None
        now[0] = 61.0
        assert stopwatch.stalled_step(10.0, 60.0) == StalledStep("a PUT", threading.get_ident(), 61.0, storage=True)


def test_signs_of_life_and_steps_within_are_progress() -> None:
    now, sign = [0.0], [0.0]
    stopwatch = Watchdog(lambda: now[0])
    with stopwatch.step("outer", last_progress=lambda: sign[0]):
        now[0], sign[0] = 9.0, 7.0
        assert stopwatch.stalled_step(5.0, 5.0) is None
        assert stopwatch.stalled_step(1.0, 1.0) == StalledStep("outer", threading.get_ident(), 2.0)
        with stopwatch.step("inner"):
            now[0] = 20.0
            assert stopwatch.stalled_step(5.0, 5.0) == StalledStep("inner", threading.get_ident(), 11.0)
        now[0] = 24.0
        assert stopwatch.stalled_step(5.0, 5.0) is None
        now[0] = 26.0
        assert stopwatch.stalled_step(5.0, 5.0) == StalledStep("outer", threading.get_ident(), 6.0)


@pytest.mark.parametrize(("mib", "given"), [(1, 960.0), (512, 2760.0), (4096, 16_200.0)])
def test_a_large_part_is_given_what_its_upload_may_take_twice(mib: int, given: float, tmp_path: Path) -> None:
    now, late = [0.0], list[bool]()
    stopwatch, store = Watchdog(lambda: now[0]), MemoryStore()
    with (tmp_path / "part").open("wb") as file:
        file.truncate(mib << 20)

    def slow() -> None:
        for seconds in (given - 1, given + 1):
            now[0] = seconds
            late.append(stopwatch.stalled_step(600.0, 960.0) is not None)
        raise Killed

    store.inject("put_if_absent", "predictions/*", slow)
    with pytest.raises(Killed):
        MonitoredStore(store, stopwatch).put_if_absent("predictions/part-0.parquet", tmp_path / "part")
    assert late == [False, True]
