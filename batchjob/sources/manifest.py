"""`type: manifest`: images named by a table: Parquet, CSV or JSON Lines, with columns for the output."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Generator, Iterator
from contextlib import AbstractContextManager
from typing import TYPE_CHECKING, Annotated, Literal

import pyarrow as pa
import pyarrow.compute as pc
from pydantic import AfterValidator, Field

from batchjob.arrow_types import plain_type
from batchjob.errors import InvalidJob
from batchjob.settings import Uri
from batchjob.sources.column_types import (
    can_cast,
    cast_column,
    holds_image_files,
    is_stored_text,
    require_column,
    require_known_type,
)
from batchjob.sources.hive_folders import HiveFolders
from batchjob.sources.locations import normalize_uri, parent_folder, require_places, with_trailing_slash
from batchjob.sources.manifest_files import list_manifest_files
from batchjob.sources.manifest_locations import are_below, resolve_locations
from batchjob.sources.passthrough import ColumnName, Passthrough, parse_passthrough
from batchjob.sources.source import IMAGE_EXTENSIONS, REF_FIELDS, Require, Source, skip_empty_batches
from batchjob.sources.table_files import TableFile, TableFormat, open_table
from batchjob.storage.objects import ObjectInfo
from batchjob.text import explain_uri_secret, redact_queries
from batchjob.types import Cursor
from batchjob.uris import CLOUD_SCHEMES, is_local

if TYPE_CHECKING:
    from batchjob.sources.skipped_files import SkippedFiles
    from batchjob.storage.reader import Reader

__all__ = ["ManifestSource"]

# A bucket whose name is odd is looked at.
_LOCAL_OR_CLOUD = rf"^(/|(?i:{'|'.join(CLOUD_SCHEMES)})://[A-Za-z0-9._@-]+(/|$))"
_USER_OR_QUERY = r"^[A-Za-z][A-Za-z0-9+.-]*://([^/?#]*@|(?s:.)*\?)"
_REF_NAMES = frozenset(field.name for field in REF_FIELDS) - {"location"}
_MAX_FOOTERS_READ = 64
_RESERVED_NAMES = {"uri", "size", "etag", "id"}
_DELIMITER_WORDS = {"tab": "\t", "\\t": "\t", "comma": ",", "semicolon": ";", "pipe": "|"}


def _check_delimiter(delimiter: str) -> str:
    delimiter = _DELIMITER_WORDS.get(delimiter, delimiter)
    if len(delimiter) != 1 or not delimiter.isascii() or delimiter.isalnum() or delimiter in '"\r\n':
        raise ValueError(f"{delimiter!r} is no delimiter; give one character, such as ';' or '|', or the word 'tab'")
    return delimiter


_Delimiter = Annotated[str, AfterValidator(_check_delimiter)]


class ManifestSource(Source):
    """Every image that a table names, in the table's order; an image that is named twice is two images.

    Attributes:
        uri: A file, or a folder or glob of part files, which are read in the order of their names. Names that begin
            with `_` or `.` are not read, and neither are the folders below a folder (a glob with `**` reaches them).
        format: Format of the files; `auto` goes by the name of each file. CSV and JSON Lines may be in UTF-8 or UTF-16,
            and compressed with gzip, bzip2, xz, zstd or LZ4, by whichever name.
        delimiter: Character between the columns of CSV files, or `tab`; `auto` takes the comma, `;`, tab or `|` with
            which the first line names the columns of the job.
        uri_column: Column with each image's location: a URI, an absolute path, or a path relative to the manifest's own
            folder. Web hosts, and protocols other than those of buckets and of the manifest itself, are read only if
            `storage` names them.
        passthrough: Columns to copy to the output: names; or names with types, `{sku: int64}`; or with a new name and
            perhaps a type, `{label: {as: label_true, type: int64}}`. Without types, Parquet columns keep theirs, and
            columns of CSV and JSON Lines are text. A column may also be a folder of the file's path, `dt=2026-11-30/`.
        size_column: Column with the size of each image in bytes; null if unknown.
        etag_column: Column with the store's tag of each image; null if unknown.
        id_column: Column that becomes the output's column `id`.
        within: Folder or URI prefix, or several, in which the images must lie, for manifests that others write: a row
            that names another place, also by `..` or a symbolic link, becomes an error row (`refused`). Null allows all
            local paths and buckets.
        require: Conditions under which the input is planned.
    """

    type: Literal["manifest"] = "manifest"
    uri: Uri
    format: Literal["auto", "parquet", "csv", "jsonl"] = "auto"
    delimiter: Literal["auto"] | _Delimiter = "auto"
    uri_column: ColumnName
    passthrough: Passthrough = ()
    size_column: ColumnName | None = None
    etag_column: ColumnName | None = None
    id_column: ColumnName | None = None
    within: Uri | Annotated[tuple[Uri, ...], Field(min_length=1)] | None = None
    require: Require | None = None

    def check(self, reader: Reader) -> None:
        """Check that the manifest exists and has the columns that the settings name. Raises InvalidJob."""
        self.fields(reader)

    @property
    def has_id(self) -> bool:
        """True if `id_column` names one."""
        return self.id_column is not None

    @property
    def prefixes(self) -> tuple[str, ...]:
        """URI prefixes outside of which no image is read; empty for no such limit."""
        return (self.within,) if isinstance(self.within, str) else self.within or ()

    def fields(self, reader: Reader, excluded_folder: str | None = None) -> list[pa.Field]:
        """Return `id` if there is one, then the passthrough columns, all nullable.

        Raises:
            InvalidJob: The manifest does not exist or cannot be read; or a column does not exist, has no type, or
                cannot have the type that the job gives it.
        """
        require_places(self.prefixes)
        return self._read_fields(reader, self._list_files(reader, excluded_folder, refuse_tables=True))

    def version(self, reader: Reader, excluded_folder: str | None = None) -> str | None:
        """Return the SHA-256 over URI, size and tag of each file, hexadecimal."""
        files = [[info.uri, info.size, info.etag] for info in self.list_files(reader, excluded_folder)]
        return hashlib.sha256(json.dumps(files).encode()).hexdigest()

    def count_images(self, reader: Reader, excluded_folder: str | None = None) -> int | None:
        """Return the rows that the footers of Parquet files state; None for other formats and for very many files."""
        import pyarrow.parquet as pq

        files = self._list_files(reader, excluded_folder)
        if len(files) > _MAX_FOOTERS_READ or any(table_format != "parquet" for _, table_format in files):
            return None
        rows = 0
        for info, _ in files:
            with reader.open(info.uri) as file, pq.ParquetFile(file) as table:
                rows += table.metadata.num_rows
        return rows

    def list_files(self, reader: Reader, excluded_folder: str | None = None) -> list[ObjectInfo]:
        """Return the files of the manifest, in the order in which they are read. Raises InvalidJob."""
        return [info for info, _ in self._list_files(reader, excluded_folder)]

    def refs(
        self,
        reader: Reader,
        after: Cursor,
        excluded_folder: str | None = None,
        skipped: SkippedFiles | None = None,  # noqa: ARG002 - Source
    ) -> Iterator[pa.RecordBatch]:
        """Yield batches of `REF_FIELDS` and `fields()`, at least one; `uri` stands as in the manifest.

        Args:
            reader: Reader with the job's storage options.
            after: Cursor whose `rows` are skipped.
            excluded_folder: URI of a folder that is never read: its files are not part of the manifest, and a row that
                names an object in it is an error (if it were left out, the rows that a cursor counts would shift).
            skipped: Not added to: every row is an image.

        Raises:
            InvalidJob: As `fields()`; or a row has no URI, or a value that does not fit its type.
        """
        files = self._list_files(reader, excluded_folder, refuse_tables=True)
        schema = pa.schema([*REF_FIELDS, *self._read_fields(reader, files)])
        return skip_empty_batches(self._read_files(reader, files, schema, after.rows, excluded_folder), schema)

    @property
    def _columns(self) -> dict[str, str]:
        """Column of the refs → column of the manifest."""
        named = {"uri": self.uri_column, "size": self.size_column, "etag": self.etag_column, "id": self.id_column}
        copied = {column.name: column.column for column in parse_passthrough(self.passthrough)}
        return {name: column for name, column in named.items() if column} | copied

    def _list_files(
        self, reader: Reader, excluded_folder: str | None, *, refuse_tables: bool = False
    ) -> list[tuple[ObjectInfo, TableFormat]]:
        requested_format = None if self.format == "auto" else self.format
        return list_manifest_files(reader, self.uri, requested_format, excluded_folder, refuse_tables=refuse_tables)

    def _open(self, reader: Reader, uri: str, table_format: TableFormat) -> AbstractContextManager[TableFile]:
        delimiter = None if self.delimiter == "auto" else self.delimiter
        return open_table(reader, uri, table_format, tuple(self._columns.values()), delimiter)

    def _read_fields(self, reader: Reader, files: list[tuple[ObjectInfo, TableFormat]]) -> list[pa.Field]:
        """Return the fields after `REF_FIELDS`, by the first file that has columns at all."""
        names = [name for name in self._columns if name not in _REF_NAMES]
        for info, table_format in files:
            with self._open(reader, info.uri, table_format) as file:
                if file.schema.names:
                    self._check_columns(file, info.uri)
                    return [pa.field(name, self._target_type(file, info.uri, name)) for name in names]
        first, table_format = files[0]
        if table_format == "csv":
            raise InvalidJob(f"input.uri: {first.uri} is empty; its first line must name its columns")
        return [pa.field(name, self._type_in_job(name) or pa.string()) for name in names]

    def _check_columns(self, file: TableFile, uri: str) -> None:
        described = uri if file.schema_is_complete else f"{uri} (in its first rows)"
        names = file.schema.names
        folders = HiveFolders(uri).names
        if self.uri_column not in names and any(name.lower().endswith(IMAGE_EXTENSIONS) for name in names):
            raise InvalidJob(
                f"input.uri: {uri} begins with a row of images, not with the names of its columns; "
                f"give it a first line with them, such as: {self.uri_column}"
            )
        for name, column in self._columns.items():
            if name == "uri" or column in names or column not in folders:
                available = names if name == "uri" else [*names, *(folder for folder in folders if folder not in names)]
                require_column(available, column, described, self._job_key(name))
        stored = file.schema.field(self.uri_column).type
        if holds_image_files(stored):
            raise self._image_files_error(uri)
        stored = plain_type(stored)
        if not is_stored_text(stored) and not pa.types.is_null(stored):
            raise InvalidJob(f"input.uri_column: column {self.uri_column!r} of {uri} is {stored}; it must be text")

    def _image_files_error(self, uri: str) -> InvalidJob:
        return InvalidJob(
            f"input.uri_column: column {self.uri_column!r} of {uri} holds the bytes of images, but batchjob reads them "
            f"from files; write each row's bytes to a file or object, and name a column with their paths"
        )

    def _target_type(self, file: TableFile, uri: str, name: str) -> pa.DataType:
        column = self._columns[name]
        is_in_file = column in file.schema.names
        stored = file.schema.field(column).type if is_in_file else pa.string()
        target = self._type_in_job(name)
        if target is None:
            require_known_type(stored, uri, column, self._job_key(name))
            return plain_type(stored)
        if not can_cast(stored, target):
            key = self._job_key(name)
            raise InvalidJob(f"{key}: column {column!r} of {uri} is {stored} and cannot become {target}")
        return target

    def _type_in_job(self, name: str) -> pa.DataType | None:
        return next((column.type for column in parse_passthrough(self.passthrough) if column.name == name), None)

    def _job_key(self, name: str) -> str:
        return f"input.{name}_column" if name in _RESERVED_NAMES else "input.passthrough"

    def _read_files(
        self,
        reader: Reader,
        files: list[tuple[ObjectInfo, TableFormat]],
        schema: pa.Schema,
        skip: int,
        excluded_folder: str | None,
    ) -> Iterator[pa.RecordBatch]:
        """Yield the rows of all files after the first `skip`: of files of 5 and 4 rows, `skip=7` leaves 2 rows."""
        for info, table_format in files:
            rows = yield from self._read_file(reader, info.uri, table_format, schema, skip, excluded_folder)
            skip = max(0, skip - rows)

    def _read_file(
        self,
        reader: Reader,
        uri: str,
        table_format: TableFormat,
        schema: pa.Schema,
        skip: int,
        excluded_folder: str | None,
    ) -> Generator[pa.RecordBatch, None, int]:
        """Yield the rows of a file after the first `skip`; return the number of all its rows."""
        with self._open(reader, uri, table_format) as file:
            if file.schema_is_complete and file.schema.names:
                self._check_columns(file, uri)
            columns = list(dict.fromkeys(self._columns.values()))
            if file.schema_is_complete and file.schema.names:
                columns = [column for column in columns if column in file.schema.names]
            batches = file.read_rows(columns, skip)
            while True:
                try:
                    first_row, batch = next(batches)
                except StopIteration as end:
                    return int(end.value)
                refs = self._to_refs(batch, schema, uri, first_row, excluded_folder)
                self._check_access(reader, refs, uri, first_row)
                yield refs

    def _to_refs(
        self, batch: pa.RecordBatch, schema: pa.Schema, uri: str, first_row: int, excluded_folder: str | None
    ) -> pa.RecordBatch:
        arrays = {}
        columns, folders = self._columns, HiveFolders(uri)
        if holds_image_files(batch.schema.field(self.uri_column).type, batch.column(self.uri_column)):
            raise self._image_files_error(uri)
        for field in schema:
            if (column := columns.get(field.name)) is None:
                arrays[field.name] = pa.nulls(batch.num_rows, field.type)
                continue
            if column in batch.schema.names:
                arrays[field.name] = cast_column(batch.column(column), field.type, uri, column, first_row)
            if field.name != "uri" and column in folders.names:
                in_folder = folders.column(column, field.type, batch.num_rows)
                if column in batch.schema.names:
                    folders.check_agrees(column, in_folder, arrays[field.name], first_row)
                arrays[field.name] = in_folder
        self._check_values(arrays, uri, first_row)
        arrays["etag"] = pc.utf8_trim(arrays["etag"], '"')
        arrays["location"] = resolve_locations(arrays["uri"], parent_folder(uri))
        if excluded_folder is not None:
            is_excluded = are_below(arrays["location"], with_trailing_slash(normalize_uri(excluded_folder)))
            if (row := _first_true(is_excluded)) >= 0:
                raise InvalidJob(
                    f"{uri}, row {first_row + row + 1}: {arrays['uri'][row]} lies in the output {excluded_folder}, "
                    f"which is never read as input; give output.uri a folder of its own"
                )
        return pa.RecordBatch.from_arrays([arrays[name] for name in schema.names], schema=schema)

    def _check_values(self, arrays: dict[str, pa.Array], uri: str, first_row: int) -> None:
        empty = pa.scalar("")  # Not at import: pyarrow imports pandas for it, which takes 0.15 s.
        is_empty = pc.equal(pc.utf8_trim_whitespace(pc.fill_null(arrays["uri"], empty)), empty)
        is_negative = pc.less(arrays["size"], pa.scalar(0))
        for flags, problem in (
            (is_empty, f"no image in column {self.uri_column!r}; fill it, or drop the row"),
            (is_negative, f"a negative size in column {self.size_column!r}; correct it"),
        ):
            if (row := _first_true(flags)) >= 0:
                raise InvalidJob(f"{uri}, row {first_row + row + 1}: {problem}")

    def _check_access(self, reader: Reader, refs: pa.RecordBatch, uri: str, first_row: int) -> None:
        """Raise InvalidJob for a row whose location holds a secret, or leads to a host that the job does not name."""
        locations = refs.column("location")
        for row in _true_rows(pc.match_substring_regex(locations, _USER_OR_QUERY)):
            location = locations[row].as_py()
            if not is_local(location) and (reason := explain_uri_secret(location)):
                raise InvalidJob(f"{uri}, row {first_row + row + 1}: {redact_queries(location)} {reason}")
        # One question per host, because a manifest may name millions of images on the same one.
        refusals: dict[str, str | None] = {}
        for row in _true_rows(pc.invert(pc.match_substring_regex(locations, _LOCAL_OR_CLOUD))):
            location = locations[row].as_py()
            host = location if "::" in location else "/".join(location.split("/", 3)[:3])
            if host not in refusals:
                refusals[host] = reader.explain_refusal(location, self.uri)
            if reason := refusals[host]:
                raise InvalidJob(f"{uri}, row {first_row + row + 1}: {location} {reason}")


def _true_rows(flags: pa.BooleanArray) -> list[int]:
    rows: list[int] = pc.indices_nonzero(flags).to_pylist()
    return rows


def _first_true(flags: pa.BooleanArray) -> int:
    """Return the first row that is true; -1 if none is."""
    return int(pc.index(flags, pa.scalar(True)).as_py())
