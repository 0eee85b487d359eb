"""What a process freed stays with it while it works, and goes back to the system afterwards."""

from __future__ import annotations

import platform
import subprocess
import sys

import pytest

FAULTS = """
import resource, sys
import torch
from batchjob.inference import cpu_parallelism as heap
torch.set_num_threads(1)
def faults():
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    for _ in range(50):
        torch.ones(3_000_000).sum()
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before
faults()
heap.retain_freed_memory()
faults()
kept = faults()
heap.release_freed_memory()
def resident():
    return int(open("/proc/self/statm").read().split()[1])
held = [torch.ones(20_000_000)]
full = resident()
held.clear()
heap.release_freed_memory()
print(kept, full - resident())
"""


def printed(**environment: str) -> list[int]:
    done = subprocess.run(
        [sys.executable, "-c", FAULTS], capture_output=True, text=True, check=True, env={"PATH": "", **environment}
    )
    return [int(number) for number in done.stdout.split()]


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="another C library")
def test_memory_is_kept_while_it_is_worked_with_and_given_back_then() -> None:
    kept, released = printed()
    assert kept < 500, "pages were taken anew"  # of the 3,000 that one tensor takes, 50 times
    assert released > 15_000, "pages stayed"


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="another C library")
def test_what_the_environment_says_stands() -> None:
    kept, _ = printed(MALLOC_MMAP_THRESHOLD_="100000")
    assert kept > 50_000
