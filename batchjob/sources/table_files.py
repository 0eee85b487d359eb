"""Table files read batch by batch: Parquet with its own types, CSV and JSON Lines as text."""

from __future__ import annotations

import csv
import itertools
import json
import lzma
import re
import zlib
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import PurePosixPath
from typing import TYPE_CHECKING, Any, BinaryIO, Literal, Protocol

import pyarrow as pa
import pyarrow.parquet as pq

from batchjob.errors import AddressRefused, InvalidJob, NotFound, Unavailable
from batchjob.sources.csv_file import CsvFile
from batchjob.sources.source import BATCH_ROWS, RowBatches
from batchjob.sources.text_stream import open_text
from batchjob.uris import split_chain

if TYPE_CHECKING:
    from batchjob.storage.reader import Reader

__all__ = ["TableFile", "TableFormat", "guess_table_format", "open_table"]

TableFormat = Literal["parquet", "csv", "jsonl"]
_FORMAT_BY_ENDING: dict[str, TableFormat] = {
    ".parquet": "parquet",
    ".pq": "parquet",
    ".csv": "csv",
    ".tsv": "csv",
    ".jsonl": "jsonl",
    ".ndjson": "jsonl",
    ".json": "jsonl",
}
_COMPRESSED_ENDING = re.compile(r"\.(gz|bz2|zst|xz|lz4)$")
# Bytes read ahead in each column of a Parquet file: pages stream in, never a whole column chunk.
_PARQUET_BUFFER_BYTES = 4 << 20
_JSON_BLOCK_BYTES = 1 << 20
_MAX_JSON_LINE_BYTES = 64 << 20
_SCHEMA_ROWS = 1000  # lines of a JSON Lines file that are read for its columns


class TableFile(Protocol):
    """An open table file.

    Attributes:
        schema_is_complete: True if `schema` has all columns; False for JSON Lines, where later lines may have more.
        schema: Columns and their types, all of them text in text formats; no columns if the file is empty.
    """

    schema_is_complete: bool
    schema: pa.Schema

    def read_rows(self, names: Sequence[str], skip: int) -> RowBatches:
        """Yield the rows after the first `skip`, at most `BATCH_ROWS` in a batch.

        For example, a file of 3 rows with `skip=1` yields `(1, batch of 2 rows)` and returns 3.

        Args:
            names: Columns to read, in this order.
            skip: Number of rows that are left out.
        """


def guess_table_format(uri: str, alone: bool = False) -> TableFormat | None:
    """Return the format by the ending of a name; None if the ending is unknown.

    Args:
        uri: URI of the file.
        alone: True if it is the only file: in a folder, `.txt` files are rarely tables.
    """
    name = split_chain(uri)[0].lower()
    ending = PurePosixPath(plain := _COMPRESSED_ENDING.sub("", name)).suffix
    if ending == ".txt" and alone:
        return "csv"
    found = _FORMAT_BY_ENDING.get(ending)
    return found if found != "parquet" or plain == name else None


@contextmanager
def open_table(
    reader: Reader, uri: str, table_format: TableFormat, columns: Sequence[str], delimiter: str | None = None
) -> Iterator[TableFile]:
    """Open a table file; each fault of the file, also while rows are read, is an InvalidJob that names it.

    Args:
        reader: Reader with the job's storage options.
        uri: URI of the file.
        table_format: Its format.
        columns: Columns that will be read.
        delimiter: Delimiter of a CSV file; None goes by its header.

    Raises:
        InvalidJob: The file is gone, or cannot be read in this format.
        Unavailable: The store or the disk fails.
    """
    try:
        with reader.open(uri) as stream:
            if table_format == "parquet":
                yield _ParquetFile(stream)
            elif table_format == "csv":
                yield CsvFile(stream, uri, delimiter, columns)
            else:
                yield _JsonLinesFile(stream, uri)
    except NotFound as error:
        raise InvalidJob(f"input.uri: {uri} is gone since it was listed; run again when it is written") from error
    except AddressRefused as error:
        raise InvalidJob(f"input.uri {error.message}") from error
    except (pa.ArrowException, EOFError, zlib.error, lzma.LZMAError, csv.Error, UnicodeDecodeError) as error:
        raise _unreadable_file_error(uri, table_format, error) from error
    except OSError as error:
        # An error of the disk has a number; the one that Arrow raises for damaged bytes has none.
        if error.errno:
            raise Unavailable(f"{uri}: {error.strerror}; make the file readable, and run again") from error
        raise _unreadable_file_error(uri, table_format, error) from error


def _unreadable_file_error(uri: str, table_format: TableFormat, error: Exception) -> InvalidJob:
    reason = re.sub(r"\s+", " ", str(error)).strip(" .")[:200]
    advices = (
        ("UTF8", "save it as UTF-8"),
        ("Expected", "put a value that holds the delimiter into quotes, or give another input.delimiter"),
        ("straddling", "a row may have 1 MiB; close the quote that is open there"),
        ("end-of-stream", "it is cut off: copy it there again"),
        ("", "write it again, or give its format in input.format"),
    )
    advice = next(advice for word, advice in advices if word in reason)
    return InvalidJob(f"input.uri: {uri} cannot be read as {table_format} ({reason}); {advice}")


class _ParquetFile:
    schema_is_complete = True

    def __init__(self, stream: BinaryIO) -> None:
        self._file = pq.ParquetFile(stream, buffer_size=_PARQUET_BUFFER_BYTES, pre_buffer=False)
        self.schema: pa.Schema = self._file.schema_arrow

    def read_rows(self, names: Sequence[str], skip: int) -> RowBatches:
        metadata = self._file.metadata
        # Row groups that are skipped as a whole are not read: of groups of 5 rows, `skip=12` begins with the third.
        first_row, first_group = 0, 0
        while first_group < metadata.num_row_groups and first_row + metadata.row_group(first_group).num_rows <= skip:
            first_row += metadata.row_group(first_group).num_rows
            first_group += 1
        groups = list(range(first_group, metadata.num_row_groups))
        for batch in self._file.iter_batches(BATCH_ROWS, row_groups=groups, columns=list(names)):
            # Arrow's Parquet reader does not check that text is UTF-8.
            batch.validate(full=True)
            cut = max(0, skip - first_row)
            if cut < batch.num_rows:
                yield first_row + cut, batch.select(names).slice(cut)
            first_row += batch.num_rows
        return int(metadata.num_rows)


class _JsonLinesFile:
    """A JSON Lines file as text: numbers as they are written, `true`, `false`, and nested values as JSON."""

    schema_is_complete = False

    def __init__(self, stream: BinaryIO, uri: str) -> None:
        self._stream, self._uri = stream, uri
        self._decode = json.JSONDecoder(
            object_pairs_hook=_to_row, parse_int=str, parse_float=str, parse_constant=str
        ).decode
        names = dict.fromkeys(
            name
            for number, line in itertools.islice(self._read_lines(), _SCHEMA_ROWS)
            for name in self._parse_row(number, line)
        )
        self.schema: pa.Schema = pa.schema([pa.field(name, pa.string()) for name in names])

    def read_rows(self, names: Sequence[str], skip: int) -> RowBatches:
        lines, first_row = self._read_lines(), 0
        while batch := list(itertools.islice(lines, BATCH_ROWS)):
            end = first_row + len(batch)
            if end > skip:
                cut = max(0, skip - first_row)
                yield first_row + cut, self._parse_batch(batch[cut:], names)
            first_row = end
        return first_row

    def _parse_batch(self, lines: list[tuple[int, bytes]], names: Sequence[str]) -> pa.RecordBatch:
        rows = [self._parse_row(number, line) for number, line in lines]
        columns = []
        for name in names:
            values = [row.get(name) for row in rows]
            if not all(value is None or isinstance(value, str) for value in values):
                values = [_to_text(value, line, name) for value, (_, line) in zip(values, lines, strict=True)]
            columns.append(values)
        try:
            arrays = [pa.array(values, pa.string()) for values in columns]
        except UnicodeEncodeError as error:
            number = next(number for number, line in lines if b"\\u" in line and _has_surrogate(line))
            raise self._line_error(number, "half a surrogate pair is no text; correct it") from error
        return pa.RecordBatch.from_arrays(arrays, names=list(names))

    def _parse_row(self, number: int, line: bytes) -> dict[str, Any]:
        try:
            row = self._decode(line.decode())
        except (ValueError, RecursionError) as error:
            whole = line.startswith(b"[") or line == b"{"
            advice = "write one object a line, as `jq -c .[]` does of an array" if whole else "correct it"
            raise self._line_error(number, f"not JSON ({error}); {advice}") from error
        if not isinstance(row, dict):
            raise self._line_error(
                number, "not a JSON object; write one object a line, as `jq -c .[]` does of an array"
            )
        return row

    def _line_error(self, number: int, problem: str) -> InvalidJob:
        return InvalidJob(f"input.uri: {self._uri}, line {number}: {problem}")

    def _read_lines(self) -> Iterator[tuple[int, bytes]]:
        """Yield the lines that are not blank, with their number from 1."""
        source = open_text(self._stream, self._uri)
        number, rest = 0, b""
        while block := source.read(_JSON_BLOCK_BYTES):
            *lines, rest = (rest + block).split(b"\n")
            for line in lines:
                number += 1
                if line := line.strip():
                    yield number, line
            if len(rest) > _MAX_JSON_LINE_BYTES:
                raise self._line_error(number + 1, "longer than 64 MiB; write one object a line")
        if rest := rest.strip():
            yield number + 1, rest


def _to_row(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    row = dict(pairs)
    if len(row) < len(pairs):
        duplicate = next(name for name, count in Counter(name for name, _ in pairs).items() if count > 1)
        raise ValueError(f"{duplicate!r} is named twice in one object")
    return row


def _to_text(value: Any, line: bytes, name: str) -> str | None:
    if value is None or isinstance(value, str):
        return value
    if isinstance(value, bool):
        return "true" if value else "false"
    # The line is decoded once more, because the numbers inside the value have become text.
    return json.dumps(json.loads(line)[name], ensure_ascii=False)


def _has_surrogate(line: bytes) -> bool:
    return re.search(r"[\ud800-\udfff]", json.dumps(json.loads(line), ensure_ascii=False)) is not None
