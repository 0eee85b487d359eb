"""Limits that a loader process sets for itself: CPU time of one image or batch, memory, no core files."""

from __future__ import annotations

import json
import math
import multiprocessing
import resource
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator

import pytest

from batchjob.loader.worker_limits import ProgressSnapshot, WorkerCallback, WorkerProgress

MIB = 1 << 20
LINUX_ONLY = pytest.mark.skipif(sys.platform != "linux", reason="only Linux limits data and has oom_score_adj")

# Code for a process of its own, whose limits cannot be raised again.
PRELUDE = """
import json, multiprocessing, os, resource, signal, sys
from batchjob.loader.worker_limits import WorkerCallback, apply_process_limits
from batchjob.loader.worker_limits import WorkerProgress

progress = WorkerProgress(multiprocessing.get_context())
progress.start_request(1)
"""


@pytest.fixture(autouse=True)
def _restored_limit() -> Iterator[None]:
    """Restore the limit of this process and its reaction to SIGXCPU."""
    limits, handler = resource.getrlimit(resource.RLIMIT_CPU), signal.getsignal(signal.SIGXCPU)
    yield
    resource.setrlimit(resource.RLIMIT_CPU, limits)
    signal.signal(signal.SIGXCPU, handler)


def make_callback(seconds: float) -> tuple[WorkerCallback, WorkerProgress]:
    progress = WorkerProgress(multiprocessing.get_context())
    progress.start_request(1)
    return WorkerCallback(progress, seconds), progress


def soft_limit() -> int:
    return resource.getrlimit(resource.RLIMIT_CPU)[0]


def run_python(code: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-c", PRELUDE + code]
    return subprocess.run(command, capture_output=True, text=True, check=False, timeout=60)


def evaluate(setup: str, expression: str) -> object:
    """Return the value of an expression in a process that has run some code."""
    process = run_python(f"{setup}\nprint(json.dumps({expression}))\n")
    assert process.returncode == 0, process.stderr
    return json.loads(process.stdout)


# -- CPU time --------------------------------------------------------------------------------------------------------


def begin_image(callback: WorkerCallback) -> None:
    callback.on_image(0, None)


def begin_sending(callback: WorkerCallback) -> None:
    callback.on_send()


@pytest.mark.parametrize("begin", [begin_image, begin_sending])
@pytest.mark.parametrize("seconds", [60.0, 600.5])
def test_image_and_batch_get_cpu_seconds_from_now_on(begin: Callable[[WorkerCallback], None], seconds: float) -> None:
    callback, _ = make_callback(seconds)
    before = time.process_time()
    begin(callback)
    # Whole seconds, rounded up: after 12.3 s of CPU time, 60 s for an image end at 73 s.
    assert math.ceil(before + seconds) <= soft_limit() <= math.ceil(time.process_time() + seconds)


def test_fetching_is_unlimited() -> None:
    before = resource.getrlimit(resource.RLIMIT_CPU)
    callback, _ = make_callback(60.0)
    callback.on_image(0, None)
    assert soft_limit() != before[1]
    callback.on_fetch()
    assert resource.getrlimit(resource.RLIMIT_CPU) == (before[1], before[1])


@pytest.mark.parametrize("seconds", [math.inf, 1e300, 2.0**63])
def test_endless_time_for_an_image_is_no_limit(seconds: float) -> None:
    callback, _ = make_callback(seconds)
    callback.on_image(0, None)
    assert soft_limit() == resource.getrlimit(resource.RLIMIT_CPU)[1]


def test_hard_limit_stays_and_is_never_exceeded() -> None:
    setup = """
resource.setrlimit(resource.RLIMIT_CPU, (30, 30))
limits, callback = [], WorkerCallback(progress, 60.0)
for begin in (callback.on_fetch, lambda: callback.on_image(0, None), callback.on_send):
    begin()
    limits.append(resource.getrlimit(resource.RLIMIT_CPU))
"""
    assert evaluate(setup, "limits") == [[30, 30], [30, 30], [30, 30]]


def test_image_that_uses_up_its_cpu_time_ends_the_process() -> None:
    """The signal ends it also where the program that started it ignores the signal."""
    process = run_python("""
signal.signal(signal.SIGXCPU, signal.SIG_IGN)
WorkerCallback(progress, 0.001).on_image(0, None)
while True:
    pass
""")
    assert process.returncode == -signal.SIGXCPU


def test_callback_records_the_progress() -> None:
    callback, progress = make_callback(60.0)
    callback.on_image(3, "tag")
    assert progress.snapshot == ProgressSnapshot(1, 3, "tag")
    callback.on_send()
    assert progress.snapshot == ProgressSnapshot(1, None, None)
    assert progress.is_overdue(-1.0), "sending has a limit"
    callback.on_fetch()
    assert progress.snapshot == ProgressSnapshot(1, None, None)
    assert not progress.is_overdue(-1.0), "fetching has none"


# -- memory and core files -------------------------------------------------------------------------------------------


def test_process_leaves_no_core_file() -> None:
    assert evaluate("apply_process_limits(None)", "resource.getrlimit(resource.RLIMIT_CORE)") == [0, 0]


@LINUX_ONLY
def test_process_is_the_first_to_be_killed_when_memory_is_short() -> None:
    assert evaluate("apply_process_limits(None)", "open('/proc/self/oom_score_adj').read()") == "500\n"


@LINUX_ONLY
def test_memory_beyond_the_limit_is_an_error_that_can_be_handled() -> None:
    setup = f"""
apply_process_limits({512 * MIB})
sizes = []
for size in ({64 * MIB}, {1024 * MIB}):
    try:
        sizes.append(len(bytes(size)))
    except MemoryError:
        sizes.append(None)
"""
    assert evaluate(setup, "sizes") == [64 * MIB, None]


@LINUX_ONLY
@pytest.mark.parametrize(
    ("hard_limit", "memory", "limits"),
    [
        (1024 * MIB, None, [1024 * MIB, 1024 * MIB]),
        (1024 * MIB, 512 * MIB, [512 * MIB, 512 * MIB]),
        (512 * MIB, 1024 * MIB, [512 * MIB, 512 * MIB]),  # a limit from outside, lower than ours, stays
    ],
)
def test_memory_limit_only_gets_lower(hard_limit: int, memory: int | None, limits: list[int]) -> None:
    setup = f"resource.setrlimit(resource.RLIMIT_DATA, ({hard_limit}, {hard_limit}))\napply_process_limits({memory})"
    assert evaluate(setup, "resource.getrlimit(resource.RLIMIT_DATA)") == limits
