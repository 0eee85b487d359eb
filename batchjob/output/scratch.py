"""Scratch folder on the local disk for parts in progress; folders of killed processes are deleted."""

from __future__ import annotations

import errno
import fcntl
import os
import shutil
import tempfile
import time
from contextlib import suppress
from pathlib import Path

from batchjob.errors import AttemptFailed, InvalidJob, Temporary

__all__ = ["ScratchFolder", "as_disk_full_error"]

_PREFIX = "batchjob-"
_LOCK_FILE = "held"
# Between the creation of a folder and the lock in it, the folder looks abandoned for a moment.
_MIN_AGE_SECONDS = 60.0
_DISK_FULL = {errno.ENOSPC, errno.EDQUOT, errno.EFBIG}


class ScratchFolder:
    """A folder in the system's temporary folder, locked until it is closed or this process ends.

    The lock is on a file in the folder, and the kernel releases it with the process. A process id would say less:
    another container that shares the disk sees other ids, and ids are used again.

    Attributes:
        path: Path of the folder.

    Raises:
        InvalidJob: No folder can be created there.
        Temporary: The disk is full.
    """

    def __init__(self) -> None:
        try:
            parent = tempfile.gettempdir()
        except FileNotFoundError as error:  # Python has tried TMPDIR, /tmp and others.
            raise InvalidJob(
                "no temporary folder can be written; set TMPDIR to one with room, and write access"
            ) from error
        _delete_abandoned_folders(Path(parent))
        try:
            self.path = Path(tempfile.mkdtemp(prefix=_PREFIX))
            self._lock: int | None = os.open(self.path / _LOCK_FILE, os.O_CREAT | os.O_EXCL | os.O_RDWR, 0o600)
        except OSError as error:
            raise _creation_error(error) from error
        with suppress(OSError):  # a file system without locks: nothing on it is ever deleted
            fcntl.flock(self._lock, fcntl.LOCK_EX | fcntl.LOCK_NB)

    def close(self) -> None:
        """Delete the folder with all files in it. May be called again."""
        shutil.rmtree(self.path, ignore_errors=True)
        lock, self._lock = self._lock, None
        if lock is not None:
            os.close(lock)


def as_disk_full_error(error: Exception, folder: Path) -> AttemptFailed | None:
    """Convert an error of writing to a folder whose disk is full.

    Returns:
        The exception that fails the attempt; None for any other error.
    """
    if not isinstance(error, OSError) or error.errno not in _DISK_FULL:
        return None
    return AttemptFailed(
        f"{folder}: the disk is full ({os.strerror(error.errno)}), so no part can be made there; make room, set TMPDIR "
        "to a folder on another disk, or lower runtime.shard_size, then run again"
    )


def _delete_abandoned_folders(parent: Path) -> None:
    """Delete scratch folders of this user whose processes have ended."""
    for folder in parent.glob(f"{_PREFIX}*"):
        with suppress(OSError):
            age = time.time() - (folder / _LOCK_FILE).lstat().st_mtime
            if folder.lstat().st_uid == os.getuid() and age > _MIN_AGE_SECONDS:
                _delete_unless_locked(folder)


def _delete_unless_locked(folder: Path) -> None:
    """Delete a folder. Raises BlockingIOError if a process still holds its lock."""
    with (folder / _LOCK_FILE).open("r+b") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        shutil.rmtree(folder)


def _creation_error(error: OSError) -> InvalidJob | Temporary:
    parent = tempfile.gettempdir()
    if error.errno in _DISK_FULL:
        return Temporary(f"{parent}: the disk is full ({error.strerror}); make room or set TMPDIR, then run again")
    return InvalidJob(f"{parent}: cannot be written ({error.strerror}); set TMPDIR to a folder for parts in the making")
