"""Calls in daemon threads: ordered results, bounded prefetch, heartbeats, and an exit that is not delayed."""

from __future__ import annotations

import multiprocessing
import os
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator
from functools import partial
from pathlib import Path

import pytest

from batchjob.concurrency import (
    DaemonThreadPool,
    clean_process_start,
    join_child_process,
    parallel_map,
    run_in_background,
)

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


# -- child processes -------------------------------------------------------------------------------------------------

_SOCKET_SCRIPT = """
import multiprocessing.connection, os, sys, tempfile
from batchjob import concurrency
from batchjob.errors import InvalidJob
concurrency._SHORT_FOLDERS = tuple(sys.argv[1:])
try:
    concurrency._choose_socket_folder()
except InvalidJob as error:
    sys.exit(error.message)
listener = multiprocessing.connection.Listener(family="AF_UNIX")
print(os.path.dirname(os.path.dirname(listener.address)), tempfile.gettempdir())
listener.close()
"""


def choose_socket_folder(temporary: Path, *others: Path) -> subprocess.CompletedProcess[str]:
    """Choose in a process of its own, whose folder for temporary files is given."""
    command = [sys.executable, "-c", _SOCKET_SCRIPT, *map(str, others)]
    environment = {**os.environ, "TMPDIR": str(temporary)}
    return subprocess.run(command, env=environment, capture_output=True, text=True, timeout=60, check=False)


@pytest.fixture
def short_folder() -> Iterator[Path]:
    with tempfile.TemporaryDirectory(prefix="b", dir="/tmp") as folder:
        yield Path(folder)


@pytest.mark.parametrize("length", [90, 150])
def test_sockets_lie_in_a_short_folder_where_that_of_temporary_files_is_too_long(
    length: int, short_folder: Path
) -> None:
    temporary = short_folder / ("t" * (length - len(str(short_folder)) - 1))
    temporary.mkdir()
    absent, other = short_folder / "absent", short_folder / "o"
    other.mkdir()
    done = choose_socket_folder(temporary, absent, other)
    assert (done.returncode, done.stdout.split()) == (0, [str(other), str(temporary)]), done.stderr
    assert list(other.iterdir()) == [], "removed at the exit"


def test_short_folder_of_temporary_files_is_used_for_sockets_too(short_folder: Path) -> None:
    done = choose_socket_folder(short_folder, Path("/absent"))
    assert done.stdout.split() == [str(short_folder)] * 2, done.stderr


def test_without_any_short_folder_the_job_is_refused_with_a_sentence(short_folder: Path) -> None:
    temporary = short_folder / ("t" * 90)
    temporary.mkdir()
    done = choose_socket_folder(temporary, short_folder / "absent")
    assert done.returncode == 1
    assert done.stderr.startswith(f"TMPDIR: {temporary} is too long a path for the sockets of loader processes; set")


_DAEMONIC_SCRIPT = """
import multiprocessing, os
from batchjob.concurrency import clean_process_start, join_child_process

def start_child(context):
    child = context.Process(target=os._exit, args=(7,), daemon=True)
    with clean_process_start():
        child.start()
    assert multiprocessing.current_process().daemon
    print(join_child_process(child), flush=True)

if __name__ == "__main__":
    for method in ("fork", "spawn"):
        context = multiprocessing.get_context(method)
        daemon = context.Process(target=start_child, args=(multiprocessing.get_context("spawn"),), daemon=True)
        daemon.start()
        daemon.join()
"""


def test_daemonic_process_may_start_a_process_that_ends_with_it(tmp_path: Path) -> None:
    (tmp_path / "daemonic.py").write_text(_DAEMONIC_SCRIPT)
    command = [sys.executable, "daemonic.py"]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=60, check=False)
    assert done.stdout == "7\n7\n", done.stderr


def test_exit_code_of_a_child_is_known_even_if_other_processes_are_started_meanwhile() -> None:
    context = multiprocessing.get_context("spawn")
    child = context.Process(target=os._exit, args=(5,), daemon=True)
    with clean_process_start():
        child.start()
    assert join_child_process(child, 60.0) == 5
    assert join_child_process(child) == 5
    endless = context.Process(target=time.sleep, args=(600,), daemon=True)
    with clean_process_start():
        endless.start()
    assert join_child_process(endless, 0.01) is None
    endless.kill()
    assert join_child_process(endless) == -signal.SIGKILL
