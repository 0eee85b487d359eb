"""Reading any URI."""

from __future__ import annotations

import io
from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from functools import partial
from threading import Lock
from typing import Any, BinaryIO

from batchjob.concurrency import DaemonThreadPool
from batchjob.errors import AddressRefused, StorageError, Unavailable
from batchjob.settings import is_local
from batchjob.storage import local_backend
from batchjob.storage.backend import CLOUD_SCHEMES, READ_THREADS, Backend
from batchjob.storage.fsspec_backend import FsspecBackend
from batchjob.storage.http_backend import HttpBackend, explain_url_refusal, is_http_uri
from batchjob.storage.objects import ObjectData, ObjectInfo
from batchjob.storage.obstore_backend import open_bucket
from batchjob.storage.options import OptionsByPrefix, StorageOptions, options_for, resolve_retry_timeout
from batchjob.storage.outage import Outage

__all__ = ["Reader", "open_ranged"]

_READ_AHEAD = 1 << 20  # bytes fetched at least, of an object opened as a file


class Reader:
    """Reads any URI. Thread-safe and picklable: clients are made where and when they are needed (never across a fork).

    Args:
        options: see `Options`.
        patience: seconds that the transient faults of one request are retried.
        outage: seconds that a store which does not answer at all is waited for, all requests together. `read_many`
            leaves the waiting to who asks.
    """

    def __init__(
        self, options: OptionsByPrefix | None = None, retry_timeout: float | None = None, outage_timeout: float = 0.0
    ) -> None:
        self._options = dict(options or {})
        self._patience, self._seconds = resolve_retry_timeout(retry_timeout, outage_timeout), outage_timeout
        self._reset()

    def _reset(self) -> None:
        self._places: dict[tuple[str, float, bool], Backend] = {}
        self._web = HttpBackend(self._options, self._patience, Outage(self._patience))  # whose connections all share
        self._outages: dict[str, Outage] = {}
        self._pool: DaemonThreadPool | None = None
        self._lock = Lock()

    def __getstate__(self) -> tuple[dict[str, StorageOptions], float, float]:
        return self._options, self._patience, self._seconds

    def __setstate__(self, state: tuple[dict[str, StorageOptions], float, float]) -> None:
        self._options, self._patience, self._seconds = state
        self._reset()

    def read(self, uri: str, etag: str | None = None) -> ObjectData:
        """All bytes of an object.

        Raises:
            NotFound, Unaddressable, Unavailable; Changed where `etag` is given and the object has another.
        """
        if is_local(uri):
            return local_backend.read_file(_path(uri), etag)
        place, _, key = self._find(uri)
        return place.get(key, etag)

    def read_many(
        self,
        uris: Sequence[str],
        retry_each: bool = False,
        etags: Sequence[str | None] | None = None,
        limit: int | None = None,
        on_result: Callable[[], None] = lambda: None,
    ) -> list[ObjectData | StorageError | Unavailable]:
        """As many answers as URIs, in order: bytes, or what went wrong with this one. Concurrent where remote.

        Args:
            stubborn: ask for each as long as patience lasts. Otherwise, once one has waited in vain, the others are
                asked once: a dead network costs one window, not one per image; and none where that has lasted for as
                long as an outage may.
            etags: that the objects must have, as far as theirs are known: else Changed is the answer.
            limit: bytes that each may have: else TooLarge is the answer, and none of them is read where the store tells
                the size first.
            came: called, from any thread, as each answer arrives.
        """
        in_vain = {_host(uri) for uri in uris if not is_local(uri) and self.outage(uri).timed_out}
        wanted = list(zip(uris, etags or [None] * len(uris), strict=True))

        def near(uri: str, etag: str | None) -> ObjectData | StorageError | Unavailable:
            answer = self._try(uri, 0.0, etag, limit)
            on_result()
            return answer

        def fetch(uri: str, etag: str | None) -> ObjectData | StorageError | Unavailable:
            patience = 0.0 if not retry_each and _host(uri) in in_vain else self._patience
            answer = self._try(uri, patience, etag, limit)
            if isinstance(answer, Unavailable):
                in_vain.add(_host(uri))
            on_result()
            return answer

        remote = {index: one for index, one in enumerate(wanted) if not is_local(one[0])}
        begun = {index: self._threads().submit(partial(fetch, *one)) for index, one in remote.items()}
        return [
            begun[index].result() if index in begun else near(uri, etag) for index, (uri, etag) in enumerate(wanted)
        ]

    def explain_refusal(self, uri: str, manifest_uri: str) -> str | None:
        """Why an image that data names is not read, as far as its URI tells; None where it may be.

        Local paths and buckets may be, what is of the protocol of the manifest `beside` it, and what the job's storage
        options name: other protocols and the web lead to hosts.
        """
        if is_http_uri(uri):
            with suppress(ValueError):  # no URL at all: whoever reads it says so
                return explain_url_refusal(uri, self._options)
            return None
        chain = [uri] if _scheme(uri) in CLOUD_SCHEMES else uri.split("::")
        if any(map(is_http_uri, chain)):
            return "reaches the web through another protocol, which is never read"
        known = {"", "file", _scheme(manifest_uri), *CLOUD_SCHEMES, *map(_scheme, self._options)}
        if strange := [scheme for scheme in map(_scheme, chain) if scheme not in known]:
            place = f"{strange[0]}://"
            return f"is of a protocol that data may name only where the job does, storage: {{'{place}': {{}}}}"
        return None

    def outage(self, uri: str) -> Outage:
        """What is known, in this process, of the silence of the store that holds this object."""
        store = self._store(uri)
        with self._lock:
            return self._outages.setdefault(store, Outage(max(self._seconds, self._patience)))

    def stat(self, uri: str) -> ObjectInfo:
        """Size and tag, without the bytes. Raises NotFound, Unaddressable, Unavailable."""
        if is_local(uri):
            return local_backend.stat_file(_path(uri), uri)
        place, base, key = self._find(uri)
        return _named(place.head(key), base)

    def list(self, uri: str, after: str | None = None, recursive: bool = True) -> Iterator[ObjectInfo]:
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
            found = local_backend.walk(_path(folder), _within(after, folder), recursive)
            return (_named(one, folder) for one in found)
        place, base, prefix = self._find(uri)
        if base:
            prefix = _folder(prefix) if prefix else ""
        listed = place.list(prefix, _within(after, base), recursive)
        return (_named(one, base) for one in listed)

    def open(self, uri: str) -> BinaryIO:
        """The object as a seekable file; reads what is asked for. Raises NotFound, Unaddressable, Unavailable."""
        if is_local(uri):
            return local_backend.open_file(_path(uri))
        place, _, key = self._find(uri)
        if isinstance(place, FsspecBackend | HttpBackend):
            return place.open(key)
        return open_ranged(place, key)

    def _try(
        self, uri: str, patience: float, etag: str | None, limit: int | None
    ) -> ObjectData | StorageError | Unavailable:
        """Asked for so many seconds, without waiting for the end of an outage."""
        answer: ObjectData | StorageError | Unavailable
        try:
            if is_local(uri):
                return local_backend.read_file(_path(uri), etag, limit)
            place, _, key = self._find(uri, patience)
            answer = place.get(key, etag, limit)
        except (StorageError, Unavailable) as error:
            answer = error
        if not isinstance(answer, Unavailable):
            self.outage(uri).record_answer()
        return answer

    def _find(self, uri: str, patience: float | None = None) -> tuple[Backend, str, str]:
        """The place of a URI, its base, and the key: base + key is the URI. With a patience, it waits for no outage."""
        scheme, _, rest = uri.partition("://")
        cloud = scheme.lower() in CLOUD_SCHEMES
        if not cloud and any(map(is_http_uri, uri.split("::")[1:])):
            raise AddressRefused(f"{uri}: reaches the web through another protocol, which is never read")
        bucket, _, key = rest.partition("/")
        base = f"{scheme}://{bucket}/" if cloud else ""
        options = options_for(uri, self._options)
        outage = self.outage(uri) if patience is None else Outage(patience)
        seconds = self._patience if patience is None else patience
        name = ("web" if is_http_uri(uri) else f"{self._store(uri)} {options!r}", seconds, patience is None)
        with self._lock:
            if name not in self._places:
                if cloud:
                    self._places[name] = open_bucket(scheme, bucket, options, seconds, outage)
                elif is_http_uri(uri):
                    self._places[name] = self._web.with_timeouts(seconds, outage)
                else:
                    self._places[name] = FsspecBackend("", {}, seconds, outage)
            return self._places[name], base, key if cloud else uri

    def _store(self, uri: str) -> str:
        """What falls silent together: a bucket, and all of the web: of its hosts, one says nothing of the others."""
        return "web" if is_http_uri(uri) else _host(uri)

    def _threads(self) -> DaemonThreadPool:
        with self._lock:
            if self._pool is None:
                self._pool = DaemonThreadPool(READ_THREADS, "batchjob-read")
            return self._pool


def open_ranged(place: Backend, key: str) -> BinaryIO:
    """An object as a seekable file that fetches what is asked for. Raises NotFound, Unavailable."""
    return io.BufferedReader(_Ranges(place, key, place.head(key).size), _READ_AHEAD)


class _Ranges(io.RawIOBase):
    """An object as a seekable stream."""

    def __init__(self, place: Backend, key: str, size: int) -> None:
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


def _host(uri: str) -> str:
    """A bucket or host."""
    return "/".join(uri.split("/", 3)[:3])


def _scheme(uri: str) -> str:
    """In lower case; empty for a plain path."""
    return uri.partition("://")[0].lower() if "://" in uri and not uri.startswith("/") else ""


def _named(found: ObjectInfo, base: str) -> ObjectInfo:
    return ObjectInfo(base + found.uri, found.size, found.etag, found.version)


def _folder(uri: str) -> str:
    return uri if uri.endswith("/") else uri + "/"


def _within(after: str | None, base: str) -> str | None:
    if after is not None and not after.startswith(base):
        raise ValueError(f"{after} is not below {base}")
    return after[len(base) :] if after else None


def _path(uri: str) -> str:
    return uri.removeprefix("file://")
