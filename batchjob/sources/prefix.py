"""`type: prefix`: images listed from storage: everything below a folder, one file, or the files that a glob matches."""

from __future__ import annotations

import itertools
import os
import re
from collections.abc import Iterator
from typing import TYPE_CHECKING, Annotated, Literal

import pyarrow as pa
from pydantic import AfterValidator, Field

from batchjob.settings import Uri
from batchjob.sources.file_selection import FileSelection
from batchjob.sources.glob_patterns import glob_to_regex
from batchjob.sources.locations import list_location, require_location
from batchjob.sources.skipped_files import SkippedFiles
from batchjob.sources.source import BATCH_ROWS, IMAGE_EXTENSIONS, REF_FIELDS, Require, Source, skip_empty_batches
from batchjob.sources.table_files import guess_table_format
from batchjob.storage.objects import ObjectInfo
from batchjob.types import Cursor
from batchjob.uris import encode_path, is_local, local_path, split_chain

if TYPE_CHECKING:
    from batchjob.storage.reader import Reader

__all__ = ["PrefixSource", "suggest_input"]

_SCHEMA = pa.schema(REF_FIELDS)
_ARCHIVES = {"zip": (".zip",), "tar": (".tar", ".tar.gz", ".tgz", ".tar.bz2", ".tbz2", ".tar.xz", ".txz", ".tar.zst")}
_ESCAPED_BYTE = re.compile(r"\\udc([89a-f][0-9a-f])")


def _normalize_extensions(extensions: tuple[str, ...]) -> tuple[str, ...]:
    if not all(extension.strip(".") for extension in extensions):
        raise ValueError("has an empty extension; write 'all' to take every file")
    return tuple("." + extension.lower().lstrip(".") for extension in extensions)


def _check_glob(pattern: str) -> str:
    if not pattern.strip("/"):
        raise ValueError("has an empty pattern")
    try:
        re.compile(glob_to_regex(pattern))
    except re.error as error:
        raise ValueError(f"{pattern!r} is not a glob pattern ({error}); write '[[]' for a literal '['") from error
    return pattern


_Glob = Annotated[str, AfterValidator(_check_glob)]
_Extensions = Annotated[tuple[str, ...], Field(min_length=1), AfterValidator(_normalize_extensions)]


class PrefixSource(Source):
    """Every image below a folder, in the order of their keys.

    Attributes:
        uri: A folder, one file, or a glob: `*`, `?`, `[…]` stay within a folder, `**` crosses folders. A glob matches
            files; one that ends with `/` matches folders and takes everything below them.
        recursive: List the folders below too. A glob says itself how deep it reaches.
        extensions: File extensions to take, in upper or lower case, or `all`.
        include: Globs on the path relative to the folder (of a glob: to its part before the first `*`); only files that
            one of them matches are taken. Like in `.gitignore`, a glob without `/` is matched against each name of the
            path, and a glob that matches a folder matches everything below it.
        exclude: Globs of the same form; files that one of them matches are left out, and folders are not listed.
        hidden: Take hidden names too: those that begin with `.`, and the folder `__MACOSX`. False takes only those that
            `include` or the glob names, as `.thumbs/*.jpg` does.
        require: Conditions under which the input is planned.
    """

    type: Literal["prefix"] = "prefix"
    uri: Uri
    recursive: bool = True
    extensions: Literal["all"] | _Extensions = IMAGE_EXTENSIONS
    include: tuple[_Glob, ...] = ()
    exclude: tuple[_Glob, ...] = ()
    hidden: bool = False
    require: Require | None = None

    def check(self, reader: Reader) -> None:
        """Check that the folder, file or glob's folder exists. Raises InvalidJob."""
        require_location(reader, self.uri)

    def refs(
        self, reader: Reader, after: Cursor, excluded_folder: str | None = None, skipped: SkippedFiles | None = None
    ) -> Iterator[pa.RecordBatch]:
        """Yield batches of `REF_FIELDS`, at least one; `uri` and `location` are the listed URI (see `encode_path`).

        Args:
            reader: Reader with the job's storage options.
            after: Cursor after whose `last` location the listing goes on.
            excluded_folder: URI of a folder whose objects are never listed.
            skipped: Counts of the files that are left out, which are added to while batches are taken.

        Raises:
            InvalidJob: The input does not exist, lies in `excluded_folder`, or a folder below it cannot be read.
        """
        location = require_location(reader, self.uri)
        last = None if after.last is None else _decode_location(after.last)
        selection = FileSelection(
            location,
            extensions=None if self.extensions == "all" else self.extensions,
            include=self.include,
            exclude=self.exclude,
            hidden=self.hidden,
            marker=self.require.marker if self.require else None,
            skipped=SkippedFiles() if skipped is None else skipped,
        )
        listed = list_location(reader, location, last, self.recursive, excluded_folder, selection)
        images = filter(selection.takes, listed)
        return skip_empty_batches(map(_to_batch, iter(lambda: list(itertools.islice(images, BATCH_ROWS)), [])), _SCHEMA)


def suggest_input(uri: str) -> str | None:
    """Return what to write in place of a file that holds no image by its name, but names or holds images, else None."""
    inner, chain = split_chain(uri)
    name = inner.lower()
    if not chain and (kind := next((kind for kind, ends in _ARCHIVES.items() if name.endswith(ends)), None)):
        return f"for the images in this archive write input.uri: {kind}://::{uri}"
    if guess_table_format(uri, alone=True) is not None:
        return "for the images that this table names write input.type: manifest and input.uri_column"
    return None


def _decode_location(location: str) -> str:
    """Return a location of the plan as listings spell it: of a local one its path, with surrogates for odd bytes."""
    if not is_local(location):
        return location
    path = str(local_path(location))
    # Plans of version 0.1 have six characters, `\udcff`, for such a byte.
    return path if os.path.lexists(path) else _ESCAPED_BYTE.sub(lambda byte: chr(0xDC00 + int(byte[1], 16)), path)


def _to_batch(images: list[ObjectInfo]) -> pa.RecordBatch:
    uris = _to_arrow([image.uri for image in images])
    sizes = pa.array([image.size for image in images], pa.int64())
    etags = pa.array([image.etag for image in images], pa.string())
    return pa.RecordBatch.from_arrays([uris, uris, sizes, etags], schema=_SCHEMA)


def _to_arrow(uris: list[str]) -> pa.StringArray:
    try:
        return pa.array(uris, pa.string())
    except UnicodeEncodeError:
        return pa.array(list(map(encode_path, uris)), pa.string())
