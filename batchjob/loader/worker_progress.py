"""What a loader process is at, in memory that it shares with the worker: readable after it has died."""

from __future__ import annotations

import ctypes
import time
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from multiprocessing.context import BaseContext

__all__ = ["ProgressSnapshot", "WorkerProgress"]

_STARTING, _WAITING, _FETCHING, _IMAGE, _SENDING = range(5)


class _ProgressRecord(ctypes.Structure):
    _fields_ = (
        ("task", ctypes.c_longlong),
        ("stage", ctypes.c_int),
        ("row", ctypes.c_int),
        ("beats", ctypes.c_longlong),
        ("since", ctypes.c_double),
        ("etag", ctypes.c_char * 256),
    )


@dataclass(frozen=True)
class ProgressSnapshot:
    """Where a process was: the number of its task, and the row whose image it was decoding or transforming, if any."""

    request_number: int
    row: int | None
    etag: str | None


class WorkerProgress:
    """Written in the loader process, read in the worker. Travels only to a process that is being started.

    Args:
        context: the one that the process is started by.
    """

    def __init__(self, context: BaseContext) -> None:
        self._cell: Any = context.RawValue(_ProgressRecord)

    # -- in the loader process ---------------------------------------------------------------------------------

    def set_idle(self) -> None:
        """Started, or through with a task."""
        self._cell.stage = _WAITING

    def start_request(self, task: int) -> None:
        """A task; no image is in work yet."""
        self._cell.task = task
        self._cell.stage = _FETCHING

    def set_fetching(self) -> None:
        """No image is in work: this may take as long as storage is given to answer. Again as each object arrives."""
        self._cell.stage = _FETCHING
        self._cell.beats += 1

    def set_image(self, row: int, etag: str | None) -> None:
        """The image of this row is in work from now on."""
        cell = self._cell
        cell.stage = _FETCHING  # so that nobody reads the new row with the old time
        cell.row, cell.etag, cell.since = row, (etag or "").encode()[:255], time.monotonic()
        cell.stage = _IMAGE

    def set_sending(self) -> None:
        """All images are through: the batch is put together and sent."""
        self._cell.since = time.monotonic()
        self._cell.stage = _SENDING

    # -- in the worker -----------------------------------------------------------------------------------------

    @property
    def started(self) -> bool:
        """Whether the process has come to wait for its first task."""
        return bool(self._cell.stage != _STARTING)

    @property
    def version(self) -> tuple[float, ...]:
        """Another one whenever the process has come a step further."""
        cell = self._cell
        return cell.task, cell.stage, cell.row, cell.since, cell.beats

    @property
    def snapshot(self) -> ProgressSnapshot | None:
        """Where the process is, or was when it died; None between tasks."""
        cell = self._cell
        if cell.stage in {_STARTING, _WAITING}:
            return None
        if cell.stage != _IMAGE:
            return ProgressSnapshot(cell.task, None, None)
        return ProgressSnapshot(cell.task, cell.row, cell.etag.decode(errors="replace") or None)

    def is_overdue(self, seconds: float) -> bool:
        """Whether one image, or the sending of a batch, takes longer than this."""
        cell = self._cell  # stage before time: an image begun in between is not blamed for the one before
        return bool(cell.stage in {_IMAGE, _SENDING} and time.monotonic() - cell.since > seconds)
