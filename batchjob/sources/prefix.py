"""Images listed from storage: everything below a folder, one file, or what a glob matches."""

from __future__ import annotations

import itertools
import re
from collections.abc import Iterator
from typing import TYPE_CHECKING, Annotated, Literal

import pyarrow as pa
from pydantic import AfterValidator, Field

from batchjob.settings import Settings, Uri
from batchjob.sources import locations
from batchjob.sources.locations import InputLocation, list_location, require_location
from batchjob.sources.source import BATCH_ROWS, REF_FIELDS, Require, skip_empty_batches
from batchjob.storage.objects import ObjectInfo
from batchjob.types import Cursor

if TYPE_CHECKING:
    from batchjob.storage.reader import Reader

__all__ = ["PrefixSource"]

_SCHEMA = pa.schema(REF_FIELDS)
_IMAGES = (".jpg", ".jpeg", ".png", ".webp", ".gif", ".bmp", ".tif", ".tiff")
# A local name that is not UTF-8 has no place in Arrow: its odd bytes stand as `\udcff`, and back again to go on.
_ESCAPED = re.compile(r"\\udc([89a-f][0-9a-f])")


def _dotted(extensions: tuple[str, ...]) -> tuple[str, ...]:
    if not all(extension.strip(".") for extension in extensions):
        raise ValueError("has an empty extension; write 'all' to take every file")
    return tuple("." + extension.lower().lstrip(".") for extension in extensions)


def _compiles(pattern: str) -> str:
    if not pattern.strip("/"):
        raise ValueError("has an empty pattern")
    try:
        re.compile(locations.glob_to_regex(pattern))
    except re.error as error:
        raise ValueError(f"{pattern!r} is not a glob pattern ({error}); write '[[]' for a literal '['") from error
    return pattern


_Glob = Annotated[str, AfterValidator(_compiles)]
_Extensions = Annotated[tuple[str, ...], Field(min_length=1), AfterValidator(_dotted)]


class PrefixSource(Settings):
    """Every image below a folder, in the order of their keys.

    Attributes:
        uri: a folder, one file, or a glob: `*`, `?`, `[…]` stay within a folder, `**` crosses them. A glob matches
            files; one that ends with `/` matches folders and takes what lies below them.
        recursive: also what lies in folders below. A glob says itself how deep it reaches.
        extensions: endings of names to take, in any case, or `all`.
        include: globs on the path relative to the folder (of a glob: to its part before the first `*`); only what one
            of them matches is taken. As in `.gitignore`, one without `/` is matched against each name of the path, and
            what matches a folder matches all below it.
        exclude: likewise; what one of them matches is left out.
        require: what must be there before anything is planned.
    """

    type: Literal["prefix"] = "prefix"
    uri: Uri
    recursive: bool = True
    extensions: Literal["all"] | _Extensions = _IMAGES
    include: tuple[_Glob, ...] = ()
    exclude: tuple[_Glob, ...] = ()
    require: Require | None = None

    def check(self, reader: Reader) -> None:
        """Look whether anything is there. Raises InvalidJob."""
        require_location(reader, self.uri)

    @property
    def has_id(self) -> bool:
        """Whether the first of `fields` is the user's own id."""
        return False

    def fields(self, reader: Reader, excluded_folder: str | None = None) -> list[pa.Field]:  # noqa: ARG002 - the noun's face
        """No columns beyond REF_FIELDS."""
        return []

    def version(self, reader: Reader, excluded_folder: str | None = None) -> str | None:  # noqa: ARG002 - the noun's face
        """None: only listing again would tell."""
        return None

    def refs(self, reader: Reader, after: Cursor, excluded_folder: str | None = None) -> Iterator[pa.RecordBatch]:
        """Batches of REF_FIELDS, at least one; `uri` and `location` are the listed URI.

        Args:
            after: goes on behind its `last` location.
            outside: URI of a folder whose objects are never listed.

        Raises:
            InvalidJob: nothing there, or all of it lies in `outside`.
        """
        place = require_location(reader, self.uri)
        last = None if after.last is None else _ESCAPED.sub(lambda odd: chr(0xDC00 + int(odd[1], 16)), after.last)
        stats = self._images(place, list_location(reader, place, last, self.recursive, excluded_folder))
        return skip_empty_batches(map(_batch, iter(lambda: list(itertools.islice(stats, BATCH_ROWS)), [])), _SCHEMA)

    def explain_missing(self, reader: Reader) -> str | None:
        """Why the input is not there yet, as a sentence; None when it may be planned (or nothing is required)."""
        return self.require.explain_missing(reader, self.uri) if self.require else None

    def _images(self, place: InputLocation, stats: Iterator[ObjectInfo]) -> Iterator[ObjectInfo]:
        endings = None if self.extensions == "all" else self.extensions
        chosen = locations.make_path_filter(self.include, self.exclude) if self.include or self.exclude else None
        marker = place.folder + self.require.marker if self.require and self.require.marker else None
        cut = len(place.folder)
        for stat in stats:
            if endings and not stat.uri.lower().endswith(endings):
                continue
            if stat.uri != marker and (chosen is None or chosen(stat.uri[cut:])):
                yield stat


def _batch(stats: list[ObjectInfo]) -> pa.RecordBatch:
    uris = _texts([stat.uri for stat in stats])
    sizes = pa.array([stat.size for stat in stats], pa.int64())
    etags = pa.array([stat.etag for stat in stats], pa.string())
    return pa.RecordBatch.from_arrays([uris, uris, sizes, etags], schema=_SCHEMA)


def _texts(uris: list[str]) -> pa.StringArray:
    try:
        return pa.array(uris, pa.string())
    except UnicodeEncodeError:
        return pa.array([uri.encode("utf-8", "backslashreplace").decode() for uri in uris], pa.string())
