"""Reading any URI."""

from __future__ import annotations

import io
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from threading import Lock
from typing import Any, BinaryIO

from batchjob import disk
from batchjob.errors import StorageError, Unavailable
from batchjob.records import Blob, Stat
from batchjob.settings import is_local
from batchjob.storage.bucket import bucket_of
from batchjob.storage.filesystem import Filesystem
from batchjob.storage.options import Options, StorageOptions, options_for, patience_or_default
from batchjob.storage.place import CLOUDS, THREADS, Place

__all__ = ["Reader", "ranged"]

_READ_AHEAD = 1 << 20  # bytes fetched at least, of an object opened as a file


class Reader:
    """Reads any URI. Thread-safe and picklable: clients are made where and when they are needed (never across a fork).

    Args:
        options: see `Options`.
        patience: seconds that transient faults are retried.
    """

    def __init__(self, options: Options | None = None, patience: float | None = None) -> None:
        self._options = dict(options or {})
        self._patience = patience_or_default(patience)
        self._reset()

    def _reset(self) -> None:
        self._places: dict[tuple[str, float], Place] = {}
        self._pool: ThreadPoolExecutor | None = None
        self._lock = Lock()

    def __getstate__(self) -> tuple[dict[str, StorageOptions], float]:
        return self._options, self._patience

    def __setstate__(self, state: tuple[dict[str, StorageOptions], float]) -> None:
        self._options, self._patience = state
        self._reset()

    def read(self, uri: str, etag: str | None = None) -> Blob:
        """All bytes of an object.

        Raises:
            NotFound, Unaddressable, Unavailable; Changed where `etag` is given and the object has another.
        """
        return self._read(uri, etag, self._patience)

    def read_many(self, uris: Sequence[str], stubborn: bool = False) -> list[Blob | StorageError | Unavailable]:
        """As many answers as URIs, in order: bytes, or what went wrong with this one. Concurrent where remote.

        Args:
            stubborn: ask for each as long as patience lasts. Otherwise, once one has waited in vain, the others are
                asked once: a dead network costs one window, not one per image.
        """
        answers: list[Blob | StorageError | Unavailable | None] = [
            self._try(uri, self._patience) if is_local(uri) else None for uri in uris
        ]
        remote = [index for index, answer in enumerate(answers) if answer is None]
        trouble = False

        def fetch(index: int) -> Blob | StorageError | Unavailable:
            nonlocal trouble
            answer = self._try(uris[index], 0.0 if trouble and not stubborn else self._patience)
            trouble = trouble or isinstance(answer, Unavailable)
            return answer

        for index, answer in zip(remote, self._threads().map(fetch, remote) if remote else (), strict=True):
            answers[index] = answer
        return [answer for answer in answers if answer is not None]

    def stat(self, uri: str) -> Stat:
        """Size and tag, without the bytes. Raises NotFound, Unaddressable, Unavailable."""
        if is_local(uri):
            return disk.stat_file(_path(uri), uri)
        place, base, key = self._find(uri, self._patience)
        return _named(place.head(key), base)

    def list(self, uri: str, after: str | None = None, recursive: bool = True) -> Iterator[Stat]:
        """Objects under a folder, by full URI, strictly after the URI `after`.

        Streams, on clouds and local disks, in the order of the UTF-8 bytes of the key; a server with an order of its
        own (SeaweedFS puts `a/x` before `a-b`) keeps that, and `after` follows it. Nothing there: nothing listed.
        Names are not filtered; only the empty objects that stand for folders (`a/`) are left out. On protocols whose
        listing names no sizes, the size is 0.

        Raises:
            Unavailable; InvalidJob where the bucket does not exist or the protocol has no listing.
        """
        if is_local(uri):
            folder = _folder(uri)
            found = disk.walk(_path(folder), _within(after, folder), recursive)
            return (_named(one, folder) for one in found)
        place, base, prefix = self._find(uri, self._patience)
        if base:
            prefix = _folder(prefix) if prefix else ""
        listed = place.list(prefix, _within(after, base), recursive)
        return (_named(one, base) for one in listed)

    def open(self, uri: str) -> BinaryIO:
        """The object as a seekable file; reads what is asked for. Raises NotFound, Unaddressable, Unavailable."""
        if is_local(uri):
            return disk.open_file(_path(uri))
        place, _, key = self._find(uri, self._patience)
        if isinstance(place, Filesystem):
            return place.open(key)
        return ranged(place, key)

    def _read(self, uri: str, etag: str | None, patience: float) -> Blob:
        if is_local(uri):
            return disk.read_file(_path(uri), etag)
        place, _, key = self._find(uri, patience)
        return place.get(key, etag)

    def _try(self, uri: str, patience: float) -> Blob | StorageError | Unavailable:
        try:
            return self._read(uri, None, patience)
        except (StorageError, Unavailable) as error:
            return error

    def _find(self, uri: str, patience: float) -> tuple[Place, str, str]:
        """The place of a URI, its base, and the key: base + key is the URI."""
        scheme, _, rest = uri.partition("://")
        cloud = scheme.lower() in CLOUDS
        bucket, _, key = rest.partition("/")
        base = f"{scheme}://{bucket}/" if cloud else ""
        options = options_for(uri, self._options)
        name = (f"{base or scheme} {options!r}", patience)
        with self._lock:
            if name not in self._places:
                place = bucket_of(scheme, bucket, options, patience) if cloud else Filesystem("", {}, patience)
                self._places[name] = place
            return self._places[name], base, key if cloud else uri

    def _threads(self) -> ThreadPoolExecutor:
        with self._lock:
            if self._pool is None:
                self._pool = ThreadPoolExecutor(THREADS, "batchjob-read")
            return self._pool


def ranged(place: Place, key: str) -> BinaryIO:
    """An object as a seekable file that fetches what is asked for. Raises NotFound, Unavailable."""
    return io.BufferedReader(_Ranges(place, key, place.head(key).size), _READ_AHEAD)


class _Ranges(io.RawIOBase):
    """An object as a seekable stream."""

    def __init__(self, place: Place, key: str, size: int) -> None:
        self._place, self._key, self._size, self._at = place, key, size, 0

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def seek(self, offset: int, whence: int = io.SEEK_SET) -> int:
        start = {io.SEEK_SET: 0, io.SEEK_CUR: self._at, io.SEEK_END: self._size}[whence]
        self._at = max(0, start + offset)
        return self._at

    def tell(self) -> int:
        return self._at

    def readinto(self, buffer: Any) -> int:
        end = min(self._at + len(buffer), self._size)
        if end <= self._at:
            return 0
        data = self._place.get_range(self._key, self._at, end)
        buffer[: len(data)] = data
        self._at += len(data)
        return len(data)


def _named(found: Stat, base: str) -> Stat:
    return Stat(base + found.uri, found.size, found.etag, found.version)


def _folder(uri: str) -> str:
    return uri if uri.endswith("/") else uri + "/"


def _within(after: str | None, base: str) -> str | None:
    if after is not None and not after.startswith(base):
        raise ValueError(f"{after} is not below {base}")
    return after[len(base) :] if after else None


def _path(uri: str) -> str:
    return uri.removeprefix("file://")
