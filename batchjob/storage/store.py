"""The protocol of an output: read, list, create if absent, replace if match, delete."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from typing import BinaryIO, Protocol

from batchjob.errors import AlreadyExists, InvalidJob, NotFound, Unavailable
from batchjob.settings import resolve_path
from batchjob.storage.backend import is_plain_key
from batchjob.storage.cloud_store import CloudStore
from batchjob.storage.disk_store import DiskStore
from batchjob.storage.fsspec_backend import suggest_protocol
from batchjob.storage.objects import ObjectData, ObjectInfo
from batchjob.storage.options import OptionsByPrefix
from batchjob.storage.outage import Outage
from batchjob.storage.retry_policy import resolve_retry_timeout
from batchjob.uris import CLOUD_SCHEMES, is_local, lower_scheme, suggest_bucket_uri

__all__ = ["Store", "open_store", "put_or_get", "read_if_present"]

_MAX_TRIES = 4


class Store(Protocol):
    """An output, rooted at one URI. Keys are relative to it and separated by `/`.

    A create or replace that raised Unavailable may have happened all the same, because its answer can be lost; and
    AlreadyExists may be the answer to a repeated request that meets its own first write. The caller therefore reads the
    object. For example, `put_if_absent("a", b"1")` raises AlreadyExists, and `read("a")` returns `b"1"`: it is ours.

    Attributes:
        uri: URI of the output folder.
    """

    uri: str

    def read(self, key: str) -> ObjectData:
        """Return an object. Raises NotFound, Unavailable."""

    def read_tail(self, key: str, size: int) -> bytes:
        """Return the last `size` bytes, or all of them. Raises NotFound, Unavailable."""

    def read_head(self, key: str, size: int) -> bytes:
        """Return the first `size` bytes, or all of them. Raises NotFound, Unavailable."""

    def open(self, key: str) -> BinaryIO:
        """Open an object as a seekable file that fetches what is read. Raises NotFound, Unavailable."""

    def stat(self, key: str) -> ObjectInfo:
        """Return size, tag and version of an object. Raises NotFound, Unavailable."""

    def list(self, prefix: str) -> Iterator[ObjectInfo]:
        """Yield the objects whose keys start with `prefix`, in key order. Raises Unavailable.

        Args:
            prefix: Empty, or ends with `/`.
        """

    def put_if_absent(self, key: str, body: bytes | Path) -> ObjectInfo:
        """Create an object in one PUT, never multipart.

        Raises:
            AlreadyExists: An object with this key exists, or is being written.
            Unavailable: The store did not answer.
            InvalidJob: Nothing can be written there.
        """

    def replace_if_match(self, key: str, body: bytes | Path, version: str) -> ObjectInfo:
        """Replace an object that has this version.

        Raises:
            PreconditionFailed: The object is absent or has another version.
            Unavailable, InvalidJob: As `put_if_absent`.
        """

    def delete(self, key: str) -> None:
        """Delete an object; one that does not exist is no error. Raises Unavailable."""

    def delete_if_match(self, key: str, version: str) -> None:
        """Delete an object that has this version; one that does not exist is no error.

        Raises:
            PreconditionFailed: The object has another version.
            Unavailable: The store did not answer.
        """


def open_store(
    uri: str, options: OptionsByPrefix | None = None, retry_timeout: float | None = None, outage: float | Outage = 0.0
) -> Store:
    """Return the output at `uri`: a local path, or s3://, gs://, az://. Makes no request.

    Args:
        uri: URI of the output folder.
        options: Storage options by URI prefix; None has the defaults.
        retry_timeout: Seconds for which transient errors of one request are retried; None takes `BATCHJOB_PATIENCE`, or
            30.
        outage: Seconds for which a store that does not answer is waited for, by all requests together; or the outage
            state that other users of this store share.

    Raises:
        InvalidJob: A protocol without conditional create, a prefix that cannot be named, or a missing extra.
        Unavailable: There are no credentials.
    """
    if is_local(uri):
        try:
            return DiskStore(resolve_path(uri))
        except ValueError as error:
            raise InvalidJob(f"output.uri {uri}: {error}") from error
    scheme, _, rest = lower_scheme(uri).partition("://")
    if scheme not in CLOUD_SCHEMES:
        advice = suggest_bucket_uri(uri) or suggest_protocol(scheme) or "; use a local path, s3://, gs:// or az://"
        raise InvalidJob(f"output.uri {uri}: {scheme}:// has no conditional create, which a safe commit needs{advice}")
    if rest.strip("/") and not is_plain_key(rest.rstrip("/")):
        raise InvalidJob(f"output.uri {uri}: has an empty, '.' or '..' part; choose a plain prefix")
    outage_timeout = outage.max_seconds if isinstance(outage, Outage) else outage
    return CloudStore(uri, dict(options or {}), resolve_retry_timeout(retry_timeout, outage_timeout), outage)


def put_or_get(store: Store, key: str, body: bytes) -> bytes:
    """Create an object, or read the one that exists; return the bytes that are stored.

    "Already exists" about an object that cannot be read is not believed: the create is repeated.

    Raises:
        Unavailable: The store did not answer, or it said four times that the object exists but never returned it.
    """
    for _ in range(_MAX_TRIES):
        try:
            store.put_if_absent(key, body)
            return body
        except AlreadyExists:
            with suppress(NotFound):
                return store.read(key).data
    raise Unavailable(f"{store.uri}/{key}: the store answers 'exists' to every PUT and shows nothing; run again")


def read_if_present(store: Store, key: str) -> ObjectData | None:
    """Read an object; None if it does not exist. Raises Unavailable."""
    try:
        return store.read(key)
    except NotFound:
        return None
