"""Columns in the names of folders, as Hive, Spark and DuckDB partition tables: `dt=2026-11-30/part-0.parquet`."""

from __future__ import annotations

import re
from urllib.parse import unquote

import pyarrow as pa
import pyarrow.compute as pc

from batchjob.errors import InvalidJob
from batchjob.sources.column_types import cast_column
from batchjob.uris import split_chain

__all__ = ["HiveFolders"]

_SEGMENT = re.compile(r"(?<=/)([^/=]+)=([^/]*)(?=/)")
_NULL = "__HIVE_DEFAULT_PARTITION__"


class HiveFolders:
    """The `name=value` folders above a file, names and values percent-decoded.

    Args:
        uri: URI of the file.
    """

    def __init__(self, uri: str) -> None:
        self._uri = uri
        self._values = {unquote(name): value for name, value in _SEGMENT.findall(split_chain(uri)[0])}

    @property
    def names(self) -> list[str]:
        """Names of the columns, from the outermost folder on."""
        return list(self._values)

    def column(self, name: str, data_type: pa.DataType, rows: int) -> pa.Array:
        """Return the column of a file with so many rows. Raises InvalidJob if the value is not of that type."""
        text = self._values[name]
        try:
            value = None if text == _NULL else unquote(text, errors="strict")
            values = pa.repeat(pa.scalar(value, pa.string()), 1)
        except UnicodeError as error:
            raise InvalidJob(f"{self._uri}: its folder {name}=… is not named in UTF-8; rename it") from error
        (scalar,) = cast_column(values, data_type, self._uri, name, 0)
        return pa.repeat(scalar, rows) if scalar.is_valid else pa.nulls(rows, data_type)

    def check_agrees(self, name: str, in_folder: pa.Array, in_file: pa.Array, first_row: int) -> None:
        """Raise InvalidJob if a column of the file, of the same name, has another value than the folder's name.

        Args:
            name: Name of the column.
            in_folder: Result of `column`.
            in_file: The file's column, of the same type; a null agrees with every value.
            first_row: Row of the first value in the file, from 0.
        """
        try:
            differs = pc.and_(pc.is_valid(in_file), pc.fill_null(pc.not_equal(in_file, in_folder), fill_value=True))
        except pa.ArrowNotImplementedError:
            differs = pc.is_valid(in_file)
        row = pc.index(differs, pa.scalar(True)).as_py()
        if row >= 0:
            raise InvalidJob(
                f"{self._uri}, row {first_row + row + 1}: column {name!r} says {in_file[row]}, its folder {name}="
                f"{self._values[name]}; rename one of them, or leave it out of input.passthrough"
            )
