"""Calls in threads beside the caller: in order, bounded, showing life, and never in the way of the end."""

from __future__ import annotations

import subprocess
import sys
import threading
from collections.abc import Iterator
from functools import partial

import pytest

from batchjob.concurrency import DaemonThreadPool, parallel_map, run_in_background

PATIENCE = 60.0  # seconds, for what another thread does at once


def test_results_come_in_the_order_of_the_items() -> None:
    second_done = threading.Event()

    def work(number: int) -> int:
        if number == 0:
            assert second_done.wait(PATIENCE)
        if number == 1:
            second_done.set()
        return number * number

    assert list(parallel_map(work, range(200))) == [number * number for number in range(200)]
    assert list(parallel_map(work, [])) == []


def test_only_a_few_items_are_taken_ahead() -> None:
    taken: list[int] = []

    def items() -> Iterator[int]:
        for number in range(10_000):
            taken.append(number)
            yield number

    for count, number in enumerate(parallel_map(lambda item: item, items(), threads=2)):
        assert number == count
        assert len(taken) <= count + 10


def test_the_first_failure_is_raised_in_its_turn_and_ends_the_rest() -> None:
    began: list[int] = []

    def work(number: int) -> int:
        began.append(number)
        if number == 3:
            raise KeyError("three")
        return number

    results = parallel_map(work, range(100_000), threads=1)
    assert [next(results) for _ in range(3)] == [0, 1, 2]
    with pytest.raises(KeyError, match="three"):
        next(results)
    assert len(began) < 100


def test_the_caller_shows_life_while_a_call_blocks() -> None:
    beats = threading.Event()
    assert run_in_background(lambda: beats.wait(PATIENCE), beats.set)


def test_whoever_stops_does_not_wait_for_what_blocks() -> None:
    go_on = threading.Event()

    def stop() -> None:
        raise InterruptedError

    with pytest.raises(InterruptedError):
        run_in_background(lambda: go_on.wait(PATIENCE), stop)
    go_on.set()


def test_a_process_that_ends_beside_busy_threads_has_its_exit_code() -> None:
    """As one ends in the middle of an outage, with calls that nobody waits for."""
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


def test_kept_threads_answer_each_call_and_are_no_more_than_told() -> None:
    threads, gate = DaemonThreadPool(3), threading.Barrier(3)

    def work(number: int) -> tuple[int, int]:
        if number < 3:
            gate.wait(PATIENCE)
        return number, threading.get_ident()

    found = [threads.submit(partial(work, number)) for number in range(50)]
    assert [future.result(PATIENCE)[0] for future in found] == list(range(50))
    assert len({future.result()[1] for future in found}) == 3
    broken = threads.submit(lambda: 1 // 0)
    with pytest.raises(ZeroDivisionError):
        broken.result(PATIENCE)
    threads.shutdown()
    assert threads.submit(lambda: 7).result(PATIENCE) == 7, "it begins anew"


def test_a_call_that_blocks_does_not_hold_up_the_end_of_the_process() -> None:
    code = """
import time
from batchjob.concurrency import run_in_background
def stop():
    raise SystemExit(75)
run_in_background(lambda: time.sleep(600), stop)
"""
    assert subprocess.run([sys.executable, "-c", code], check=False, timeout=60).returncode == 75


def test_what_came_before_a_failure_of_the_items_is_told_first() -> None:
    def items() -> Iterator[int]:
        yield 1
        yield 2
        raise LookupError("no more")

    found = parallel_map(lambda item: item * 10, items(), threads=2, prefetch=3)
    assert [next(found), next(found)] == [10, 20]
    with pytest.raises(LookupError, match="no more"):
        next(found)
