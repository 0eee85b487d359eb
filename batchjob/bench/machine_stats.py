"""Statistics of the machine: CPU time and peak memory of the bench's processes, and the speed of one core."""

from __future__ import annotations

import hashlib
import os
import threading
import time
from collections.abc import Callable, Iterable
from contextlib import suppress
from pathlib import Path
from random import Random
from statistics import median
from types import TracebackType
from typing import Self

from batchjob.bench.results import MemoryPeak

__all__ = ["MemorySampler", "calibrate", "read_cpu_seconds"]

_PROC = Path("/proc")
_SAMPLE_INTERVAL_SECONDS = 0.5
_TICKS_PER_SECOND = os.sysconf("SC_CLK_TCK") if hasattr(os, "sysconf") else 100
_CALIBRATION_BYTES = 4 << 20
_CALIBRATION_ROUNDS = 25


def calibrate() -> float:
    """Measure the milliseconds that one core takes to hash 4 MiB of noise; median of 25 rounds."""
    noise = Random(0).randbytes(_CALIBRATION_BYTES)
    hashlib.sha256(noise).digest()
    return median(_time_hash(noise) for _ in range(_CALIBRATION_ROUNDS)) * 1e3


def read_cpu_seconds() -> float | None:
    """Return the CPU time of this process and its living descendants; None if the system does not tell."""
    if not _PROC.is_dir():
        return None
    seconds = 0.0
    for pid in [os.getpid(), *_list_descendants()]:
        with suppress(OSError, ValueError, IndexError):
            fields = _read_stat(pid)
            user_ticks, system_ticks = int(fields[11]), int(fields[12])
            seconds += (user_ticks + system_ticks) / _TICKS_PER_SECOND
    return seconds


class MemorySampler:
    """Thread that reads the memory of this process and its descendants twice a second while it is entered.

    Args:
        loader_pids: Returns the ids of the loader processes known by now.
    """

    def __init__(self, loader_pids: Callable[[], Iterable[int]]) -> None:
        self._loader_pids = loader_pids
        self._peaks: dict[str, MemoryPeak] = {}
        self._ended = threading.Event()
        self._thread = threading.Thread(target=self._run, name="memory-sampler", daemon=True)

    def __enter__(self) -> Self:
        self._thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self._ended.set()
        self._thread.join()

    def peaks(self) -> tuple[MemoryPeak, ...]:
        """Return the peak of each group of processes; empty if the system does not tell."""
        return tuple(self._peaks.values())

    def _run(self) -> None:
        while not self._ended.wait(_SAMPLE_INTERVAL_SECONDS):
            self._sample()
        self._sample()

    def _sample(self) -> None:
        loaders = set(self._loader_pids()) - {os.getpid()}
        others = set(_list_descendants()) - loaders
        groups = {"driver and worker (one process)": {os.getpid()}, "loaders": loaders, "others": others}
        for name, pids in groups.items():
            usages = [usage for usage in map(_read_memory, pids) if usage is not None]
            if usages:
                self._update_peak(name, usages)

    def _update_peak(self, name: str, usages: list[tuple[int, int | None]]) -> None:
        known_pss = [pss for _, pss in usages if pss is not None]
        # The sum is too low if the PSS of one process is missing.
        pss = sum(known_pss) if len(known_pss) == len(usages) else 0
        peak = self._peaks.get(name, MemoryPeak(name, 0, 0, None))
        self._peaks[name] = MemoryPeak(
            processes=name,
            count=max(peak.count, len(usages)),
            rss=max(peak.rss, sum(rss for rss, _ in usages)),
            pss=max(peak.pss or 0, pss) or None,
        )


def _time_hash(noise: bytes) -> float:
    started = time.perf_counter()
    hashlib.sha256(noise).digest()
    return time.perf_counter() - started


def _read_memory(pid: int) -> tuple[int, int | None] | None:
    """Return RSS and PSS of a process in bytes; None if it has ended."""
    try:
        rss = int((_PROC / str(pid) / "statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")
    except (OSError, ValueError, IndexError):
        return None
    with suppress(OSError, ValueError):
        for line in (_PROC / str(pid) / "smaps_rollup").read_text().splitlines():
            if line.startswith("Pss:"):
                return rss, int(line.split()[1]) * 1024
    return rss, None


def _list_descendants() -> list[int]:
    """Return the ids of the children of this process, of their children, and so on."""
    children: dict[int, list[int]] = {}
    for path in _PROC.glob("[0-9]*"):
        with suppress(OSError, ValueError, IndexError):
            pid = int(path.name)
            parent = int(_read_stat(pid)[1])
            children.setdefault(parent, []).append(pid)
    descendants: list[int] = []
    remaining = [os.getpid()]
    while remaining:
        pids = children.get(remaining.pop(), [])
        descendants += pids
        remaining += pids
    return descendants


def _read_stat(pid: int) -> list[str]:
    """Return the fields of /proc/PID/stat after the process name: state, parent, … (proc(5), fields 3 and up).

    The name may contain blanks and parentheses, so the line is cut at its last `)`.
    """
    return (_PROC / str(pid) / "stat").read_text().rpartition(")")[2].split()
