"""Objects in storage: what a listing knows of one (`ObjectInfo`), and its bytes (`ObjectData`)."""

from __future__ import annotations

from dataclasses import dataclass

__all__ = ["ObjectData", "ObjectInfo"]


@dataclass(frozen=True, slots=True)
class ObjectInfo:
    """An object without its bytes, as a listing or a HEAD request describes it.

    Attributes:
        uri: Full URI if a `Reader` returned it; key relative to the output's root if a `Store` did.
        size: Size in bytes.
        etag: Tag of the store without quotes; None if it has none.
        version: Opaque token for `Store.replace_if_match`: an ETag, on GCS a generation.
    """

    uri: str
    size: int
    etag: str | None = None
    version: str | None = None


@dataclass(frozen=True, slots=True)
class ObjectData:
    """The bytes of an object, with the tag and version under which they were read."""

    data: bytes
    etag: str | None = None
    version: str | None = None
