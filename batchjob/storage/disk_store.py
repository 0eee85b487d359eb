"""Output on a disk, local or mounted on every machine: commits by hard link or renameat2, replacements under a lock."""

from __future__ import annotations

import ctypes
import errno
import fcntl
import os
import shutil
import time
import uuid
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path
from typing import BinaryIO

from batchjob.errors import (
    AlreadyExists,
    AttemptFailed,
    BatchjobError,
    InvalidJob,
    NotFound,
    PreconditionFailed,
    Unavailable,
)
from batchjob.storage.local_backend import (
    file_info,
    file_version,
    open_file,
    read_file,
    stat_file,
    translate_read_errors,
    walk,
)
from batchjob.storage.objects import ObjectData, ObjectInfo

__all__ = ["DiskStore"]

_CONTROL = "_batchjob/"
_TMP = f"{_CONTROL}tmp/"
_VANISHED_FOLDER_RETRIES = 3
_STALE_SECONDS = 24 * 3600  # age at which a temporary file belongs to a writer that died
_FULL = {errno.ENOSPC, errno.EDQUOT, errno.EFBIG}
_NOT_SUPPORTED = {errno.ENOTSUP, errno.EOPNOTSUPP, errno.ENOSYS, errno.EINVAL}
_UNWRITABLE = {
    *(errno.EACCES, errno.EPERM, errno.EROFS, errno.ENOTDIR, errno.EISDIR, errno.ELOOP, errno.ENAMETOOLONG),
    *_NOT_SUPPORTED,
}
# Answers to a hard link on file systems that have none. FUSE and the shared folders of Docker Desktop answer EIO, too.
_NO_HARD_LINKS = {*_NOT_SUPPORTED, errno.EPERM, errno.EACCES, errno.EXDEV, errno.EMLINK, errno.EIO}
_NO_LOCKS = {*_NOT_SUPPORTED, errno.ENOLCK, errno.EIO}
_AT_FDCWD, _RENAME_NOREPLACE = -100, 1


class DiskStore:
    """A folder as output. See `Store`.

    An object is created by a hard link to a synced temporary file, or without hard links (vfat, many FUSE file systems)
    by a rename that replaces nothing. It is replaced by a rename under `flock`. So readers see whole objects only, and
    of two writers one wins, also across processes.

    Args:
        root: Folder of the output.
    """

    def __init__(self, root: Path) -> None:
        self.uri = str(root)
        self._root = root
        self._swept = self._made_root = False

    def read(self, key: str) -> ObjectData:
        return read_file(self._root / key)

    def read_tail(self, key: str, size: int) -> bytes:
        with open_file(self._root / key) as file, translate_read_errors(self._root / key):
            file.seek(max(0, os.fstat(file.fileno()).st_size - size))
            return file.read(size)

    def read_head(self, key: str, size: int) -> bytes:
        with open_file(self._root / key) as file, translate_read_errors(self._root / key):
            return file.read(size)

    def open(self, key: str) -> BinaryIO:
        return open_file(self._root / key)

    def stat(self, key: str) -> ObjectInfo:
        return stat_file(self._root / key, key)

    def list(self, prefix: str) -> Iterator[ObjectInfo]:
        """Yield the objects whose keys start with `prefix`, in key order; temporary files are left out."""
        folder = prefix[: prefix.rfind("/") + 1]
        for found in walk(self._root / folder):
            key = folder + found.uri
            if key.startswith(prefix) and not key.startswith(_TMP):
                yield ObjectInfo(key, found.size, found.etag, found.version)

    def put_if_absent(self, key: str, body: bytes | Path) -> ObjectInfo:
        """Create an object. Raises AlreadyExists; InvalidJob on a read-only disk, AttemptFailed on a full one."""
        target = self._root / key
        with self._translate_write_errors(key):
            # Saves the copy of a part. Small objects show what the file system does: the probe of an output is one.
            if isinstance(body, Path) and os.path.lexists(target):
                raise AlreadyExists(f"{target}: already there")
            for last_try in (False,) * _VANISHED_FOLDER_RETRIES + (True,):
                try:
                    return self._create(key, body)
                except FileExistsError as error:
                    raise AlreadyExists(f"{target}: already there") from error
                except FileNotFoundError:  # another process has removed an empty folder meanwhile
                    if last_try:
                        raise
        raise AssertionError("not reached")

    def replace_if_match(self, key: str, body: bytes | Path, version: str) -> ObjectInfo:
        """Replace an object. Raises PreconditionFailed if it is absent or has another version; else as for a create."""
        target = self._root / key
        with self._translate_write_errors(key), self._temporary_file(body) as temporary, self._locked():
            try:
                # Opened, not only looked up: a network file system answers a bare stat from its cache.
                with open_file(target) as current:
                    before = os.fstat(current.fileno())
            except NotFound as error:
                raise PreconditionFailed(f"{target}: no longer there") from error
            if file_version(before) != version:
                raise PreconditionFailed(f"{target}: replaced by another writer")
            # A modification time that only grows keeps versions apart that are written within one tick of the clock.
            modified = max(time.time_ns(), before.st_mtime_ns + 1)
            os.utime(temporary, ns=(modified, modified))
            temporary.replace(target)
            _sync_folder(target.parent)
            return file_info(key, target.stat())

    def delete(self, key: str) -> None:
        target = self._root / key
        if os.path.lexists(target):
            with self._translate_write_errors(key), self._locked(), suppress(FileNotFoundError):
                target.unlink()
                self._remove_empty_folders(target.parent)

    def delete_if_match(self, key: str, version: str) -> None:
        target = self._root / key
        if os.path.lexists(target):
            with self._translate_write_errors(key), self._locked(), suppress(NotFound):
                if stat_file(target, key).version != version:
                    raise PreconditionFailed(f"{target}: replaced by another writer")
                target.unlink()
                self._remove_empty_folders(target.parent)

    def _create(self, key: str, body: bytes | Path) -> ObjectInfo:
        """Create an object. Raises OSError."""
        target = self._root / key
        with self._temporary_file(body) as temporary:
            self._make_folder(target.parent)
            status = temporary.stat()
            _move_to_free_name(temporary, target)
        _sync_folder(target.parent)
        return file_info(key, status)

    @contextmanager
    def _temporary_file(self, body: bytes | Path) -> Iterator[Path]:
        """Give a synced file with these bytes, on the disk of the output; it is deleted afterwards."""
        folder = self._root / _TMP
        self._make_folder(folder)
        self._delete_stale_files(folder)
        path = folder / uuid.uuid4().hex
        try:
            with path.open("xb") as file:
                if isinstance(body, Path):
                    with body.open("rb") as source:
                        shutil.copyfileobj(source, file, 1 << 20)
                else:
                    file.write(body)
                file.flush()
                # The kernel's own time stamp is only as fine as its tick.
                now = time.time_ns()
                os.utime(file.fileno(), ns=(now, now))
                os.fsync(file.fileno())
            yield path
        finally:
            with suppress(FileNotFoundError):
                path.unlink()

    @contextmanager
    def _locked(self) -> Iterator[None]:
        while (file := self._open_lock()) is None:
            pass
        with file:
            yield

    def _open_lock(self) -> BinaryIO | None:
        """Open and lock the lock file; return None if another process has removed it meanwhile."""
        folder = self._root / _TMP
        self._make_folder(folder)
        with ExitStack() as resources, suppress(FileNotFoundError):
            file = resources.enter_context((folder / "lock").open("ab"))
            try:
                fcntl.flock(file, fcntl.LOCK_EX)
            except OSError as error:
                if error.errno not in _NO_LOCKS:
                    raise
                raise InvalidJob(
                    f"{folder}: this file system has no locks ({error.strerror}), which replacing an object safely "
                    "needs; choose an output on another disk or on s3://"
                ) from error
            if os.path.samestat(os.fstat(file.fileno()), (folder / "lock").stat()):
                resources.pop_all()
                return file
        return None

    @contextmanager
    def _translate_write_errors(self, key: str) -> Iterator[None]:
        try:
            yield
        except OSError as error:
            raise _translate_write_error(error, f"{self._root}/{key}") from error

    def _make_folder(self, folder: Path) -> None:
        """Create a folder and its parents; each entry is synced before anything is written into it."""
        if folder.is_dir():
            return
        self._make_folder(folder.parent)
        try:
            with suppress(FileExistsError):
                folder.mkdir()
                self._made_root |= folder == self._root
        except FileNotFoundError as error:
            if not folder.parent.is_dir():  # removed meanwhile, since it was empty
                raise
            # Below a folder that exists: a file system such as /proc.
            raise InvalidJob(f"{folder}: no folder can be made there; choose another output") from error
        _sync_folder(folder.parent)

    def _remove_empty_folders(self, folder: Path) -> None:
        """Remove a folder of control files and its parents while they are empty; needs the lock.

        If nothing is left but the lock, that goes too, and the output's folder if this object has made it.
        """
        control, temporary = self._root / _CONTROL, self._root / _TMP
        with suppress(OSError):  # a folder that is not empty ends it
            while control in folder.parents:
                folder.rmdir()
                folder = folder.parent
            if folder != control or list(control.iterdir()) != [temporary]:
                return
            if [path.name for path in temporary.iterdir()] == ["lock"]:
                (temporary / "lock").unlink()
                temporary.rmdir()
                control.rmdir()
                if self._made_root:
                    self._root.rmdir()

    def _delete_stale_files(self, folder: Path) -> None:
        """Delete what writers that died have left, once per process."""
        if self._swept:
            return
        self._swept = True
        for path in folder.iterdir():
            with suppress(OSError):
                if path.name != "lock" and time.time() - path.stat().st_mtime > _STALE_SECONDS:
                    path.unlink()


def _translate_write_error(error: OSError, path: str) -> BatchjobError:
    if error.errno in _FULL:
        return AttemptFailed(f"{path}: the disk is full ({error.strerror}); make room, then run again")
    if error.errno in _UNWRITABLE:
        return InvalidJob(f"{path}: cannot be written ({error.strerror}); choose an output folder that can")
    return Unavailable(f"{path}: the disk failed ({error.strerror}); check it, then run again")


def _move_to_free_name(temporary: Path, target: Path) -> None:
    """Give a file a name that no other file has; its old name may stay.

    Raises:
        FileExistsError: There is a file of this name.
        InvalidJob: The file system has neither hard links nor a rename that replaces nothing.
    """
    try:
        os.link(temporary, target)
    except FileExistsError:
        raise
    except OSError as no_link:
        if no_link.errno not in _NO_HARD_LINKS:
            raise
        try:
            _rename_to_free_name(temporary, target)
        except FileExistsError:
            raise
        except OSError as error:
            if error.errno in {*_FULL, errno.EACCES, errno.EROFS}:
                raise
            raise InvalidJob(
                f"{target}: this file system has neither hard links ({no_link.strerror}) nor a rename that replaces "
                f"nothing ({error.strerror}), one of which a safe commit needs; choose an output on another disk or on "
                "s3://"
            ) from no_link


def _rename_to_free_name(source: Path, target: Path) -> None:
    """Rename a file by renameat2(RENAME_NOREPLACE). Raises OSError."""
    # Python has no function for it, and glibc has one since 2.28.
    renameat2 = getattr(ctypes.CDLL(None, use_errno=True), "renameat2", None)
    if renameat2 is None:
        raise OSError(errno.ENOSYS, os.strerror(errno.ENOSYS))
    names = ctypes.c_char_p(os.fsencode(source)), ctypes.c_char_p(os.fsencode(target))
    if renameat2(_AT_FDCWD, names[0], _AT_FDCWD, names[1], ctypes.c_uint(_RENAME_NOREPLACE)):
        code = ctypes.get_errno()
        raise OSError(code, os.strerror(code), os.fspath(target))


def _sync_folder(folder: Path) -> None:
    descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
    try:
        # Some network file systems cannot sync a folder, and need not.
        with suppress(OSError):
            os.fsync(descriptor)
    finally:
        os.close(descriptor)
