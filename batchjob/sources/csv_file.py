"""CSV files as text, with whichever delimiter their first line shows."""

from __future__ import annotations

import csv
import io
import re
from collections.abc import Iterator, Sequence
from typing import BinaryIO

import pyarrow as pa
import pyarrow.csv

from batchjob.sources.source import BATCH_ROWS, RowBatches
from batchjob.sources.text_stream import open_text

__all__ = ["DELIMITERS", "CsvFile"]

DELIMITERS = (",", ";", "\t", "|")
_BLOCK_BYTES = 1 << 20  # also the longest row
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
        try:
            blocks = self._open_csv(names)
        except pa.ArrowInvalid as error:
            if "Empty CSV" in str(error):  # The file is empty, or has a header without a line end.
                return
            raise
        with blocks:
            yield from blocks

    def _open_csv(self, names: list[str]) -> pyarrow.csv.CSVStreamingReader:
        return pyarrow.csv.open_csv(
            open_text(self._stream, self._uri),
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
