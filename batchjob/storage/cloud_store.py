"""Output in a bucket: commits by conditional PUT."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from typing import BinaryIO

from batchjob.errors import AlreadyExists, NotFound, PreconditionFailed
from batchjob.storage.objects import ObjectData, ObjectInfo
from batchjob.storage.obstore_backend import open_bucket
from batchjob.storage.options import OptionsByPrefix, options_for
from batchjob.storage.outage import Outage
from batchjob.storage.ranged_file import open_ranged
from batchjob.storage.retry_policy import RetryPolicy

__all__ = ["CloudStore"]


class CloudStore:
    """A bucket as output. See `Store`. Picklable: the copy has clients of its own.

    Args:
        uri: URI of the output folder.
        options: Storage options by URI prefix.
        retry_timeout: Seconds for which transient errors of one request are retried.
        outage: Seconds that an outage may last, or the outage state that other users of this store share.
    """

    def __init__(self, uri: str, options: OptionsByPrefix, retry_timeout: float, outage: float | Outage = 0.0) -> None:
        self.uri = uri.rstrip("/")
        self._arguments = (uri, options, retry_timeout, outage)
        scheme, _, rest = uri.partition("://")
        bucket, _, prefix = rest.rstrip("/").partition("/")
        self._prefix = prefix + "/" if prefix else ""
        shared = outage if isinstance(outage, Outage) else Outage(max(outage, retry_timeout))
        self._bucket = open_bucket(scheme, bucket, options_for(uri, options), RetryPolicy(retry_timeout, shared))

    def __reduce__(self) -> tuple[type[CloudStore], tuple[str, OptionsByPrefix, float, float | Outage]]:
        return CloudStore, self._arguments

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
        except (NotFound, AlreadyExists) as error:  # The object is gone, or a rival's write was answered with 409.
            raise PreconditionFailed(error.message) from error

    def delete(self, key: str) -> None:
        self._bucket.delete(self._prefix + key)

    def delete_if_match(self, key: str, version: str) -> None:
        """Delete an object that has this version, if it exists. Raises PreconditionFailed, Unavailable."""
        # The clients know no conditional DELETE: one request lies between the check and the deletion.
        with suppress(NotFound):
            if self.stat(key).version != version:
                raise PreconditionFailed(f"{self.uri}/{key}: replaced by another writer")
            self.delete(key)

    def _relative(self, found: ObjectInfo) -> ObjectInfo:
        return ObjectInfo(found.uri[len(self._prefix) :], found.size, found.etag, found.version)
