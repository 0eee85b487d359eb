"""CSV files as text, with whichever delimiter their first line shows."""

from __future__ import annotations

import csv
import io
import re
from collections.abc import Iterator, Sequence
from typing import Any, BinaryIO

import pyarrow as pa
import pyarrow.csv

from batchjob.errors import InvalidJob
from batchjob.sources.source import BATCH_ROWS, RowBatches
from batchjob.sources.text_stream import open_text

__all__ = ["DELIMITERS", "CsvFile"]

DELIMITERS = (",", ";", "\t", "|")
_BLOCK_BYTES = 1 << 20  # also the longest row
_END = "\x1eend of the file\x1e"  # value of each column in the row that is added
# Excel writes the delimiter into a line of its own before the header.
_SEPARATOR_LINE = re.compile(r'"?sep=(.)"?\r?\n')


class CsvFile:
    """A CSV file as text: an empty value is null, a quoted empty value is empty text.

    Args:
        stream: The file, perhaps compressed, in UTF-8 or UTF-16.
        uri: URI of the file.
        delimiter: Delimiter of the columns; None chooses the one of `DELIMITERS` with which the header has most of
            `columns`. Of a file called `.tsv` the tab is tried first.
        columns: Columns that will be read.
    """

    schema_is_complete = True

    def __init__(self, stream: BinaryIO, uri: str, delimiter: str | None, columns: Sequence[str]) -> None:
        self._stream, self._uri = stream, uri
        # Not by Arrow: its reader goes on reading in the background, and would move the stream under the next reader.
        beginning = open_text(stream, uri).read(_BLOCK_BYTES).decode("utf-8", "replace")
        separator_line = _SEPARATOR_LINE.match(beginning)
        self._skipped_lines = 1 if separator_line else 0
        if separator_line:
            beginning = beginning[separator_line.end() :]
            delimiter = delimiter or separator_line[1]
        self._delimiter = delimiter or _choose_delimiter(beginning, uri, columns)
        names = _parse_header(beginning, self._delimiter)
        self.schema: pa.Schema = pa.schema([pa.field(name, pa.string()) for name in names])

    def read_rows(self, names: Sequence[str], skip: int) -> RowBatches:
        """Yield the rows after the first `skip`. See `TableFile.read_rows`."""
        block_start = 0
        for block in self._read_blocks(list(names)):
            block_end = block_start + block.num_rows
            for row in range(max(block_start, skip), block_end, BATCH_ROWS):
                yield row, block.slice(row - block_start, BATCH_ROWS)
            block_start = block_end
        return block_start

    def _read_blocks(self, names: list[str]) -> Iterator[pa.RecordBatch]:
        """Yield the rows of the file. Raises InvalidJob if a quote is opened and not closed."""
        if not self.schema.names:
            return
        with self._open_csv(names) as blocks:
            held = None
            for block in blocks:
                if held is not None:
                    yield held
                held = block if block.num_rows else held
            if held is None or held.column(0)[-1].as_py() != _END:
                raise self._unclosed_quote_error(held)
            yield held.slice(0, held.num_rows - 1)

    def _unclosed_quote_error(self, last_block: pa.RecordBatch | None) -> InvalidJob:
        values = [] if last_block is None else [column[-1].as_py() for column in last_block.columns]
        row = next((value for value in values if value), "").partition("\n")[0][:60]
        near = f", perhaps in the row of {row!r}" if row else ""
        return InvalidJob(
            f"input.uri: {self._uri}: a quote is opened and not closed{near}, and the rows behind it would be lost; "
            "close it, and write a quote within quotes twice"
        )

    def _open_csv(self, names: list[str]) -> pyarrow.csv.CSVStreamingReader:
        # Arrow takes the end of the file for that of an open quote, which may hold any number of rows. A last row of
        # our own is not seen then.
        end = b"\n" + self._delimiter.encode().join([_END.encode()] * len(self.schema.names)) + b"\n"
        return pyarrow.csv.open_csv(
            pa.PythonFile(_Continued(open_text(self._stream, self._uri), end), mode="r"),
            pyarrow.csv.ReadOptions(block_size=_BLOCK_BYTES, skip_rows=self._skipped_lines),
            pyarrow.csv.ParseOptions(delimiter=self._delimiter, newlines_in_values=True),
            pyarrow.csv.ConvertOptions(
                default_column_type=pa.string(),
                include_columns=names,
                strings_can_be_null=True,
                quoted_strings_can_be_null=False,
                null_values=[""],
            ),
        )


class _Continued:
    """A stream with some bytes behind its end, which its reader cannot close."""

    closed = False

    def __init__(self, stream: Any, end: bytes) -> None:
        self._stream, self._end = stream, end

    def read(self, size: int) -> bytes:
        """Return `size` bytes, or what is left; none at the end. Arrow needs a header and its line end at once."""
        data = bytearray()
        while len(data) < size and (block := self._stream.read(size - len(data))):
            data += block
        rest = size - len(data)
        data, self._end = data + self._end[:rest], self._end[rest:]
        return bytes(data)

    def close(self) -> None:
        """Do nothing: the file is read again."""


def _choose_delimiter(beginning: str, uri: str, columns: Sequence[str]) -> str:
    """Return the delimiter with which the header has most of the columns, or else most columns at all.

    For example, of `path;a,b` with the column `path` it is `;`; a header of one column is read with a comma.
    """
    candidates = sorted(DELIMITERS, key=lambda delimiter: delimiter != "\t") if ".tsv" in uri.lower() else DELIMITERS

    def count_columns(delimiter: str) -> tuple[int, int]:
        names = _parse_header(beginning, delimiter)
        found = len(set(columns).intersection(names))
        return found, 0 if found else len(names)

    return max(candidates, key=count_columns)  # of equals the first one


def _parse_header(beginning: str, delimiter: str) -> list[str]:
    return next(filter(None, csv.reader(io.StringIO(beginning, newline=""), delimiter=delimiter)), [])
