"""Calls in daemon threads: ordered results, bounded prefetch, heartbeats, and an exit that is not delayed."""

from __future__ import annotations

import subprocess
import sys
import threading
from collections.abc import Iterator
from functools import partial

import pytest

from batchjob.concurrency import DaemonThreadPool, parallel_map, run_in_background

TIMEOUT = 60.0  # seconds, for events that another thread sets at once


def test_results_are_in_the_order_of_the_items() -> None:
    second_done = threading.Event()

    def work(number: int) -> int:
        if number == 0:
            assert second_done.wait(TIMEOUT)
        if number == 1:
            second_done.set()
        return number * number

    assert list(parallel_map(work, range(200))) == [number * number for number in range(200)]
    assert list(parallel_map(work, [])) == []


def test_few_items_are_taken_ahead() -> None:
    taken: list[int] = []

    def items() -> Iterator[int]:
        for number in range(10_000):
            taken.append(number)
            yield number

    for count, number in enumerate(parallel_map(lambda item: item, items(), threads=2)):
        assert number == count
        assert len(taken) <= count + 10


def test_first_failure_is_raised_in_order_and_stops_the_rest() -> None:
    started: list[int] = []

    def work(number: int) -> int:
        started.append(number)
        if number == 3:
            raise KeyError("three")
        return number

    results = parallel_map(work, range(100_000), threads=1)
    assert [next(results) for _ in range(3)] == [0, 1, 2]
    with pytest.raises(KeyError, match="three"):
        next(results)
    assert len(started) < 100


def test_on_wait_is_called_while_a_call_blocks() -> None:
    called = threading.Event()
    assert run_in_background(lambda: called.wait(TIMEOUT), called.set)


def test_exception_of_on_wait_abandons_the_call() -> None:
    go_on = threading.Event()

    def stop() -> None:
        raise InterruptedError

    with pytest.raises(InterruptedError):
        run_in_background(lambda: go_on.wait(TIMEOUT), stop)
    go_on.set()


def test_exit_code_survives_busy_daemon_threads() -> None:
    """End like a program during an outage of a store, with calls that are still blocked."""
    code = """
import atexit, sys
from batchjob.concurrency import DaemonThreadPool, exit_past_daemon_threads
print("said", end=" and ")
atexit.register(lambda: print("done", end="", flush=True))
def work():
    while True:
        bytearray(1 << 20).find(1)
DaemonThreadPool(1).submit(work)
exit_past_daemon_threads(75)
sys.exit(1)
"""
    ended = subprocess.run([sys.executable, "-c", code], check=False, timeout=60, capture_output=True, text=True)
    assert (ended.returncode, ended.stdout) == (75, "said and done")


def test_thread_pool_runs_all_calls_in_limited_threads() -> None:
    threads, gate = DaemonThreadPool(3), threading.Barrier(3)

    def work(number: int) -> tuple[int, int]:
        if number < 3:
            gate.wait(TIMEOUT)
        return number, threading.get_ident()

    results = [threads.submit(partial(work, number)) for number in range(50)]
    assert [future.result(TIMEOUT)[0] for future in results] == list(range(50))
    assert len({future.result()[1] for future in results}) == 3
    broken = threads.submit(lambda: 1 // 0)
    with pytest.raises(ZeroDivisionError):
        broken.result(TIMEOUT)
    threads.shutdown()
    assert threads.submit(lambda: 7).result(TIMEOUT) == 7, "it starts again after a shutdown"


def test_blocked_call_does_not_delay_process_exit() -> None:
    code = """
import time
from batchjob.concurrency import run_in_background
def stop():
    raise SystemExit(75)
run_in_background(lambda: time.sleep(600), stop)
"""
    assert subprocess.run([sys.executable, "-c", code], check=False, timeout=60).returncode == 75


def test_results_before_a_failure_of_the_items_are_yielded() -> None:
    def items() -> Iterator[int]:
        yield 1
        yield 2
        raise LookupError("no more")

    results = parallel_map(lambda item: item * 10, items(), threads=2, prefetch=3)
    assert [next(results), next(results)] == [10, 20]
    with pytest.raises(LookupError, match="no more"):
        next(results)
