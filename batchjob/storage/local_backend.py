"""Local disks: reading, a sorted walk, and an output store whose commit is a hard link."""

from __future__ import annotations

import errno
import fcntl
import heapq
import os
import shutil
import stat
import time
import uuid
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import BinaryIO

from batchjob.errors import (
    AlreadyExists,
    AttemptFailed,
    BatchjobError,
    InvalidJob,
    NotFound,
    ObjectTooLarge,
    PreconditionFailed,
    UnaddressableKey,
    Unavailable,
)
from batchjob.storage.objects import ObjectData, ObjectInfo

__all__ = ["DiskStore", "open_file", "read_file", "stat_file", "walk"]

_TMP = "_batchjob/tmp/"
_STALE = 24 * 3600  # seconds after which a temporary file belongs to a writer that died
_NAMES = 500_000  # names of one folder held at a time: a folder of ten million costs more passes, not more memory
_ABSENT = {errno.ENOENT, errno.ENOTDIR, errno.EISDIR, errno.ENXIO}
_UNNAMEABLE = {errno.ENAMETOOLONG, errno.EINVAL, errno.EILSEQ}
_FULL = {errno.ENOSPC, errno.EDQUOT, errno.EFBIG}
_UNWRITABLE = {errno.EACCES, errno.EPERM, errno.EROFS, errno.ENOTDIR, errno.EISDIR, errno.ELOOP, errno.ENAMETOOLONG}
_NO_LINKS = {errno.EPERM, errno.ENOTSUP, errno.EOPNOTSUPP, errno.ENOSYS, errno.EXDEV, errno.EMLINK}


def read_file(path: str | os.PathLike[str], etag: str | None = None, limit: int | None = None) -> ObjectData:
    """All bytes of a regular file.

    Raises:
        NotFound, Unaddressable, Unavailable; Changed where `etag` is given and the file has another; TooLarge where it
        has more bytes than `limit`.
    """
    with open_file(path) as file:
        found = os.fstat(file.fileno())
        if etag is not None and etag != _etag(found):
            said = f"{os.fspath(path)}: changed since the plan was made ({etag}, now {_etag(found)})"
            raise PreconditionFailed(f"{said}; run the job on a new output to plan it anew")
        if limit is not None and found.st_size > limit:
            raise ObjectTooLarge(os.fspath(path), found.st_size, limit)
        with _reading(path):
            return ObjectData(file.read(), _etag(found), _version(found))


def open_file(path: str | os.PathLike[str]) -> BinaryIO:
    """A regular file, open for reading. Raises NotFound, Unaddressable, Unavailable."""
    with _reading(path):
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
    """Size and tag of a regular file, under the name `uri`. Raises NotFound, Unaddressable, Unavailable."""
    with _reading(path):
        found = Path(path).stat()
    if not stat.S_ISREG(found.st_mode):
        raise NotFound(f"{os.fspath(path)}: not a regular file; name a file")
    return _stat(uri, found)


def walk(root: str | os.PathLike[str], after: str | None = None, recursive: bool = True) -> Iterator[ObjectInfo]:
    """Files below a folder, named relative to it with `/`, in the byte order of these names, strictly after `after`.

    Links to files and folders are followed, but never into a folder that is being walked already. A link to nothing
    is listed (size 0, no tag): whoever reads it learns that its target is gone. Pipes, sockets and devices are left
    out. A name that is not UTF-8 comes with surrogate escapes. A folder that is not there holds nothing.
    """
    top, start = os.fsencode(root), os.fsencode(after or "")
    # One level per folder being walked: its prefix, the rest of its entries, and the folders above (for loops).
    levels = [(b"", _entries(top, b"", start), _identity(top, frozenset()))]
    while levels:
        prefix, entries, above = levels[-1]
        name = next(entries, None)
        if name is None:
            levels.pop()
            continue
        key = prefix + name
        if not name.endswith(b"/"):
            found = _file(top + b"/" + key, os.fsdecode(key))
            if found is not None:
                yield found
        elif recursive:
            within = _identity(top + b"/" + key, above)
            if within is not above:
                levels.append((key, _entries(top + b"/" + key, key, start), within))


class DiskStore:
    """An output on a local disk (or one mounted on every machine).

    Creation is a hard link to a synced temporary file, replacement a rename under `flock`: readers see whole
    objects only, and of two writers one wins, also across processes.
    """

    def __init__(self, root: Path) -> None:
        self.uri = str(root)
        self._root = root
        self._swept = False

    def read(self, key: str) -> ObjectData:
        """Raises NotFound, Unavailable."""
        return read_file(self._root / key)

    def read_tail(self, key: str, size: int) -> bytes:
        """The last `size` bytes, or all. Raises NotFound, Unavailable."""
        with open_file(self._root / key) as file, _reading(self._root / key):
            file.seek(max(0, os.fstat(file.fileno()).st_size - size))
            return file.read(size)

    def read_head(self, key: str, size: int) -> bytes:
        """The first `size` bytes, or all. Raises NotFound, Unavailable."""
        with open_file(self._root / key) as file, _reading(self._root / key):
            return file.read(size)

    def open(self, key: str) -> BinaryIO:
        """The object as a seekable file. Raises NotFound, Unavailable."""
        return open_file(self._root / key)

    def stat(self, key: str) -> ObjectInfo:
        """Raises NotFound, Unavailable."""
        return stat_file(self._root / key, key)

    def list(self, prefix: str) -> Iterator[ObjectInfo]:
        """Objects whose key starts with `prefix`, in key order. Temporary files are no objects."""
        folder = prefix[: prefix.rfind("/") + 1]
        for found in walk(self._root / folder):
            key = folder + found.uri
            if key.startswith(prefix) and not key.startswith(_TMP):
                yield ObjectInfo(key, found.size, found.etag, found.version)

    def put_if_absent(self, key: str, body: bytes | Path) -> ObjectInfo:
        """Raises AlreadyExists; InvalidJob where the disk cannot be written, AttemptFailed where it is full."""
        target = self._root / key
        with self._writing(key):
            if os.path.lexists(target):
                raise AlreadyExists(f"{target}: already there")
            with self._temporary(body) as temporary:
                self._make_folder(target.parent)
                try:
                    os.link(temporary, target)
                except FileExistsError as error:
                    raise AlreadyExists(f"{target}: already there") from error
                except OSError as error:
                    raise _no_links(error, target) if error.errno in _NO_LINKS else error from error
                found = temporary.stat()
            _sync_folder(target.parent)
        return _stat(key, found)

    def replace_if_match(self, key: str, body: bytes | Path, version: str) -> ObjectInfo:
        """Raises Changed where the object is absent or of another version; else as `put_if_absent`."""
        target = self._root / key
        with self._writing(key), self._temporary(body) as temporary, self._locked():
            try:
                # Opened, not only looked up: a network file system answers a bare stat from its cache.
                with open_file(target) as current:
                    before = os.fstat(current.fileno())
            except NotFound as error:
                raise PreconditionFailed(f"{target}: no longer there") from error
            if _version(before) != version:
                raise PreconditionFailed(f"{target}: replaced by another writer")
            # A time that only grows keeps two versions apart that were written within one tick of the clock.
            modified = max(time.time_ns(), before.st_mtime_ns + 1)
            os.utime(temporary, ns=(modified, modified))
            temporary.replace(target)
            _sync_folder(target.parent)
            return _stat(key, target.stat())

    def delete(self, key: str) -> None:
        """Absent is fine."""
        target = self._root / key
        if os.path.lexists(target):
            with self._writing(key), self._locked(), suppress(FileNotFoundError):
                target.unlink()

    def delete_if_match(self, key: str, version: str) -> None:
        """Absent is fine. Raises Changed where the object is of another version."""
        target = self._root / key
        if os.path.lexists(target):
            with self._writing(key), self._locked(), suppress(NotFound):
                if stat_file(target, key).version != version:
                    raise PreconditionFailed(f"{target}: replaced by another writer")
                target.unlink()

    @contextmanager
    def _temporary(self, body: bytes | Path) -> Iterator[Path]:
        """A synced file with these bytes, on the disk of the output; gone afterwards."""
        folder = self._root / _TMP
        self._make_folder(folder)
        self._sweep(folder)
        path = folder / uuid.uuid4().hex
        try:
            with path.open("xb") as file:
                if isinstance(body, Path):
                    with body.open("rb") as source:
                        shutil.copyfileobj(source, file, 1 << 20)
                else:
                    file.write(body)
                file.flush()
                now = time.time_ns()
                os.utime(file.fileno(), ns=(now, now))  # the kernel's own stamp is only as fine as its tick
                os.fsync(file.fileno())
            yield path
        finally:
            with suppress(FileNotFoundError):
                path.unlink()

    @contextmanager
    def _locked(self) -> Iterator[None]:
        folder = self._root / _TMP
        self._make_folder(folder)
        with (folder / "lock").open("ab") as file:
            fcntl.flock(file, fcntl.LOCK_EX)
            yield

    @contextmanager
    def _writing(self, key: str) -> Iterator[None]:
        try:
            yield
        except OSError as error:
            raise _write_fault(error, f"{self._root}/{key}") from error

    def _make_folder(self, folder: Path) -> None:
        """Make a folder and those above it, each entry on the disk before anything is put inside."""
        if folder.is_dir():
            return
        self._make_folder(folder.parent)
        try:
            with suppress(FileExistsError):
                folder.mkdir()
        except FileNotFoundError as error:  # below a folder that is there: a file system that has none of ours
            raise InvalidJob(f"{folder}: no folder can be made there; choose another output") from error
        _sync_folder(folder.parent)

    def _sweep(self, folder: Path) -> None:
        """Once per process: remove what writers that died left behind."""
        if self._swept:
            return
        self._swept = True
        for path in folder.iterdir():
            with suppress(OSError):
                if path.name != "lock" and time.time() - path.stat().st_mtime > _STALE:
                    path.unlink()


def _entries(folder: bytes, prefix: bytes, start: bytes) -> Iterator[bytes]:
    """Names in a folder, in order, folders ending in `/`; of the keys `prefix` + name, what may come after `start`."""
    floor = start[len(prefix) :] if start.startswith(prefix) else b""
    last = b""
    while True:
        batch = _next_names(folder, floor, last)
        yield from batch
        if len(batch) < _NAMES:
            return
        last = batch[-1]


def _next_names(folder: bytes, floor: bytes, last: bytes) -> list[bytes]:
    with suppress(NotFound), _reading(os.fsdecode(folder)), os.scandir(folder) as found:
        names = (entry.name + b"/" if _is_folder(entry) else entry.name for entry in found)
        wanted = (name for name in names if name > last and (name > floor or _holds(name, floor)))
        return heapq.nsmallest(_NAMES, wanted)
    return []


def _holds(name: bytes, floor: bytes) -> bool:
    return name.endswith(b"/") and floor.startswith(name)


def _is_folder(entry: os.DirEntry[bytes]) -> bool:
    try:
        return entry.is_dir()
    except OSError:  # a link to itself
        return False


def _identity(folder: bytes, above: frozenset[tuple[int, int]]) -> frozenset[tuple[int, int]]:
    """`above` and this folder; `above` itself where the folder is one of them, or gone."""
    try:
        found = os.stat(folder)  # noqa: PTH116 - bytes: not every name is text
    except (FileNotFoundError, NotADirectoryError):
        return above
    here = (found.st_dev, found.st_ino)
    return above if here in above else above | {here}


def _file(path: bytes, key: str) -> ObjectInfo | None:
    try:
        found = os.stat(path)  # noqa: PTH116 - bytes
    except OSError:
        return ObjectInfo(key, 0) if os.path.islink(path) else None  # noqa: PTH114 - bytes
    return _stat(key, found) if stat.S_ISREG(found.st_mode) else None


def _stat(name: str, found: os.stat_result) -> ObjectInfo:
    return ObjectInfo(name, found.st_size, _etag(found), _version(found))


def _etag(found: os.stat_result) -> str:
    """Survives a copy that keeps times: so no inode in it."""
    return f"{found.st_mtime_ns:x}-{found.st_size:x}"


def _version(found: os.stat_result) -> str:
    return f"{found.st_mtime_ns:x}-{found.st_size:x}-{found.st_ino:x}"


@contextmanager
def _reading(path: str | os.PathLike[str]) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise _read_fault(error, os.fspath(path)) from error
    except ValueError as error:  # a NUL, or a lone surrogate
        raise UnaddressableKey(f"{os.fspath(path)!r}: no file can have this name") from error


def _read_fault(error: OSError, path: str) -> BatchjobError:
    if error.errno in _ABSENT:
        return NotFound(f"{path}: not there ({error.strerror})")
    if error.errno in _UNNAMEABLE:
        return UnaddressableKey(f"{path}: no file can have this name ({error.strerror})")
    return Unavailable(f"{path}: cannot be read ({error.strerror}); check disk and permissions, then run again")


def _write_fault(error: OSError, path: str) -> BatchjobError:
    if error.errno in _FULL:
        return AttemptFailed(f"{path}: the disk is full ({error.strerror}); make room, then run again")
    if error.errno in _UNWRITABLE:
        return InvalidJob(f"{path}: cannot be written ({error.strerror}); choose an output folder that can")
    return Unavailable(f"{path}: the disk failed ({error.strerror}); check it, then run again")


def _no_links(error: OSError, target: Path) -> InvalidJob:
    return InvalidJob(
        f"{target}: this file system has no hard links ({error.strerror}), which a safe commit needs; "
        "choose an output on another disk or on s3://"
    )


def _sync_folder(folder: Path) -> None:
    descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
    try:
        with suppress(OSError):  # some network file systems cannot sync a folder, and need not
            os.fsync(descriptor)
    finally:
        os.close(descriptor)
