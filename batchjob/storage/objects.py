"""Objects in storage: what a listing knows of one (`ObjectInfo`), its bytes (`ObjectData`), folders to leave out."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

__all__ = ["FolderFilter", "ObjectData", "ObjectInfo"]


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


class FolderFilter(Protocol):
    """Filter of the folders that a listing goes into. Folders are relative to the listed one, and end with `/`."""

    def enters(self, folder: str) -> bool:
        """Return False to leave out a folder with everything below it; the folders above it have been entered."""

    def skip_unreadable(self, folder: str, reason: str) -> None:
        """Take note of a folder that this user may not read, or raise an error that ends the listing.

        Args:
            folder: The folder; empty for the listed one.
            reason: Words of the operating system, such as `Permission denied`.
        """
