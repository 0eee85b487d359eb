"""What the readers of all protocols have in common."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Protocol

from batchjob.storage.objects import ObjectData, ObjectInfo

__all__ = ["CLOUD_SCHEMES", "LIST_PAGE_SIZE", "READ_THREADS", "Backend", "is_plain_key", "unquote_etag"]

CLOUD_SCHEMES = {"s3": "s3", "s3a": "s3", "s3n": "s3", "gs": "gs", "gcs": "gs", "az": "az", "abfs": "az", "abfss": "az"}
LIST_PAGE_SIZE = 1000  # objects asked for in one listing request
READ_THREADS = 32  # concurrent reads a process


class Backend(Protocol):
    """One bucket or file system. Keys are taken literally; what comes back is named by key."""

    def get(self, key: str, etag: str | None = None, limit: int | None = None) -> ObjectData:
        """Raises Changed and TooLarge before a byte of it is read, as far as the answer's head tells."""

    def get_range(self, key: str, start: int, end: int) -> bytes: ...
    def head(self, key: str) -> ObjectInfo: ...
    def list(self, prefix: str, after: str | None, recursive: bool) -> Iterator[ObjectInfo]: ...


def is_plain_key(key: str) -> bool:
    """Can obstore name this key without altering it?"""
    return key.isprintable() and not any(part in ("", ".", "..") for part in key.split("/"))


def unquote_etag(etag: str | None) -> str | None:
    return etag.strip('"') if etag else None
