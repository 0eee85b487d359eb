"""Statistics of the machine, from real child processes."""

from __future__ import annotations

import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager

import pytest

from batchjob.bench.machine_stats import calibrate, read_cpu_seconds, sample_memory

# Each program says `ready` and then waits for its stdin to be closed.
IDLE = "print('ready', flush=True); input()"
BUSY = f"""
import time
while time.process_time() < 0.2:
    pass
{IDLE}
"""
PARENT = f"""
import subprocess, sys
child = subprocess.Popen([sys.executable, '-c', {BUSY!r}], stdin=subprocess.PIPE, stdout=subprocess.PIPE)
child.stdout.readline()
{IDLE}
"""
LARGE = f"noise = bytes(range(256)) * (1 << 18); {IDLE}"  # 64 MiB


@contextmanager
def run_child(code: str) -> Iterator[int]:
    """Run a Python program in a child process until the block ends; yields its id once it is ready."""
    command = [sys.executable, "-S", "-c", code]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL) as child:
        assert child.stdout is not None
        assert child.stdout.readline() == b"ready\n"
        yield child.pid


@pytest.mark.parametrize("code", [BUSY, PARENT], ids=["child", "grandchild"])
def test_cpu_time_of_descendants_is_included(code: str) -> None:
    before, own_before = read_cpu_seconds(), time.process_time()
    with run_child(code):
        after, own_after = read_cpu_seconds(), time.process_time()
    # The system counts in ticks of 10 ms, of user and of system time.
    assert after - before - (own_after - own_before) > 0.2 - 0.05


def test_memory_of_child_processes_is_apart_from_that_of_this_one() -> None:
    with sample_memory() as before:
        pass
    with run_child(LARGE), sample_memory() as peaks:
        pass
    assert peaks["loaders"] - before.get("loaders", 0) > 60 << 20
    assert abs(peaks["driver and worker"] - before["driver and worker"]) < 60 << 20


def test_peak_outlives_its_process() -> None:
    with sample_memory() as peaks:
        with run_child(LARGE):
            deadline = time.monotonic() + 30
            while peaks.get("loaders", 0) < 60 << 20 and time.monotonic() < deadline:
                time.sleep(0.05)
        seen = peaks["loaders"]
    assert peaks["loaders"] >= seen > 60 << 20


def test_error_in_the_measured_work_ends_the_sampler() -> None:
    threads = threading.active_count()
    with pytest.raises(ValueError, match="no image"), sample_memory():
        raise ValueError("no image")
    assert threading.active_count() == threads


def test_calibration_is_in_milliseconds_a_round() -> None:
    started = time.perf_counter()
    milliseconds = calibrate()
    # At least 13 of the 25 rounds took no less than the median.
    assert 0 < 13 * milliseconds <= (time.perf_counter() - started) * 1e3
