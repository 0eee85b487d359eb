"""Files of rows, read a batch at a time: Parquet with its own types, CSV and JSON Lines as text."""

from __future__ import annotations

import csv
import gzip
import io
import itertools
import json
import re
import zlib
from collections import Counter
from collections.abc import Generator, Iterator, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any, BinaryIO, Literal, Protocol

import pyarrow as pa
import pyarrow.csv
import pyarrow.parquet as pq

from batchjob.errors import AddressRefused, InvalidJob, NotFound, Unavailable
from batchjob.sources.source import BATCH_ROWS

if TYPE_CHECKING:
    from batchjob.storage.reader import Reader

__all__ = ["RowBatches", "TableFile", "TableFormat", "guess_table_format", "open_table"]

TableFormat = Literal["parquet", "csv", "jsonl"]
RowBatches = Generator[tuple[int, pa.RecordBatch], None, int]
"""Batches with the row they start at, from 0; in the end the number of rows in the file."""
_ENDINGS: dict[str, TableFormat] = {
    ".parquet": "parquet",
    ".pq": "parquet",
    ".csv": "csv",
    ".csv.gz": "csv",
    ".jsonl": "jsonl",
    ".jsonl.gz": "jsonl",
    ".ndjson": "jsonl",
    ".ndjson.gz": "jsonl",
    ".json": "jsonl",
    ".json.gz": "jsonl",
}
_PARQUET_BUFFER = 4 << 20  # bytes read ahead in each column: pages stream in, never a whole column chunk
_CSV_BLOCK = 1 << 20  # bytes; also the longest row
_JSON_BLOCK = 1 << 20
_LONGEST_LINE = 64 << 20
_PEEKED_ROWS = 1000


class TableFile(Protocol):
    """An open file of rows.

    Attributes:
        whole: whether `schema` holds all columns there are; JSON Lines may have more further down.
        schema: columns and their types; text formats have text only. No columns where the file is empty.
    """

    schema_is_complete: bool
    schema: pa.Schema

    def read_rows(self, names: Sequence[str], skip: int) -> RowBatches:
        """Those columns, in that order, from row `skip` on; at most BATCH_ROWS rows a batch."""


def guess_table_format(uri: str) -> TableFormat | None:
    """What the name says; None where it says nothing."""
    name = uri.lower()
    return next((kind for ending, kind in _ENDINGS.items() if name.endswith(ending)), None)


@contextmanager
def open_table(reader: Reader, uri: str, table_format: TableFormat) -> Iterator[TableFile]:
    """Open a file of rows; whatever is wrong with it, also while rows are read, is an InvalidJob that names it."""
    try:
        with reader.open(uri) as stream:
            if table_format == "parquet":
                yield _ParquetFile(stream)
            elif table_format == "csv":
                yield _CsvFile(stream, zipped=uri.lower().endswith(".gz"))
            else:
                yield _JsonLinesFile(stream, uri, zipped=uri.lower().endswith(".gz"))
    except NotFound as error:
        raise InvalidJob(f"input.uri: {uri} is gone since it was listed; run again when it is written") from error
    except AddressRefused as error:
        raise InvalidJob(f"input.uri {error.message}") from error
    except (pa.ArrowException, EOFError, zlib.error, csv.Error, UnicodeDecodeError) as error:
        raise _unreadable(uri, table_format, error) from error
    except OSError as error:
        if error.errno:  # the disk's own; what Arrow raises for damaged bytes has no number
            raise Unavailable(f"{uri}: {error.strerror}; make the file readable, and run again") from error
        raise _unreadable(uri, table_format, error) from error


def _unreadable(uri: str, kind: TableFormat, error: Exception) -> InvalidJob:
    said = re.sub(r"\s+", " ", str(error)).strip(" .")[:200]
    advice = "save it as UTF-8" if "UTF8" in said else "write it again, or give its format in input.format"
    return InvalidJob(f"input.uri: {uri} cannot be read as {kind} ({said}); {advice}")


class _ParquetFile:
    schema_is_complete = True

    def __init__(self, stream: BinaryIO) -> None:
        self._file = pq.ParquetFile(stream, buffer_size=_PARQUET_BUFFER, pre_buffer=False)
        self.schema: pa.Schema = self._file.schema_arrow

    def read_rows(self, names: Sequence[str], skip: int) -> RowBatches:
        metadata = self._file.metadata
        start, first = 0, 0
        while first < metadata.num_row_groups and start + metadata.row_group(first).num_rows <= skip:
            start += metadata.row_group(first).num_rows
            first += 1
        groups = range(first, metadata.num_row_groups)
        for batch in self._file.iter_batches(BATCH_ROWS, row_groups=list(groups), columns=list(names)):
            batch.validate(full=True)  # Parquet's reader takes damaged text for text
            cut = max(0, skip - start)
            if cut < batch.num_rows:
                yield start + cut, batch.select(names).slice(cut)
            start += batch.num_rows
        return int(metadata.num_rows)


class _CsvFile:
    """Text as it stands: an empty value is null, a quoted empty one is empty text."""

    schema_is_complete = True

    def __init__(self, stream: BinaryIO, zipped: bool) -> None:
        self._stream, self._zipped = stream, zipped
        self.schema: pa.Schema = pa.schema([pa.field(name, pa.string()) for name in self._names()])

    def read_rows(self, names: Sequence[str], skip: int) -> RowBatches:
        start = 0
        for block in self._blocks(list(names)):
            end = start + block.num_rows
            for row in range(max(start, skip), end, BATCH_ROWS):
                yield row, block.slice(row - start, BATCH_ROWS)
            start = end
        return start

    def _names(self) -> list[str]:
        # Not by Arrow: its reader goes on reading in the background, and would move the stream under the next one.
        head = self._bytes().read(_CSV_BLOCK).decode("utf-8-sig", "replace")
        return next(filter(None, csv.reader(io.StringIO(head, newline=""))), [])

    def _blocks(self, names: list[str]) -> Iterator[pa.RecordBatch]:
        self._stream.seek(0)
        try:
            opened = self._open(names)
        except pa.ArrowInvalid as error:
            if "Empty CSV" in str(error):  # nothing, or a header without a line end
                return
            raise
        with opened:
            yield from opened

    def _open(self, names: list[str]) -> pyarrow.csv.CSVStreamingReader:
        return pyarrow.csv.open_csv(
            self._bytes(),
            pyarrow.csv.ReadOptions(block_size=_CSV_BLOCK),
            pyarrow.csv.ParseOptions(newlines_in_values=True),
            pyarrow.csv.ConvertOptions(
                default_column_type=pa.string(),
                include_columns=names,
                strings_can_be_null=True,
                quoted_strings_can_be_null=False,
                null_values=[""],
            ),
        )

    def _bytes(self) -> Any:
        return gzip.GzipFile(fileobj=self._stream) if self._zipped else self._stream


class _JsonLinesFile:
    """Every value as text: numbers as they are written, `true` and `false`, the JSON text of what is nested."""

    schema_is_complete = False

    def __init__(self, stream: BinaryIO, uri: str, zipped: bool) -> None:
        self._stream, self._uri, self._zipped = stream, uri, zipped
        self._decode = json.JSONDecoder(
            object_pairs_hook=_once, parse_int=str, parse_float=str, parse_constant=str
        ).decode
        names = dict.fromkeys(
            name for line, text in itertools.islice(self._lines(), _PEEKED_ROWS) for name in self._row(line, text)
        )
        self.schema: pa.Schema = pa.schema([pa.field(name, pa.string()) for name in names])

    def read_rows(self, names: Sequence[str], skip: int) -> RowBatches:
        lines, start = self._lines(), 0
        while held := list(itertools.islice(lines, BATCH_ROWS)):
            end = start + len(held)
            if end > skip:
                cut = max(0, skip - start)
                yield start + cut, self._batch(held[cut:], names)
            start = end
        return start

    def _batch(self, lines: list[tuple[int, bytes]], names: Sequence[str]) -> pa.RecordBatch:
        rows = [self._row(line, text) for line, text in lines]
        columns = []
        for name in names:
            values = [row.get(name) for row in rows]
            if not all(value is None or isinstance(value, str) for value in values):
                values = [_text(value, text, name) for value, (_, text) in zip(values, lines, strict=True)]
            columns.append(values)
        try:
            arrays = [pa.array(values, pa.string()) for values in columns]
        except UnicodeEncodeError as error:
            line = next(line for line, text in lines if b"\\u" in text and _has_surrogate(text))
            raise self._bad(line, "half a surrogate pair is no text; correct it") from error
        return pa.RecordBatch.from_arrays(arrays, names=list(names))

    def _row(self, line: int, text: bytes) -> dict[str, Any]:
        try:
            row = self._decode(text.decode())
        except (ValueError, RecursionError) as error:
            where = "; a JSON array must become one object a line" if text.startswith(b"[") else "; correct it"
            raise self._bad(line, f"not JSON ({error}){where}") from error
        if not isinstance(row, dict):
            raise self._bad(line, "not a JSON object; write one object a line")
        return row

    def _bad(self, line: int, said: str) -> InvalidJob:
        return InvalidJob(f"input.uri: {self._uri}, line {line}: {said}")

    def _lines(self) -> Iterator[tuple[int, bytes]]:
        """Lines that are not blank, with their number from 1."""
        self._stream.seek(0)
        source: Any = gzip.GzipFile(fileobj=self._stream) if self._zipped else self._stream
        number, rest = 0, source.read(3)
        rest = b"" if rest == b"\xef\xbb\xbf" else rest
        while block := source.read(_JSON_BLOCK):
            *lines, rest = (rest + block).split(b"\n")
            for line in lines:
                number += 1
                if line := line.strip():
                    yield number, line
            if len(rest) > _LONGEST_LINE:
                raise self._bad(number + 1, "longer than 64 MiB; write one object a line")
        if rest := rest.strip():
            yield number + 1, rest


def _once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    row = dict(pairs)
    if len(row) < len(pairs):
        twice = next(name for name, count in Counter(name for name, _ in pairs).items() if count > 1)
        raise ValueError(f"{twice!r} is named twice in one object")
    return row


def _text(value: Any, line: bytes, name: str) -> str | None:
    if value is None or isinstance(value, str):
        return value
    if isinstance(value, bool):
        return "true" if value else "false"
    # Decoded once more, for numbers inside were made text.
    return json.dumps(json.loads(line)[name], ensure_ascii=False)


def _has_surrogate(line: bytes) -> bool:
    return re.search(r"[\ud800-\udfff]", json.dumps(json.loads(line), ensure_ascii=False)) is not None
