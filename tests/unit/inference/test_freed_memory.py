"""Freed memory: it stays with the process while a worker runs, and is returned to the system afterwards."""

from __future__ import annotations

import platform
import subprocess
import sys

import pytest

PROGRAM = """
import resource, sys
import torch
from batchjob.inference.cpu_parallelism import release_freed_memory, retain_freed_memory
torch.set_num_threads(1)
def faults():
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    for _ in range(50):
        torch.ones(3_000_000).sum()
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before
faults()
retain_freed_memory()
faults()
kept = faults()
release_freed_memory()
def resident():
    return int(open("/proc/self/statm").read().split()[1])
held = [torch.ones(20_000_000)]
full = resident()
held.clear()
release_freed_memory()
print(kept, full - resident())
"""


def run_program(**environment: str) -> list[int]:
    done = subprocess.run(
        [sys.executable, "-c", PROGRAM], capture_output=True, text=True, check=True, env={"PATH": "", **environment}
    )
    return [int(number) for number in done.stdout.split()]


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="another C library")
def test_freed_memory_is_retained_then_released() -> None:
    kept, released = run_program()
    assert kept < 500, "pages were allocated again"  # of 50 tensors with 3,000 pages each
    assert released > 15_000, "pages were not returned"


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="another C library")
def test_allocator_settings_of_the_environment_are_kept() -> None:
    kept, _ = run_program(MALLOC_MMAP_THRESHOLD_="100000")
    assert kept > 50_000
