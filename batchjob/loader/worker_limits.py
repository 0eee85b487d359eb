"""Limits of a loader process, set by itself: memory, no core files, and CPU seconds for each image."""

from __future__ import annotations

import math
import resource
import signal
import sys
import time
from contextlib import suppress
from pathlib import Path

from batchjob.loader.worker_progress import WorkerProgress

__all__ = ["WorkerCallback", "apply_process_limits"]


class WorkerCallback:
    """Callback of a loader process: records progress for the worker and limits the CPU time of each image.

    There are two clocks. The worker reads the progress and kills a process that takes too long by the wall clock. The
    kernel sends SIGXCPU to one that uses too much CPU time for an image or for sending a batch, which also works where
    the worker cannot look. Fetching is under neither. A call costs a microsecond.

    Args:
        progress: Slot that the worker reads.
        seconds: Limit of both clocks; the kernel counts whole seconds, up to one more.
    """

    def __init__(self, progress: WorkerProgress, seconds: float) -> None:
        self._progress, self._seconds = progress, seconds
        _, self._hard_limit = resource.getrlimit(resource.RLIMIT_CPU)
        signal.signal(signal.SIGXCPU, signal.SIG_DFL)  # the program that started us may have ignored it

    def on_fetch(self) -> None:
        self._limit_cpu_time(math.inf)
        self._progress.set_fetching()

    def on_image(self, row: int, etag: str | None) -> None:
        self._limit_cpu_time(self._seconds)
        self._progress.set_image(row, etag)

    def on_send(self) -> None:
        self._limit_cpu_time(self._seconds)
        self._progress.set_sending()

    def _limit_cpu_time(self, seconds: float) -> None:
        """Allow so many CPU seconds from now on.

        Only the soft limit moves: a hard limit, once lowered, cannot be raised again.

        Example: a process that has used 12.3 s and gets 60 s for an image has the soft limit 73.
        """
        limit = self._hard_limit
        if math.isfinite(seconds) and seconds < sys.maxsize // 2:
            wanted = math.ceil(time.process_time() + seconds)
            limit = wanted if limit == resource.RLIM_INFINITY else min(wanted, limit)
        with suppress(OSError, ValueError):
            resource.setrlimit(resource.RLIMIT_CPU, (limit, self._hard_limit))


def apply_process_limits(memory_bytes: int | None) -> None:
    """Limit this process to so many bytes (None: no limit), without core files, and make it the OOM killer's choice."""
    _limit_resource(resource.RLIMIT_CORE, 0)
    # Outside Linux, RLIMIT_DATA does not count mapped memory, or counts all of the address space.
    if memory_bytes is not None and sys.platform == "linux":
        _limit_resource(resource.RLIMIT_DATA, memory_bytes)
    with suppress(OSError):
        Path("/proc/self/oom_score_adj").write_text("500")


def _limit_resource(resource_id: int, limit: int) -> None:
    _, hard_limit = resource.getrlimit(resource_id)
    limit = limit if hard_limit == resource.RLIM_INFINITY else min(limit, hard_limit)
    with suppress(OSError, ValueError):
        resource.setrlimit(resource_id, (limit, limit))
