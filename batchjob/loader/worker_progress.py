"""Progress of a loader process in memory shared with the worker: readable even after the process has died."""

from __future__ import annotations

import ctypes
import time
from dataclasses import dataclass
from multiprocessing.context import BaseContext
from typing import Any

__all__ = ["ProgressSnapshot", "WorkerProgress"]

_STARTING, _IDLE, _FETCHING, _IMAGE, _SENDING = range(5)


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
