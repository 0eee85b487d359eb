"""Images named by a table: Parquet, CSV or JSON Lines, one file or many, with columns to pass on to the output."""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Generator, Iterator
from pathlib import PurePosixPath
from typing import TYPE_CHECKING, Annotated, Literal

import pyarrow as pa
import pyarrow.compute as pc
from pydantic import AfterValidator, Field, model_validator

from batchjob.errors import InvalidJob
from batchjob.settings import Settings, Uri, is_local
from batchjob.sources.column_types import (
    can_cast,
    cast_column,
    is_text,
    parse_type,
    plain_type,
    require_column,
    require_known_type,
)
from batchjob.sources.locations import (
    InputLocation,
    list_location,
    normalize_uri,
    parent_folder,
    require_location,
    with_trailing_slash,
)
from batchjob.sources.source import REF_FIELDS, Require, skip_empty_batches
from batchjob.sources.table_files import TableFile, TableFormat, guess_table_format, open_table
from batchjob.storage.objects import ObjectInfo
from batchjob.text import explain_uri_secret, redact_queries
from batchjob.types import Cursor

if TYPE_CHECKING:
    from batchjob.storage.reader import Reader

__all__ = ["ManifestSource"]

_ABSOLUTE = r"^(/|[A-Za-z][A-Za-z0-9+.-]*://)"
_DOTS = r"(^|/)\.\.?(/|$)"
_LOCAL_OR_CLOUD = r"^(/|(file|s3|s3a|s3n|gs|gcs|az|abfs|abfss)://)"
_WITH_MORE = r"^[A-Za-z][A-Za-z0-9+.-]*://([^/?#]*@|(?s:.)*\?)"
_EMPTY = pa.scalar("")  # given bare, pyarrow would import pandas to look at it
_OURS = {"uri", "location", "size", "etag", "id"}


def _is_type(name: str) -> str:
    parse_type(name)
    return name


def _once(names: tuple[str, ...]) -> tuple[str, ...]:
    if twice := sorted({name for name in names if names.count(name) > 1}):
        raise ValueError(f"names {', '.join(map(repr, twice))} twice")
    return names


_Name = Annotated[str, Field(min_length=1)]
_Names = Annotated[tuple[_Name, ...], AfterValidator(_once)]
_Types = dict[_Name, Annotated[str, AfterValidator(_is_type)]]


class ManifestSource(Settings):
    """Every image that a table names, in the table's order; one named twice is two images.

    Attributes:
        uri: a file, or a folder or glob of part files, read in the order of their names. Names that begin with `_` or
            `.` are no parts; neither is what lies in folders below a folder (a glob with `**` reaches it).
        format: by the name of each file where `auto`. CSV and JSON Lines may be gzipped (`.gz`).
        uri_column: where each image lies: a URI, an absolute path, or a path relative to the manifest's own folder. Web
            hosts, and protocols but those of buckets and of the manifest itself, only where `storage` names them.
        passthrough: columns to copy to the output: names, or names with types. Without types, Parquet keeps its own
            and CSV and JSON Lines are text.
        size_column: bytes of each image; null where unknown.
        etag_column: the store's tag of each image; null where unknown.
        id_column: becomes the output's column `id`.
        require: what must be there before anything is planned.
    """

    type: Literal["manifest"] = "manifest"
    uri: Uri
    format: Literal["auto", "parquet", "csv", "jsonl"] = "auto"
    uri_column: _Name
    passthrough: _Names | _Types = ()
    size_column: _Name | None = None
    etag_column: _Name | None = None
    id_column: _Name | None = None
    require: Require | None = None

    @model_validator(mode="after")
    def _no_clash(self) -> ManifestSource:
        if clash := sorted(_OURS.intersection(self.passthrough)):
            raise ValueError(
                f"passthrough: {', '.join(map(repr, clash))} is what batchjob calls a column of its own; "
                f"rename it in the manifest, or leave it out (uri, size, etag and id have keys of their own here)"
            )
        return self

    def check(self, reader: Reader) -> None:
        """Look whether the manifest is there and has the columns that are named. Raises InvalidJob."""
        self.fields(reader)

    @property
    def has_id(self) -> bool:
        """Whether the first of `fields` is the user's own id."""
        return self.id_column is not None

    def fields(self, reader: Reader, excluded_folder: str | None = None) -> list[pa.Field]:
        """`id` where there is one, then the passthrough columns, all nullable.

        Raises:
            InvalidJob: nothing there, not readable, a column is not there, has no type or cannot become the one given.
        """
        return self._fields(reader, self._parts(reader, excluded_folder))

    def version(self, reader: Reader, excluded_folder: str | None = None) -> str | None:
        """sha256 over URI, size and etag of each file."""
        facts = [[stat.uri, stat.size, stat.etag] for stat, _ in self._parts(reader, excluded_folder)]
        return hashlib.sha256(json.dumps(facts).encode()).hexdigest()

    def refs(self, reader: Reader, after: Cursor, excluded_folder: str | None = None) -> Iterator[pa.RecordBatch]:
        """Batches of REF_FIELDS + `fields()`, at least one; `uri` as the manifest gives it.

        Args:
            after: goes on behind as many `rows`.
            outside: URI of a folder that is never read: its files are no parts, and a row that names an object in it
                is refused (left out, it would shift the rows that a cursor counts).

        Raises:
            InvalidJob: as `fields()`; a row without URI, or with a value that does not fit its type.
        """
        parts = self._parts(reader, excluded_folder)
        schema = pa.schema([*REF_FIELDS, *self._fields(reader, parts)])
        return skip_empty_batches(self._batches(reader, parts, schema, after.rows, excluded_folder), schema)

    def explain_missing(self, reader: Reader) -> str | None:
        """Why the input is not there yet, as a sentence; None when it may be planned (or nothing is required)."""
        return self.require.explain_missing(reader, self.uri) if self.require else None

    @property
    def _columns(self) -> dict[str, str]:
        """Column of the refs → column of the manifest."""
        named = {"uri": self.uri_column, "size": self.size_column, "etag": self.etag_column, "id": self.id_column}
        return {name: column for name, column in named.items() if column} | {name: name for name in self.passthrough}

    def _parts(self, reader: Reader, outside: str | None) -> list[tuple[ObjectInfo, TableFormat]]:
        place = require_location(reader, self.uri)
        stats = [
            stat
            for stat in list_location(reader, place, None, False, outside)
            if place.file or not _hidden(stat, place)
        ]
        if self.format != "auto":
            fits = {None, self.format}
            parts: list[tuple[ObjectInfo, TableFormat]] = [
                (stat, self.format) for stat in stats if place.file or guess_table_format(stat.uri) in fits
            ]
        else:
            parts = [(stat, kind) for stat in stats if (kind := guess_table_format(stat.uri))]
        if place.file and not parts:
            raise InvalidJob(f"input.uri {place.uri}: no known ending; give input.format: parquet, csv or jsonl")
        if not parts:
            raise InvalidJob(
                f"input.uri {place.uri}: no manifest files in it ({len(stats)} others); name a file, give "
                f"input.format, or reach into folders below with '**/*.parquet'"
            )
        if len(kinds := sorted({kind for _, kind in parts})) > 1:
            raise InvalidJob(
                f"input.uri {place.uri}: both {' and '.join(kinds)} files; choose with a glob or input.format"
            )
        return parts

    def _fields(self, reader: Reader, parts: list[tuple[ObjectInfo, TableFormat]]) -> list[pa.Field]:
        """By the first file that has columns at all."""
        for stat, kind in parts:
            with open_table(reader, stat.uri, kind) as file:
                if file.schema.names:
                    self._check_columns(file, stat.uri)
                    return [
                        pa.field(name, self._target(file, stat.uri, name, column))
                        for name, column in self._columns.items()
                        if name not in {"uri", "size", "etag"}
                    ]
        if parts[0][1] == "csv":
            raise InvalidJob(f"input.uri: {parts[0][0].uri} is empty; its first line must name its columns")
        names = [name for name in self._columns if name not in {"uri", "size", "etag"}]
        return [pa.field(name, self._given(name) or pa.string()) for name in names]

    def _check_columns(self, file: TableFile, uri: str) -> None:
        where = uri if file.schema_is_complete else f"{uri} (in its first rows)"
        for name, column in self._columns.items():
            require_column(file.schema.names, column, where, self._key(name))
        stored = plain_type(file.schema.field(self.uri_column).type)
        if not is_text(stored) and not pa.types.is_null(stored):
            raise InvalidJob(f"input.uri_column: column {self.uri_column!r} of {uri} is {stored}; it must be text")

    def _target(self, file: TableFile, uri: str, name: str, column: str) -> pa.DataType:
        stored = file.schema.field(column).type
        target = self._given(name)
        if target is None:
            require_known_type(stored, uri, column, self._key(name))
            return plain_type(stored)
        if not can_cast(stored, target):
            raise InvalidJob(f"{self._key(name)}: column {column!r} of {uri} is {stored} and cannot become {target}")
        return target

    def _given(self, name: str) -> pa.DataType | None:
        typed = self.passthrough if isinstance(self.passthrough, dict) else {}
        return parse_type(typed[name]) if name in typed else None

    def _key(self, name: str) -> str:
        return "input.passthrough" if name in self.passthrough else f"input.{name}_column"

    def _batches(
        self,
        reader: Reader,
        parts: list[tuple[ObjectInfo, TableFormat]],
        schema: pa.Schema,
        skip: int,
        outside: str | None,
    ) -> Iterator[pa.RecordBatch]:
        for stat, kind in parts:
            rows = yield from self._part(reader, stat, kind, schema, skip, outside)
            skip = max(0, skip - rows)

    def _part(
        self, reader: Reader, stat: ObjectInfo, kind: TableFormat, schema: pa.Schema, skip: int, outside: str | None
    ) -> Generator[pa.RecordBatch, None, int]:
        with open_table(reader, stat.uri, kind) as file:
            if file.schema_is_complete and file.schema.names:
                self._check_columns(file, stat.uri)
            batches = file.read_rows(list(dict.fromkeys(self._columns.values())), skip)
            while True:
                try:
                    start, batch = next(batches)
                except StopIteration as end:
                    return int(end.value)
                refs = self._refs(batch, schema, stat.uri, start, outside)
                self._check_locations(reader, refs, stat.uri, start)
                yield refs

    def _refs(
        self, batch: pa.RecordBatch, schema: pa.Schema, file: str, start: int, outside: str | None
    ) -> pa.RecordBatch:
        arrays = {}
        for field in schema:
            if (column := self._columns.get(field.name)) is not None:
                arrays[field.name] = cast_column(batch.column(column), field.type, file, column, start)
            else:
                arrays[field.name] = pa.nulls(batch.num_rows, field.type)
        self._check_rows(arrays, file, start)
        arrays["etag"] = pc.utf8_trim(arrays["etag"], '"')
        arrays["location"] = resolve_locations(arrays["uri"], parent_folder(file))
        if outside is not None:
            inside = pc.starts_with(arrays["location"], with_trailing_slash(normalize_uri(outside)))
            if (row := _first(inside)) >= 0:
                raise InvalidJob(
                    f"{file}, row {start + row + 1}: {arrays['uri'][row]} lies in the output {outside}, which is never "
                    f"read as input; give output.uri a folder of its own"
                )
        return pa.RecordBatch.from_arrays([arrays[name] for name in schema.names], schema=schema)

    def _check_rows(self, arrays: dict[str, pa.Array], file: str, start: int) -> None:
        empty = pc.equal(pc.utf8_trim_whitespace(pc.fill_null(arrays["uri"], _EMPTY)), _EMPTY)
        negative = pc.less(arrays["size"], pa.scalar(0))
        for bad, said in (
            (empty, f"no image in column {self.uri_column!r}; fill it, or drop the row"),
            (negative, f"a negative size in column {self.size_column!r}; correct it"),
        ):
            if (row := _first(bad)) >= 0:
                raise InvalidJob(f"{file}, row {start + row + 1}: {said}")

    def _check_locations(self, reader: Reader, refs: pa.RecordBatch, file: str, start: int) -> None:
        """Raises InvalidJob for a row that carries a secret, or that leads where data may not lead."""
        locations = refs.column("location")
        asked: dict[str, str | None] = {}
        for row in _rows(pc.match_substring_regex(locations, _WITH_MORE)):
            if not is_local(uri := locations[row].as_py()) and (why := explain_uri_secret(uri)):
                raise InvalidJob(f"{file}, row {start + row + 1}: {redact_queries(uri)} {why}")
        for row in _rows(pc.invert(pc.match_substring_regex(locations, _LOCAL_OR_CLOUD))):
            uri = locations[row].as_py()
            site = uri if "::" in uri else "/".join(uri.split("/", 3)[:3])
            if site not in asked:
                asked[site] = reader.explain_refusal(uri, self.uri)
            if why := asked[site]:
                raise InvalidJob(f"{file}, row {start + row + 1}: {uri} {why}")


def resolve_locations(uris: pa.StringArray, folder: str) -> pa.StringArray:
    """Where each image is read: what is absolute as it stands, the rest below `folder` (ends with `/`)."""
    absolute = pc.match_substring_regex(uris, _ABSOLUTE)
    joined = pc.if_else(absolute, uris, pc.binary_join_element_wise(pa.scalar(folder), uris, _EMPTY))
    dotted = pc.and_not(pc.match_substring_regex(uris, _DOTS), absolute)
    if not pc.any(dotted).as_py():
        return joined
    straight = [_straight(uri.as_py()) for uri in joined.filter(dotted)]
    return pc.replace_with_mask(joined, dotted, pa.array(straight, pa.string()))


def _rows(flags: pa.BooleanArray) -> list[int]:
    """Those that are true."""
    found: list[int] = pc.indices_nonzero(flags).to_pylist()
    return found


def _first(flags: pa.BooleanArray) -> int:
    return int(pc.index(flags, pa.scalar(True)).as_py())


def _straight(uri: str) -> str:
    """Without `.` and `..`, which no object store knows; left alone where it climbs out of the bucket."""
    scheme = re.match(r"[A-Za-z][A-Za-z0-9+.-]*://[^/]*/|/", uri)
    root = scheme[0] if scheme else ""
    kept: list[str] = []
    for segment in uri.removeprefix(root).split("/"):
        if segment == ".." and not kept and not is_local(uri):
            return uri
        if segment == "..":
            kept = kept[:-1]
        elif segment != ".":
            kept.append(segment)
    return root + "/".join(kept)


def _hidden(stat: ObjectInfo, place: InputLocation) -> bool:
    return any(name.startswith(("_", ".")) for name in PurePosixPath(stat.uri.removeprefix(place.folder)).parts)
