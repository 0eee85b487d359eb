"""The nouns: frozen data that the rooms hand to each other. No behaviour beyond reading and writing themselves."""

from __future__ import annotations

from dataclasses import dataclass

__all__ = ["ObjectData", "ObjectInfo"]


@dataclass(frozen=True, slots=True)
class ObjectInfo:
    """An object as a listing shows it.

    Attributes:
        uri: full URI from a `Reader`, key relative to the root from a `Store`.
        size: bytes.
        etag: the store's own tag, without quotes, or None where it has none.
        version: opaque token for `replace_if_match` (an ETag, on GCS a generation).
    """

    uri: str
    size: int
    etag: str | None = None
    version: str | None = None


@dataclass(frozen=True, slots=True)
class ObjectData:
    """An object's bytes, with the tag and the version they were read under."""

    data: bytes
    etag: str | None = None
    version: str | None = None
