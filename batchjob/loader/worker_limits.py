"""What a loader process may take of its machine: memory, no core files, and CPU seconds while an image is in work."""

from __future__ import annotations

import math
import resource
import signal
import sys
import time
from contextlib import suppress
from pathlib import Path
from typing import Any

from batchjob.loader.worker_progress import WorkerProgress

__all__ = ["WorkerCallback", "apply_process_limits"]


class WorkerCallback:
    """Told what is at work in this process: the worker's clock reads it off the mark, the kernel's counts CPU seconds.

    The process may use so many of them for an image, or to send a batch, or the kernel ends it by SIGXCPU: also where
    the worker's clock, which counts all seconds, cannot look. Fetching is under neither. A call costs a microsecond.

    Args:
        mark: read by the worker.
        seconds: of the worker's clock; the kernel counts whole ones, and up to one more.
    """

    def __init__(self, progress: WorkerProgress, seconds: float) -> None:
        self._mark, self._seconds = progress, seconds
        _, self._hard = resource.getrlimit(resource.RLIMIT_CPU)
        signal.signal(signal.SIGXCPU, signal.SIG_DFL)  # who started us may have ignored it

    def on_fetch(self) -> None:
        self._allow(math.inf)
        self._mark.set_fetching()

    def on_image(self, row: int, etag: str | None) -> None:
        self._allow(self._seconds)
        self._mark.set_image(row, etag)

    def on_send(self) -> None:
        self._allow(self._seconds)
        self._mark.set_sending()

    def _allow(self, seconds: float) -> None:
        """From now on; the hard limit, which nobody can raise again, stays as it is."""
        bound = self._hard
        if math.isfinite(seconds) and seconds < sys.maxsize // 2:
            wanted = math.ceil(time.process_time() + seconds)
            bound = wanted if bound == resource.RLIM_INFINITY else min(wanted, bound)
        with suppress(OSError, ValueError):
            resource.setrlimit(resource.RLIMIT_CPU, (bound, self._hard))


def apply_process_limits(memory: int | None) -> None:
    """Limit this process to so many bytes; where the system runs out of them nevertheless, it is the first to go."""
    _limit(resource.RLIMIT_CORE, 0)
    if memory is not None and sys.platform == "linux":  # elsewhere it counts no mapped memory, or all address space
        _limit(resource.RLIMIT_DATA, memory)
    with suppress(OSError):
        Path("/proc/self/oom_score_adj").write_text("500")


def _limit(what: Any, most: int) -> None:
    _, hard = resource.getrlimit(what)
    bound = most if hard == resource.RLIM_INFINITY else min(most, hard)
    with suppress(OSError, ValueError):
        resource.setrlimit(what, (bound, bound))
