"""Progress of a loader process, readable even after it has died, and the limits that it sets itself."""

from __future__ import annotations

import ctypes
import math
import resource
import signal
import sys
import time
from contextlib import suppress
from dataclasses import dataclass
from multiprocessing.context import BaseContext
from pathlib import Path
from typing import Any

__all__ = [
    "ProgressSnapshot",
    "SkippedRequests",
    "WorkerCallback",
    "WorkerProgress",
    "apply_process_limits",
    "limit_process",
]

_STARTING, _IDLE, _FETCHING, _IMAGE, _SENDING = range(5)
_SKIPPED_PLACES = 1024


class _ProgressRecord(ctypes.Structure):
    _fields_ = (
        ("request_number", ctypes.c_longlong),
        ("stage", ctypes.c_int),
        ("row", ctypes.c_int),
        ("fetched", ctypes.c_longlong),
        ("since", ctypes.c_double),
        ("etag", ctypes.c_char * 256),
    )


@dataclass(frozen=True)
class ProgressSnapshot:
    """Request and image that a process was working on.

    Attributes:
        request_number: Number of the request.
        row: Row of the image that was being decoded or transformed; None between images.
        etag: ETag of that image, where it has one.
    """

    request_number: int
    row: int | None
    etag: str | None


class WorkerProgress:
    """Slot in shared memory, written by one loader process and read by the worker.

    It can only be passed to a process as that process starts.

    Example: a process that works on row 2 of request 7 has written `start_request(7)`, `set_fetching()` for each
    object, `set_image(0, …)`, `set_image(1, …)`, `set_image(2, etag)`. If it dies now, `snapshot` is
    `ProgressSnapshot(7, 2, etag)`: that image is the suspect.

    Args:
        context: Multiprocessing context that starts the process.
    """

    def __init__(self, context: BaseContext) -> None:
        self._record: Any = context.RawValue(_ProgressRecord)

    # -- in the loader process ---------------------------------------------------------------------------------

    def set_idle(self) -> None:
        """Enter the wait for a request, after the start or after a request."""
        self._record.stage = _IDLE

    def start_request(self, number: int) -> None:
        """Begin a request, with no image in work yet."""
        self._record.request_number = number
        self._record.stage = _FETCHING

    def set_fetching(self) -> None:
        """Enter the fetch, which may take as long as storage does; called again as each object arrives."""
        self._record.stage = _FETCHING
        self._record.fetched += 1

    def set_image(self, row: int, etag: str | None) -> None:
        """Begin to decode and transform the image of this row."""
        record = self._record
        record.stage = _FETCHING  # so that the worker never reads the new row with the time of the old one
        record.row, record.etag, record.since = row, (etag or "").encode()[:255], time.monotonic()
        record.stage = _IMAGE

    def set_sending(self) -> None:
        """Begin to assemble and send the batch."""
        self._record.since = time.monotonic()
        self._record.stage = _SENDING

    # -- in the worker -----------------------------------------------------------------------------------------

    @property
    def started(self) -> bool:
        """True once the process has been ready for its first request."""
        return bool(self._record.stage != _STARTING)

    @property
    def version(self) -> tuple[float, ...]:
        """A value that changes with every step of the process."""
        record = self._record
        return record.request_number, record.stage, record.row, record.since, record.fetched

    @property
    def snapshot(self) -> ProgressSnapshot | None:
        """Request and image that the process works on, or worked on when it died; None between requests."""
        record = self._record
        if record.stage in {_STARTING, _IDLE}:
            return None
        if record.stage != _IMAGE:
            return ProgressSnapshot(record.request_number, None, None)
        return ProgressSnapshot(record.request_number, record.row, record.etag.decode(errors="replace") or None)

    def is_overdue(self, seconds: float) -> bool:
        """Return True if one image, or the sending of a batch, takes longer than this."""
        # The stage is read before the time: an image that begins in between is not blamed for the one before it.
        record = self._record
        return bool(record.stage in {_IMAGE, _SENDING} and time.monotonic() - record.since > seconds)


class SkippedRequests:
    """Requests whose batches are not needed any more, in memory that all processes share.

    The number of a request is kept at a place that follows from it, so that a later one may overwrite it; the batch is
    then loaded and not used.

    Example: requests 5 and 1029 have the same place, 5. After `add(5)` and `add(1029)` only 1029 is skipped.

    Args:
        context: Multiprocessing context that starts the processes.
    """

    def __init__(self, context: BaseContext) -> None:
        self._numbers: Any = context.RawArray(ctypes.c_longlong, _SKIPPED_PLACES)

    def add(self, number: int) -> None:
        """Skip a request from now on; numbers begin with 1."""
        self._numbers[number % _SKIPPED_PLACES] = number

    def __contains__(self, number: int) -> bool:
        return bool(self._numbers[number % _SKIPPED_PLACES] == number)


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


def limit_process(progress: WorkerProgress, memory_bytes: int | None, seconds: float) -> WorkerCallback:
    """Set all limits of this process, which is then ready for its first request."""
    apply_process_limits(memory_bytes)
    callback = WorkerCallback(progress, seconds)
    progress.set_idle()
    return callback


def _limit_resource(resource_id: int, limit: int) -> None:
    _, hard_limit = resource.getrlimit(resource_id)
    limit = limit if hard_limit == resource.RLIM_INFINITY else min(limit, hard_limit)
    with suppress(OSError, ValueError):
        resource.setrlimit(resource_id, (limit, limit))
