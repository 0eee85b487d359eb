"""Statistics of the machine: CPU time and peak memory of the bench's processes, and the speed of one core."""

from __future__ import annotations

import hashlib
import threading
import timeit
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from random import Random
from statistics import median

import psutil

__all__ = ["calibrate", "read_cpu_seconds", "sample_memory"]

_SAMPLE_INTERVAL_SECONDS = 0.5


def calibrate() -> float:
    """Measure the milliseconds that one core takes to hash 4 MiB of noise; median of 25 rounds."""
    noise = Random(0).randbytes(4 << 20)
    return median(timeit.repeat(lambda: hashlib.sha256(noise).digest(), number=1, repeat=25)) * 1e3


def read_cpu_seconds() -> float:
    """Return the CPU time of this process and its living descendants."""
    seconds = 0.0
    for process in (psutil.Process(), *psutil.Process().children(recursive=True)):
        with suppress(psutil.Error):
            seconds += sum(process.cpu_times()[:2])  # user and system
    return seconds


@contextmanager
def sample_memory() -> Iterator[dict[str, int]]:
    """Read the memory of this process and of its descendants twice a second, and once at the end of the block.

    Yields:
        Peak bytes of both, complete at the end of the block. Pages that processes share count once in all (PSS), except
        on systems that do not tell.
    """
    peaks, ended = dict[str, int](), threading.Event()

    def run() -> None:
        is_ended = False
        while not is_ended:
            is_ended = ended.wait(_SAMPLE_INTERVAL_SECONDS)
            own, sizes = psutil.Process(), Counter[str]()
            for process in (own, *own.children(recursive=True)):
                with suppress(psutil.Error):
                    memory = process.memory_full_info()
                    group = "driver and worker" if process == own else "loaders"
                    sizes[group] += getattr(memory, "pss", memory.rss)
            peaks.update({group: max(size, peaks.get(group, 0)) for group, size in sizes.items()})

    thread = threading.Thread(target=run, name="memory-sampler", daemon=True)
    thread.start()
    try:
        yield peaks
    finally:
        ended.set()
        thread.join()
