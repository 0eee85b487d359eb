"""The reader of any URI: one object, many at once, a listing, or a seekable file."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from functools import partial
from threading import Lock
from typing import BinaryIO

from batchjob.concurrency import DaemonThreadPool
from batchjob.errors import AddressRefused, StorageError, Unavailable
from batchjob.storage import local_backend
from batchjob.storage.backend import READ_THREADS, Backend
from batchjob.storage.fsspec_backend import FsspecBackend, suggest_protocol
from batchjob.storage.http_access import explain_url_refusal, is_http_uri
from batchjob.storage.http_backend import HttpBackend
from batchjob.storage.objects import FolderFilter, ObjectData, ObjectInfo
from batchjob.storage.obstore_backend import open_bucket
from batchjob.storage.options import OptionsByPrefix, options_for
from batchjob.storage.outage import Outage
from batchjob.storage.ranged_file import open_ranged
from batchjob.storage.retry_policy import RetryPolicy, resolve_retry_timeout
from batchjob.uris import (
    CLOUD_SCHEMES,
    explain_bad_bucket,
    explain_bad_file_uri,
    is_local,
    is_within,
    local_path,
    local_spelling,
    uri_scheme,
)

__all__ = ["Reader", "host_name", "store_name"]


class Reader:
    """Reads any URI.

    Thread-safe and picklable: clients are created in the process that uses them, and never cross a fork.

    Args:
        options: Storage options by URI prefix; None has the defaults.
        retry_timeout: Seconds for which transient errors of one request are retried; None takes `BATCHJOB_PATIENCE`, or
            30.
        outage_timeout: Seconds for which a store that does not answer is waited for, by all requests together; 0 does
            not wait longer than `retry_timeout`. `read_many` does not wait: its caller does.
        within: URI prefixes outside of which `read_many` reads nothing; empty for no such limit.
    """

    def __init__(
        self,
        options: OptionsByPrefix | None = None,
        retry_timeout: float | None = None,
        outage_timeout: float = 0.0,
        within: tuple[str, ...] = (),
    ) -> None:
        self._options, self._within = dict(options or {}), within
        self._retry_timeout = resolve_retry_timeout(retry_timeout, outage_timeout)
        self._outage_timeout = outage_timeout
        self._backends: dict[tuple[str, float, bool], Backend] = {}
        # All backends of the web share the connections of this one.
        self._http = HttpBackend(self._options, RetryPolicy(self._retry_timeout, Outage(self._retry_timeout)))
        self._outages: dict[str, Outage] = {}
        self._pool: DaemonThreadPool | None = None
        self._lock = Lock()

    def __reduce__(self) -> tuple[type[Reader], tuple[OptionsByPrefix, float, float, tuple[str, ...]]]:
        return type(self), (self._options, self._retry_timeout, self._outage_timeout, self._within)

    def read(self, uri: str, etag: str | None = None) -> ObjectData:
        """Return all bytes of an object.

        Args:
            uri: URI of the object.
            etag: Tag that the object must have; None accepts any.

        Raises:
            NotFound, UnaddressableKey, Unavailable: The object cannot be read.
            PreconditionFailed: The object has another tag.
        """
        if is_local(uri):
            return local_backend.read_file(local_path(uri), etag)
        backend, _, key = self._find_backend(uri)
        return backend.get(key, etag)

    def read_many(
        self,
        uris: Sequence[str],
        retry_each: bool = False,
        etags: Sequence[str | None] | None = None,
        limit: int | None = None,
        on_result: Callable[[], None] = lambda: None,
    ) -> list[ObjectData | StorageError | Unavailable]:
        """Read objects, remote ones concurrently; return the bytes or the error of each, in order.

        Args:
            uris: URIs of the objects.
            retry_each: True retries each object for `retry_timeout`. False reads the objects of a host once after one
                of them was Unavailable, or after its store has been silent for as long as an outage may last: a dead
                network costs one timeout, not one per image.
            etags: Tags that the objects must have, where they are known; another tag gives PreconditionFailed.
            limit: Largest size in bytes; a larger object gives ObjectTooLarge, and is not read if the store tells its
                size first.
            on_result: Called after each read, from any thread.
        """
        silent_hosts = {host_name(uri) for uri in uris if not is_local(uri) and self.outage(uri).timed_out}

        def read_one(uri: str, etag: str | None) -> ObjectData | StorageError | Unavailable:
            read_once = not retry_each and host_name(uri) in silent_hosts
            result = self._try_read(uri, 0.0 if read_once else self._retry_timeout, etag, limit)
            if isinstance(result, Unavailable):
                silent_hosts.add(host_name(uri))
            on_result()
            return result

        requests = list(zip(uris, etags or [None] * len(uris), strict=True))
        futures = {
            index: self._threads().submit(partial(read_one, *request))
            for index, request in enumerate(requests)
            if not is_local(request[0])
        }
        return [
            futures[index].result() if index in futures else read_one(*request)
            for index, request in enumerate(requests)
        ]

    def explain_refusal(self, uri: str, manifest_uri: str) -> str | None:
        """Return why an image that a manifest names is not read, as far as its URI tells; None if it may be read.

        Local paths and buckets may be read, and so may the protocol of the manifest itself and whatever the job's
        storage options name. All other protocols, and the web, would lead to hosts that the job did not choose.
        """
        if is_http_uri(uri):
            # A text that is no URL is reported by the read.
            with suppress(ValueError):
                return explain_url_refusal(uri, self._options)
            return None
        if reason := explain_bad_file_uri(uri):
            return reason
        if uri_scheme(uri) in CLOUD_SCHEMES and (reason := explain_bad_bucket(uri.split("/", 3)[2])):
            return reason
        chain = [uri] if uri_scheme(uri) in CLOUD_SCHEMES else uri.split("::")
        if any(map(is_http_uri, chain)):
            return "reaches the web through another protocol, which is never read"
        allowed = {"", "file", uri_scheme(manifest_uri), *CLOUD_SCHEMES, *map(uri_scheme, self._options)}
        if refused := [scheme for scheme in map(uri_scheme, chain) if scheme not in allowed]:
            advice = f"storage: {{'{refused[0]}://': {{}}}}{suggest_protocol(refused[0])}"
            return f"is of a protocol that data may name only where the job does, {advice}"
        return None

    def outage(self, uri: str) -> Outage:
        """Return the outage state of the store that holds this object, as this process knows it."""
        store = store_name(uri)
        with self._lock:
            return self._outages.setdefault(store, Outage(max(self._outage_timeout, self._retry_timeout)))

    def stat(self, uri: str) -> ObjectInfo:
        """Return size and tag of an object, without its bytes. Raises NotFound, UnaddressableKey, Unavailable."""
        if is_local(uri):
            return local_backend.stat_file(local_path(uri), uri)
        backend, base, key = self._find_backend(uri)
        return _with_base(backend.head(key), base)

    def list(
        self, uri: str, after: str | None = None, recursive: bool = True, folders: FolderFilter | None = None
    ) -> Iterator[ObjectInfo]:
        """Yield the objects below a folder, by full URI, after the URI `after`.

        On clouds and local disks the listing is streamed, in the order of the UTF-8 bytes of the keys. A server with
        another order (SeaweedFS lists `a/x` before `a-b`) keeps its own, and `after` follows it. A folder that does
        not exist is empty. Names are not filtered; only the empty objects that stand for folders (`a/`) are left out.
        The size is 0 if the protocol's listing has no sizes. On local disks, `folders` chooses the folders to enter.

        Raises:
            Unavailable: The store cannot be reached.
            InvalidJob: The bucket does not exist, or the protocol has no listing.
        """
        if is_local(uri):
            folder = _with_slash(uri)
            found = local_backend.walk(local_path(folder), _local_name(folder, after), recursive, folders)
            return (ObjectInfo(local_spelling(one.uri, folder), one.size, one.etag, one.version) for one in found)
        backend, base, prefix = self._find_backend(uri)
        if base:
            prefix = _with_slash(prefix) if prefix else ""
        found = backend.list(prefix, _relative_to(base, after), recursive)
        return (_with_base(one, base) for one in found)

    def open(self, uri: str) -> BinaryIO:
        """Open an object as a seekable file that fetches what is read.

        Raises:
            NotFound, UnaddressableKey, Unavailable: The object cannot be read.
        """
        if is_local(uri):
            return local_backend.open_file(local_path(uri))
        backend, _, key = self._find_backend(uri)
        if isinstance(backend, FsspecBackend | HttpBackend):
            return backend.open(key)
        return open_ranged(backend, key)

    def _try_read(
        self, uri: str, retry_timeout: float, etag: str | None, limit: int | None
    ) -> ObjectData | StorageError | Unavailable:
        """Read an object under a retry timeout of its own, without waiting for the end of an outage."""
        if self._within and not is_within(uri, self._within):
            return AddressRefused(f"{uri}: lies outside of input.within")
        result: ObjectData | StorageError | Unavailable
        try:
            if is_local(uri):
                return local_backend.read_file(local_path(uri), etag, limit)
            backend, _, key = self._find_backend(uri, retry_timeout)
            result = backend.get(key, etag, limit)
        except (StorageError, Unavailable) as error:
            result = error
        if not isinstance(result, Unavailable):
            self.outage(uri).record_answer()
        return result

    def _find_backend(self, uri: str, retry_timeout: float | None = None) -> tuple[Backend, str, str]:
        """Return the backend of a URI, its base, and the key: base + key is the URI.

        For example, `s3://lake/in/a.jpg` has the base `s3://lake/` and the key `in/a.jpg`; `https://host/a.jpg` has an
        empty base and is its own key.

        Args:
            uri: URI to find.
            retry_timeout: Seconds for which one request is retried, and no longer in an outage; None has the reader's
                own two timeouts.
        """
        scheme, _, rest = uri.partition("://")
        is_cloud = scheme.lower() in CLOUD_SCHEMES
        if not is_cloud and any(map(is_http_uri, uri.split("::")[1:])):
            raise AddressRefused(f"{uri}: reaches the web through another protocol, which is never read")
        bucket, _, key = rest.partition("/")
        base = f"{scheme}://{bucket}/" if is_cloud else ""
        options = options_for(uri, self._options)
        if retry_timeout is None:
            policy = RetryPolicy(self._retry_timeout, self.outage(uri))
        else:
            policy = RetryPolicy(retry_timeout, Outage(retry_timeout))
        store = "web" if is_http_uri(uri) else f"{store_name(uri)} {options!r}"
        name = (store, policy.retry_timeout, retry_timeout is None)
        with self._lock:
            if name not in self._backends:
                if is_cloud:
                    self._backends[name] = open_bucket(scheme, bucket, options, policy)
                elif is_http_uri(uri):
                    self._backends[name] = self._http.with_policy(policy)
                else:
                    self._backends[name] = FsspecBackend("", {}, policy)
            return self._backends[name], base, key if is_cloud else uri

    def _threads(self) -> DaemonThreadPool:
        with self._lock:
            if self._pool is None:
                self._pool = DaemonThreadPool(READ_THREADS, "batchjob-read")
            return self._pool


def store_name(uri: str) -> str:
    """Return the store that answers, or is silent, as one: the bucket, `web` for the whole web, "" for local disks."""
    # The silence of one host of the web says nothing about the others.
    return "web" if is_http_uri(uri) else host_name(uri)


def host_name(uri: str) -> str:
    """Return scheme and bucket or host, `s3://lake` of `s3://lake/in/a.jpg`; "" for local disks."""
    return "" if is_local(uri) else "/".join(uri.split("/", 3)[:3])


def _with_base(found: ObjectInfo, base: str) -> ObjectInfo:
    return ObjectInfo(base + found.uri, found.size, found.etag, found.version)


def _with_slash(uri: str) -> str:
    return uri if uri.endswith("/") else uri + "/"


def _local_name(folder: str, after: str | None) -> str | None:
    """Return the name of a local file relative to a folder, of which both are spelled alike."""
    relative = _relative_to(folder, after)
    return relative and str(local_path("file:/" + relative))[1:] if uri_scheme(folder) else relative


def _relative_to(base: str, after: str | None) -> str | None:
    if after is not None and not after.startswith(base):
        raise ValueError(f"{after} is not below {base}")
    return after[len(base) :] if after else None
