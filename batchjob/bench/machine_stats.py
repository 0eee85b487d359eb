"""This process and all that come of it, as Linux tells: CPU seconds, and the most memory they held meanwhile."""

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
_EVERY_SECONDS = 0.5
_TICKS = os.sysconf("SC_CLK_TCK") if hasattr(os, "sysconf") else 100


def read_cpu_seconds() -> float | None:
    """Of this process and its descendants that live; None where the system does not say."""
    if not _PROC.is_dir():
        return None
    spent = 0.0
    for pid in [os.getpid(), *_descendants()]:
        with suppress(OSError, ValueError, IndexError):
            words = _stat(pid)
            spent += (int(words[11]) + int(words[12])) / _TICKS
    return spent


class MemorySampler:
    """Looks twice a second at what processes hold, as long as it is entered.

    Args:
        loaders: process ids of loader processes, as far as they are known by now.
    """

    def __init__(self, loader_pids: Callable[[], Iterable[int]]) -> None:
        self._loaders = loader_pids
        self._most: dict[str, tuple[int, int, int | None]] = {}
        self._over = threading.Event()
        self._thread = threading.Thread(target=self._watch, name="memory-watch", daemon=True)

    def __enter__(self) -> Self:
        self._thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self._over.set()
        self._thread.join()

    def peaks(self) -> tuple[MemoryPeak, ...]:
        """By kind of process; none where the system does not say."""
        return tuple(MemoryPeak(name, count, rss, pss) for name, (count, rss, pss) in self._most.items())

    def _watch(self) -> None:
        while not self._over.wait(_EVERY_SECONDS):
            self._look()
        self._look()

    def _look(self) -> None:
        loaders = set(self._loaders()) - {os.getpid()}
        rest = set(_descendants()) - loaders
        groups = {"driver and worker (one process)": {os.getpid()}, "loaders": loaders, "others": rest}
        for name, pids in groups.items():
            held = [one for one in map(_held, pids) if one is not None]
            if not held:
                continue
            rss = sum(one[0] for one in held)
            shares = [one[1] for one in held if one[1] is not None]
            pss = sum(shares) if len(shares) == len(held) else None
            count, most_rss, most_pss = self._most.get(name, (0, 0, None))
            larger = max(pss or 0, most_pss or 0) or None
            self._most[name] = max(count, len(held)), max(rss, most_rss), larger


def _held(pid: int) -> tuple[int, int | None] | None:
    """RSS and PSS in bytes."""
    try:
        rss = int((_PROC / str(pid) / "statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")
    except (OSError, ValueError, IndexError):
        return None
    with suppress(OSError, ValueError):
        for line in (_PROC / str(pid) / "smaps_rollup").read_text().splitlines():
            if line.startswith("Pss:"):
                return rss, int(line.split()[1]) * 1024
    return rss, None


def _descendants() -> list[int]:
    """Children, their children and so on."""
    children: dict[int, list[int]] = {}
    for path in _PROC.glob("[0-9]*"):
        with suppress(OSError, ValueError, IndexError):
            pid = int(path.name)
            children.setdefault(int(_stat(pid)[1]), []).append(pid)
    found: list[int] = []
    left = [os.getpid()]
    while left:
        more = children.get(left.pop(), [])
        found += more
        left += more
    return found


def _stat(pid: int) -> list[str]:
    """The fields after the name, which may hold blanks: state, parent, …"""
    return (_PROC / str(pid) / "stat").read_text().rpartition(")")[2].split()


_BYTES = 4 << 20
_ROUNDS = 25


def calibrate() -> float:
    """Milliseconds that hashing 4 MiB of noise takes one core; median of 25."""
    noise = Random(0).randbytes(_BYTES)
    hashlib.sha256(noise).digest()
    return median(_clocked(noise) for _ in range(_ROUNDS)) * 1e3


def _clocked(noise: bytes) -> float:
    began = time.perf_counter()
    hashlib.sha256(noise).digest()
    return time.perf_counter() - began
