"""The local folder for parts in the making; what killed processes left of theirs is swept."""

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
_MARK = "held"
_YOUNG_SECONDS = 60.0  # between making a folder and locking its mark lies a moment in which it looks abandoned
_FULL = {errno.ENOSPC, errno.EDQUOT, errno.EFBIG}


class ScratchFolder:
    """A folder in the system's temporary one, held for as long as this process lives or until it is closed.

    The hold is a lock on a file in it, which the kernel lets go with the process: it says more than a process id, which
    another container that shares the disk knows under another number, and which comes again.

    Attributes:
        path: of the folder.

    Raises:
        InvalidJob: no folder can be made there; Temporary where the disk is full.
    """

    def __init__(self) -> None:
        _sweep(Path(tempfile.gettempdir()))
        try:
            self.path = Path(tempfile.mkdtemp(prefix=_PREFIX))
            self._mark: int | None = os.open(self.path / _MARK, os.O_CREAT | os.O_EXCL | os.O_RDWR, 0o600)
        except OSError as error:
            raise _refused(error) from error
        with suppress(OSError):  # a disk that knows no locks: nothing on it is ever swept
            fcntl.flock(self._mark, fcntl.LOCK_EX | fcntl.LOCK_NB)

    def close(self) -> None:
        """Remove the folder and all in it. Again is fine."""
        shutil.rmtree(self.path, ignore_errors=True)
        mark, self._mark = self._mark, None
        if mark is not None:
            os.close(mark)


def as_disk_full_error(error: Exception, folder: Path) -> AttemptFailed | None:
    """What a part in the making failed of where that is for want of room in this folder, else None."""
    if not isinstance(error, OSError) or error.errno not in _FULL:
        return None
    return AttemptFailed(
        f"{folder}: the disk is full ({os.strerror(error.errno)}), so no part can be made there; make room, set TMPDIR "
        "to a folder on another disk, or lower runtime.shard_size, then run again"
    )


def _sweep(folder: Path) -> None:
    """Remove the folders of this user's processes that are gone."""
    for path in folder.glob(f"{_PREFIX}*"):
        with suppress(OSError):
            if path.lstat().st_uid == os.getuid() and time.time() - (path / _MARK).lstat().st_mtime > _YOUNG_SECONDS:
                _remove_abandoned(path)


def _remove_abandoned(path: Path) -> None:
    """Raises BlockingIOError where its process still lives."""
    with (path / _MARK).open("r+b") as mark:
        fcntl.flock(mark, fcntl.LOCK_EX | fcntl.LOCK_NB)
        shutil.rmtree(path)


def _refused(error: OSError) -> InvalidJob | Temporary:
    where = tempfile.gettempdir()
    if error.errno in _FULL:
        return Temporary(f"{where}: the disk is full ({error.strerror}); make room or set TMPDIR, then run again")
    return InvalidJob(f"{where}: cannot be written ({error.strerror}); set TMPDIR to a folder for parts in the making")
