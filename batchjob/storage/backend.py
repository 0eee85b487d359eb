"""The protocol of every storage backend, and the constants and key rules that they share."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Protocol

from batchjob.storage.objects import ObjectData, ObjectInfo

__all__ = ["LIST_PAGE_SIZE", "READ_THREADS", "Backend", "is_plain_key", "unquote_etag"]

LIST_PAGE_SIZE = 1000  # objects per listing request
READ_THREADS = 32  # concurrent reads of a process


class Backend(Protocol):
    """One bucket, file system or the web, for reading.

    Keys are taken literally, and objects are returned under their key. For example, the bucket `s3://lake/` holds
    `in/a b.jpg`: `head("in/a b.jpg")` returns `ObjectInfo("in/a b.jpg", …)`, and so does `list("in/", None, True)`.
    """

    def get(self, key: str, etag: str | None = None, limit: int | None = None) -> ObjectData:
        """Return an object.

        Args:
            key: Key of the object.
            etag: Tag that the object must have; None accepts any.
            limit: Largest size in bytes; None accepts any. Both are checked before the body is read, if the answer's
                headers tell.

        Raises:
            PreconditionFailed: The object has another tag.
            ObjectTooLarge: The object has more bytes than `limit`.
            NotFound, UnaddressableKey, Unavailable: As every read.
        """

    def get_range(self, key: str, start: int, end: int) -> bytes:
        """Return the bytes from `start` up to, but not including, `end`; fewer at the end of the object."""

    def head(self, key: str) -> ObjectInfo:
        """Return size and tag of an object."""

    def list(self, prefix: str, after: str | None, recursive: bool) -> Iterator[ObjectInfo]:
        """Yield the objects whose keys start with `prefix` and come after `after`; not recursive: no deeper `/`."""


def is_plain_key(key: str) -> bool:
    """Return True if obstore can name this key without changing it."""
    return key.isprintable() and not any(part in ("", ".", "..") for part in key.split("/"))


def unquote_etag(etag: str | None) -> str | None:
    """Return an ETag without its quotes."""
    return etag.strip('"') if etag else None
