"""The verbs of an output, on buckets; and the proof that a store keeps their promise."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from typing import BinaryIO, Protocol

from batchjob.errors import AlreadyExists, InvalidJob, NotFound, PreconditionFailed, Unavailable
from batchjob.settings import is_local, local_path
from batchjob.storage import local_backend
from batchjob.storage.backend import CLOUD_SCHEMES, is_plain_key
from batchjob.storage.objects import ObjectData, ObjectInfo
from batchjob.storage.obstore_backend import open_bucket
from batchjob.storage.options import OptionsByPrefix, options_for, resolve_retry_timeout
from batchjob.storage.outage import Outage
from batchjob.storage.reader import open_ranged

__all__ = ["CloudStore", "Store", "open_store", "put_or_get"]

_LOOKS = 4


class Store(Protocol):
    """An output: rooted at one URI, keys relative to it and `/`-separated.

    A create or replace that failed may have happened: the answer can be lost. Who asked looks.
    """

    uri: str

    def read(self, key: str) -> ObjectData:
        """Raises NotFound, Unavailable."""

    def read_tail(self, key: str, size: int) -> bytes:
        """The last `size` bytes, or all. Raises NotFound, Unavailable."""

    def read_head(self, key: str, size: int) -> bytes:
        """The first `size` bytes, or all. Raises NotFound, Unavailable."""

    def open(self, key: str) -> BinaryIO:
        """The object as a seekable file; reads what is asked for. Raises NotFound, Unavailable."""

    def stat(self, key: str) -> ObjectInfo:
        """Raises NotFound, Unavailable."""

    def list(self, prefix: str) -> Iterator[ObjectInfo]:
        """Objects whose key starts with `prefix` (ends with `/`, or empty), in key order. Raises Unavailable."""

    def put_if_absent(self, key: str, body: bytes | Path) -> ObjectInfo:
        """One PUT, never multipart. Raises AlreadyExists, Unavailable; InvalidJob where nothing can be written."""

    def replace_if_match(self, key: str, body: bytes | Path, version: str) -> ObjectInfo:
        """Raises Changed where the object is absent or of another version, Unavailable, InvalidJob."""

    def delete(self, key: str) -> None:
        """Absent is fine. Raises Unavailable."""

    def delete_if_match(self, key: str, version: str) -> None:
        """Absent is fine. Raises Changed where the object is of another version, Unavailable."""


def open_store(
    uri: str, options: OptionsByPrefix | None = None, retry_timeout: float | None = None, outage: float | Outage = 0.0
) -> Store:
    """The output at `uri`: a local path, or s3://, gs://, az://. Makes no request.

    Args:
        uri: of its folder.
        options: see `Options`.
        patience: seconds that the transient faults of one request are retried.
        outage: seconds that a store which does not answer at all is waited for, all requests together; or what others
            in this process know of its silence.

    Raises:
        InvalidJob: a protocol without conditional create, a prefix that cannot be named, a missing extra.
        Unavailable: no credentials.
    """
    if is_local(uri):
        return local_backend.DiskStore(local_path(uri).absolute())
    scheme, _, rest = uri.partition("://")
    if scheme.lower() not in CLOUD_SCHEMES:
        raise InvalidJob(
            f"output.uri {uri}: {scheme}:// has no conditional create, which a safe commit needs; "
            "use a local path, s3://, gs:// or az://"
        )
    if rest.strip("/") and not is_plain_key(rest.rstrip("/")):
        raise InvalidJob(f"output.uri {uri}: has an empty, '.' or '..' part; choose a plain prefix")
    seconds = outage.max_seconds if isinstance(outage, Outage) else outage
    return CloudStore(uri, dict(options or {}), resolve_retry_timeout(retry_timeout, seconds), outage)


def put_or_get(store: Store, key: str, body: bytes) -> bytes:
    """Put if absent; the bytes that stand then, ours or another's. "Exists" with nothing stored is asked again.

    Raises:
        Unavailable: the store cannot be reached, or says "exists" again and again and shows nothing.
    """
    for _ in range(_LOOKS):
        try:
            store.put_if_absent(key, body)
            return body
        except AlreadyExists:
            with suppress(NotFound):
                return store.read(key).data
    raise Unavailable(f"{store.uri}/{key}: the store answers 'exists' to every PUT and shows nothing; run again")


class CloudStore:
    """An output in a bucket: conditional PUTs, nothing else."""

    def __init__(self, uri: str, options: OptionsByPrefix, retry_timeout: float, outage: float | Outage = 0.0) -> None:
        self.uri = uri.rstrip("/")
        self._made_of = (uri, options, retry_timeout, outage)
        scheme, _, rest = uri.partition("://")
        bucket, _, prefix = rest.rstrip("/").partition("/")
        self._prefix = prefix + "/" if prefix else ""
        silence = outage if isinstance(outage, Outage) else Outage(max(outage, retry_timeout))
        self._bucket = open_bucket(scheme, bucket, options_for(uri, options), retry_timeout, silence)

    def __reduce__(self) -> tuple[type[CloudStore], tuple[str, OptionsByPrefix, float, float | Outage]]:
        return CloudStore, self._made_of

    def read(self, key: str) -> ObjectData:
        return self._bucket.get(self._prefix + key)

    def read_tail(self, key: str, size: int) -> bytes:
        return self._bucket.get_tail(self._prefix + key, size)

    def read_head(self, key: str, size: int) -> bytes:
        return self._bucket.get_range(self._prefix + key, 0, size)

    def open(self, key: str) -> BinaryIO:
        return open_ranged(self._bucket, self._prefix + key)

    def stat(self, key: str) -> ObjectInfo:
        return self._relative(self._bucket.head(self._prefix + key))

    def list(self, prefix: str) -> Iterator[ObjectInfo]:
        return map(self._relative, self._bucket.list(self._prefix + prefix, None, True))

    def put_if_absent(self, key: str, body: bytes | Path) -> ObjectInfo:
        return self._relative(self._bucket.put(self._prefix + key, body, "create"))

    def replace_if_match(self, key: str, body: bytes | Path, version: str) -> ObjectInfo:
        try:
            return self._relative(self._bucket.put(self._prefix + key, body, self._bucket.update_mode(version)))
        except (NotFound, AlreadyExists) as error:  # gone, or a 409 from a rival's write
            raise PreconditionFailed(error.message) from error

    def delete(self, key: str) -> None:
        self._bucket.delete(self._prefix + key)

    def delete_if_match(self, key: str, version: str) -> None:
        # The clients know no conditional DELETE: between the look and the deletion lies one request.
        with suppress(NotFound):
            if self.stat(key).version != version:
                raise PreconditionFailed(f"{self.uri}/{key}: replaced by another writer")
            self.delete(key)

    def _relative(self, found: ObjectInfo) -> ObjectInfo:
        return ObjectInfo(found.uri[len(self._prefix) :], found.size, found.etag, found.version)
