"""Statistics of the machine, from real child processes."""

from __future__ import annotations

import os
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager

import pytest

from batchjob.bench.machine_stats import MemorySampler, calibrate, read_cpu_seconds
from batchjob.bench.results import MemoryPeak

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="there is no /proc")

WORKER = "driver and worker (one process)"
# Each program says `ready` and then waits for its stdin to be closed.
IDLE = "print('ready', flush=True); input()"
BUSY = f"""
import time
while time.process_time() < 0.2:
    pass
{IDLE}
"""
RENAMED = f"open('/proc/self/comm', 'w').write('a) b (c'){BUSY}"
PARENT = f"""
import subprocess, sys
child = subprocess.Popen([sys.executable, '-c', {BUSY!r}], stdin=subprocess.PIPE, stdout=subprocess.PIPE)
child.stdout.readline()
{IDLE}
"""


@contextmanager
def run_child(code: str) -> Iterator[int]:
    """Run a Python program in a child process until the block ends; yields its id once it is ready."""
    command = [sys.executable, "-S", "-c", code]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL) as child:
        assert child.stdout is not None
        assert child.stdout.readline() == b"ready\n"
        yield child.pid


def sample_once(*loader_pids: int) -> dict[str, MemoryPeak]:
    """Sample the memory once: the sampler takes a sample at the end of its `with` block."""
    with MemorySampler(lambda: loader_pids) as sampler:
        pass
    return {peak.processes: peak for peak in sampler.peaks()}


def count_others() -> int:
    """Count the child processes that earlier tests of this session have left, such as a fork server."""
    peaks = sample_once()
    return peaks["others"].count if "others" in peaks else 0


# -- CPU time


@pytest.mark.parametrize("code", [BUSY, RENAMED, PARENT], ids=["child", "child with ) in its name", "grandchild"])
def test_cpu_time_of_descendants_is_included(code: str) -> None:
    before, own_before = read_cpu_seconds(), time.process_time()
    with run_child(code):
        after, own_after = read_cpu_seconds(), time.process_time()
    assert before is not None
    assert after is not None
    # The system counts in ticks of 10 ms, of user and of system time.
    assert after - before - (own_after - own_before) > 0.2 - 0.05


def test_cpu_time_of_this_process_is_included() -> None:
    used = time.process_time()
    seconds = read_cpu_seconds()
    assert seconds is not None
    assert seconds > used - 0.05


# -- memory


def test_memory_of_this_process_is_that_of_the_driver_and_worker() -> None:
    peak = sample_once()[WORKER]
    assert peak.count == 1
    assert peak.pss is not None
    assert 10 << 20 < peak.pss <= peak.rss


def test_child_processes_are_loaders_if_they_are_known_as_such() -> None:
    before = count_others()
    with run_child(IDLE) as loader, run_child(IDLE) as second, run_child(IDLE):
        peaks = sample_once(loader, second)
    assert {name: peak.count for name, peak in peaks.items()} == {WORKER: 1, "loaders": 2, "others": before + 1}


def test_process_that_loads_images_itself_is_no_loader() -> None:
    peaks = sample_once(os.getpid())
    assert peaks[WORKER].count == 1
    assert "loaders" not in peaks


def test_process_that_has_ended_is_left_out() -> None:
    with run_child(IDLE) as pid:
        pass
    assert "loaders" not in sample_once(pid)


def test_peak_outlives_its_process() -> None:
    sampled = threading.Event()
    with run_child(IDLE) as loader:

        def find_loaders() -> list[int]:
            if len(calls) == 1:
                sampled.set()  # by now the first sample is complete
            calls.append(1)
            return [loader]

        calls: list[int] = []
        sampler = MemorySampler(find_loaders)
        sampler.__enter__()
        assert sampled.wait(30)
    sampler.__exit__(None, None, None)
    (peak,) = [peak for peak in sampler.peaks() if peak.processes == "loaders"]
    assert peak.count == 1
    assert peak.rss > 1 << 20


def test_error_in_the_measured_work_ends_the_sampler() -> None:
    threads = threading.active_count()
    with pytest.raises(ValueError, match="no image"), MemorySampler(list):
        raise ValueError("no image")
    assert threading.active_count() == threads


# -- speed of a core


def test_calibration_is_in_milliseconds_a_round() -> None:
    started = time.perf_counter()
    milliseconds = calibrate()
    # At least 13 of the 25 rounds took no less than the median.
    assert 0 < 13 * milliseconds <= (time.perf_counter() - started) * 1e3
