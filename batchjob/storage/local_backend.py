"""Local disks, for reading: files, their size and tag, and a sorted walk of a folder."""

from __future__ import annotations

import errno
import heapq
import os
import stat
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import BinaryIO

from batchjob.errors import BatchjobError, NotFound, UnaddressableKey, Unavailable
from batchjob.storage.client_errors import check_etag, check_size
from batchjob.storage.objects import FolderFilter, ObjectData, ObjectInfo

__all__ = ["file_info", "file_version", "open_file", "read_file", "stat_file", "translate_read_errors", "walk"]

# Names of one folder that are held at a time: a folder of ten million costs more passes, but no more memory.
_MAX_NAMES = 500_000
_ABSENT = {errno.ENOENT, errno.ENOTDIR, errno.EISDIR, errno.ENXIO}
_UNNAMEABLE = {errno.ENAMETOOLONG, errno.EINVAL, errno.EILSEQ}
# Errors of a folder that waiting does not mend: permissions, and a path over 4,096 bytes.
_UNREADABLE = {errno.EACCES, errno.EPERM, errno.ENAMETOOLONG}


def read_file(path: str | os.PathLike[str], etag: str | None = None, limit: int | None = None) -> ObjectData:
    """Return all bytes of a regular file.

    Args:
        path: Path of the file.
        etag: Tag that the file must have; None accepts any.
        limit: Largest size in bytes; None accepts any.

    Raises:
        NotFound, UnaddressableKey, Unavailable: The file cannot be read.
        PreconditionFailed: The file has another tag.
        ObjectTooLarge: The file has more bytes than `limit`.
    """
    with open_file(path) as file:
        status = os.fstat(file.fileno())
        check_etag(etag, _file_etag(status), os.fspath(path))
        check_size(limit, status.st_size, os.fspath(path))
        with translate_read_errors(path):
            # Files of /proc say that they have no bytes, and may have any number of them.
            data = file.read(-1 if limit is None else limit + 1)
        if data is None:
            raise NotFound(f"{os.fspath(path)}: has nothing to read now; name a file")
        check_size(limit, len(data), os.fspath(path))
        return ObjectData(data, _file_etag(status), file_version(status))


def open_file(path: str | os.PathLike[str]) -> BinaryIO:
    """Open a regular file for reading. Raises NotFound, UnaddressableKey, Unavailable."""
    with translate_read_errors(path):
        # Without O_NONBLOCK, opening a named pipe would wait for a writer that never comes.
        descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK)
    try:
        if not stat.S_ISREG(os.fstat(descriptor).st_mode):
            raise NotFound(f"{os.fspath(path)}: not a regular file; name a file")
        return os.fdopen(descriptor, "rb")
    except BaseException:
        os.close(descriptor)
        raise


def stat_file(path: str | os.PathLike[str], uri: str) -> ObjectInfo:
    """Return size and tag of a regular file under the name `uri`. Raises NotFound, UnaddressableKey, Unavailable."""
    with translate_read_errors(path):
        status = Path(path).stat()
    if not stat.S_ISREG(status.st_mode):
        raise NotFound(f"{os.fspath(path)}: not a regular file; name a file")
    return file_info(uri, status)


def walk(
    root: str | os.PathLike[str],
    after: str | None = None,
    recursive: bool = True,
    folders: FolderFilter | None = None,
) -> Iterator[ObjectInfo]:
    """Yield the files below a folder, in the byte order of their names relative to it, after the name `after`.

    For example, a folder with `a-b`, `a/x` and `a.jpg` yields `a-b`, `a.jpg`, `a/x`, in the order of `-`, `.` and `/`.

    Links to files and folders are followed, but never into a folder that is being walked already. A link without a
    target is listed with size 0 and no tag, so that reading it reports the missing target. Pipes, sockets and devices
    are left out. A name that is not UTF-8 has surrogate escapes. A folder that does not exist is empty.

    Args:
        root: The folder.
        after: Name after which the walk begins.
        recursive: Walk the folders below too.
        folders: Filter of the folders to walk; it also decides on those that may not be read. None walks all.

    Raises:
        Unavailable: A folder cannot be read, and there is no filter to leave it out.
    """
    top, start = os.fsencode(root), os.fsencode(after or "")
    # One level for each folder being walked: its prefix, its remaining names, and the folders above it, for loops.
    levels = [(b"", _sorted_names(top, b"", start, folders), _with_folder(top, b"", frozenset(), folders))]
    while levels:
        prefix, names, ancestors = levels[-1]
        name = next(names, None)
        if name is None:
            levels.pop()
            continue
        key = prefix + name
        path = top + b"/" + key
        if not name.endswith(b"/"):
            try:
                found = _listed_file(path, os.fsdecode(key))
            except OSError as error:  # The names in the folder may be read, but not the files.
                _skip_unreadable(error, top + b"/" + prefix, prefix, folders)
                levels.pop()
                continue
            if found is not None:
                yield found
        elif recursive and (folders is None or folders.enters(os.fsdecode(key))):
            extended = _with_folder(path, key, ancestors, folders)
            if extended is not ancestors:
                levels.append((key, _sorted_names(path, key, start, folders), extended))


def file_info(name: str, status: os.stat_result) -> ObjectInfo:
    """Return size, tag and version of a file under a name."""
    return ObjectInfo(name, status.st_size, _file_etag(status), file_version(status))


def file_version(status: os.stat_result) -> str:
    """Return the version of a file: modification time, size and inode, so that a replaced file has another."""
    return f"{status.st_mtime_ns:x}-{status.st_size:x}-{status.st_ino:x}"


@contextmanager
def translate_read_errors(path: str | os.PathLike[str]) -> Iterator[None]:
    """Raise each error of reading a file as NotFound, UnaddressableKey or Unavailable."""
    try:
        yield
    except OSError as error:
        raise _translate_read_error(error, os.fspath(path)) from error
    except ValueError as error:  # A NUL or a lone surrogate in the name.
        raise UnaddressableKey(f"{os.fspath(path)!r}: no file can have this name") from error


def _translate_read_error(error: OSError, path: str) -> BatchjobError:
    if error.errno in _ABSENT:
        return NotFound(f"{path}: not there ({error.strerror})")
    if error.errno in _UNNAMEABLE:
        return UnaddressableKey(f"{path}: no file can have this name ({error.strerror})")
    return Unavailable(f"{path}: cannot be read ({error.strerror}); check disk and permissions, then run again")


def _file_etag(status: os.stat_result) -> str:
    # No inode: the tag stays the same in a copy that keeps modification times.
    return f"{status.st_mtime_ns:x}-{status.st_size:x}"


def _skip_unreadable(error: OSError, folder: bytes, key: bytes, folders: FolderFilter | None) -> None:
    """Let the filter decide on a folder that cannot be read; raise any other error. A folder that is gone is empty."""
    if error.errno in _ABSENT:
        return
    if folders is None or error.errno not in _UNREADABLE:
        raise _translate_read_error(error, os.fsdecode(folder)) from error
    folders.skip_unreadable(os.fsdecode(key), os.strerror(error.errno or 0))


def _sorted_names(folder: bytes, prefix: bytes, start: bytes, folders: FolderFilter | None) -> Iterator[bytes]:
    """Yield the names in a folder that may lead to keys after `start`, in byte order; those of folders end with `/`.

    For example, with prefix `a/` and start `a/m/x`, the names `m/` and `n.jpg` are yielded, but not `b.jpg`.
    """
    floor = start[len(prefix) :] if start.startswith(prefix) else b""
    last = b""
    while True:
        try:
            batch = _next_names(folder, floor, last)
        except OSError as error:
            _skip_unreadable(error, folder, prefix, folders)
            return
        yield from batch
        if len(batch) < _MAX_NAMES:
            return
        last = batch[-1]


def _next_names(folder: bytes, floor: bytes, last: bytes) -> list[bytes]:
    with os.scandir(folder) as found:
        names = (entry.name + b"/" if _is_folder(entry) else entry.name for entry in found)
        # A folder that sorts before the floor may contain it.
        remaining = (
            name for name in names if name > last and (name > floor or (name.endswith(b"/") and floor.startswith(name)))
        )
        return heapq.nsmallest(_MAX_NAMES, remaining)


def _is_folder(entry: os.DirEntry[bytes]) -> bool:
    try:
        return entry.is_dir()
    except OSError:  # A link to itself.
        return False


def _with_folder(
    folder: bytes, key: bytes, ancestors: frozenset[tuple[int, int]], folders: FolderFilter | None
) -> frozenset[tuple[int, int]]:
    """Return the folders above and this one; the same object if it is one of them already, gone, or left out."""
    try:
        status = os.stat(folder)  # noqa: PTH116 - bytes: not every name is text
    except OSError as error:
        _skip_unreadable(error, folder, key, folders)
        return ancestors
    identity = (status.st_dev, status.st_ino)
    return ancestors if identity in ancestors else ancestors | {identity}


def _listed_file(path: bytes, key: str) -> ObjectInfo | None:
    try:
        status = os.stat(path)  # noqa: PTH116 - bytes
    except OSError as error:
        if os.path.islink(path) or error.errno in _UNNAMEABLE:  # noqa: PTH114 - bytes
            return ObjectInfo(key, 0)
        if error.errno in _ABSENT:
            return None
        raise
    return file_info(key, status) if stat.S_ISREG(status.st_mode) else None
