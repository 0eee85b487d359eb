"""Columns of a manifest: the type names a job may use, the plain form of stored types, casts that name their row."""

from __future__ import annotations

import difflib
import re
from collections import Counter
from collections.abc import Iterable

import pyarrow as pa
import pyarrow.compute as pc

from batchjob.errors import InvalidJob

__all__ = ["can_cast", "cast_column", "is_text", "parse_type", "plain_type", "require_column", "require_known_type"]

_NAMES = [
    *("string", "binary", "bool", "int8", "int16", "int32", "int64", "uint8", "uint16", "uint32", "uint64"),
    *("float16", "float32", "float64", "date32", "timestamp"),
    *("timestamp[s]", "timestamp[ms]", "timestamp[us]", "timestamp[ns]"),
]
_ZONED = re.compile(r"timestamp\[(s|ms|us|ns), ?tz=([\w/+:-]+)\]")
_DECIMAL = re.compile(r"decimal128\((\d+), ?(-?\d+)\)")
_SHOWN = 30


def parse_type(name: str) -> pa.DataType:
    """The Arrow type of a name such as `int64`, `timestamp[us, tz=UTC]`, `decimal128(10, 2)`.

    Raises ValueError with the nearest name where there is none.
    """
    if name == "timestamp":
        return pa.timestamp("us")
    if zoned := _ZONED.fullmatch(name):
        return pa.timestamp(zoned[1], zoned[2])
    if decimal := _DECIMAL.fullmatch(name):
        return pa.decimal128(int(decimal[1]), int(decimal[2]))
    if name != "null":
        try:
            return pa.type_for_alias(name)
        except ValueError:
            pass
    near = difflib.get_close_matches(name, _NAMES, 1)
    hint = f" (did you mean '{near[0]}'?)" if near else ""
    raise ValueError(f"{name!r} is not a type{hint}; there are: {', '.join(_NAMES)}")


def plain_type(stored: pa.DataType) -> pa.DataType:
    """The type that a column of `stored` has in the output: values in place of dictionaries, views and extensions."""
    if isinstance(stored, pa.BaseExtensionType):
        return plain_type(stored.storage_type)
    if pa.types.is_dictionary(stored):
        return plain_type(stored.value_type)
    if pa.types.is_string_view(stored):
        return pa.string()
    if pa.types.is_binary_view(stored):
        return pa.binary()
    return _plain_inside(stored) if pa.types.is_nested(stored) else stored


def _plain_inside(stored: pa.DataType) -> pa.DataType:
    if pa.types.is_struct(stored):
        return pa.struct([field.with_type(plain_type(field.type)) for field in stored])
    if pa.types.is_map(stored):
        return pa.map_(plain_type(stored.key_type), plain_type(stored.item_type))
    if pa.types.is_fixed_size_list(stored):
        return pa.list_(plain_type(stored.value_type), stored.list_size)
    if pa.types.is_large_list(stored):
        return pa.large_list(plain_type(stored.value_type))
    return pa.list_(plain_type(stored.value_type)) if pa.types.is_list(stored) else stored


def require_column(names: Iterable[str], column: str, file: str, job_key: str) -> None:
    """Nothing where `wanted` is in `names` once.

    Args:
        said: the key of the job that names the column.

    Raises:
        InvalidJob: with the nearest name and the columns that are there.
    """
    there = Counter(names)
    if there[column] == 1:
        return
    if there[column] > 1:
        raise InvalidJob(f"{job_key}: {file} has {there[column]} columns called {column!r}; rename all but one")
    folded = {name.lower(): name for name in there}
    near = difflib.get_close_matches(column.lower(), folded, 1)
    hint = f" (did you mean {folded[near[0]]!r}?)" if near else ""
    shown = ", ".join(list(there)[:_SHOWN]) + (", …" if len(there) > _SHOWN else "")
    raise InvalidJob(f"{job_key}: {file} has no column {column!r}{hint}; it has: {shown}")


def require_known_type(stored: pa.DataType, file: str, column: str, job_key: str) -> None:
    """Raises InvalidJob where some part of the type is null: no reader of the output could tell what it is."""
    if _has_null(stored):
        raise InvalidJob(
            f"{job_key}: column {column!r} of {file} holds only nulls and has no type; "
            f"give it one, as in passthrough: {{{column}: string}}, or leave it out"
        )


def is_text(stored: pa.DataType) -> bool:
    """Text, also where its writer marked it as mere bytes."""
    tests = (pa.types.is_string, pa.types.is_large_string, pa.types.is_binary, pa.types.is_large_binary)
    return any(test(stored) for test in tests)


def can_cast(stored: pa.DataType, target: pa.DataType) -> bool:
    """True where Arrow has a way from the plain form of one type to the other."""
    try:
        pa.nulls(0, plain_type(stored)).cast(target)
    except pa.ArrowNotImplementedError:
        return False
    return True


def cast_column(values: pa.Array, target: pa.DataType, file: str, column: str, first_row: int) -> pa.Array:
    """The values as `target`, none of them altered. Text that is empty is null in any type but text.

    Args:
        start: row of the first value within the file, from 0.

    Raises:
        InvalidJob: naming the first row whose value does not fit.
    """
    if isinstance(values, pa.ExtensionArray):
        values = values.storage
    if values.type == target:
        return values
    try:
        values = values.cast(plain_type(values.type))
        if is_text(values.type) and not is_text(target):
            values = pc.utf8_trim_whitespace(values.cast(pa.string()))
            values = pc.if_else(pc.equal(values, pa.scalar("")), pa.scalar(None, pa.string()), values)
        return values.cast(target)
    except pa.ArrowNotImplementedError as error:
        raise InvalidJob(f"{file}: column {column!r} is {values.type} here and cannot become {target}") from error
    except pa.ArrowInvalid as error:
        row = _first_bad(values, target)
        hint = "; give the type a time zone, or none, as the values have it" if "zone offset" in str(error) else ""
        raise InvalidJob(
            f"{file}, row {first_row + row + 1}: {_shown(values[row])} in column {column!r} is no {target}{hint}; "
            f"correct it, or give the column another type"
        ) from error


def _first_bad(values: pa.Array, target: pa.DataType) -> int:
    low, high = 0, len(values)
    while high - low > 1:
        middle = (low + high) // 2
        try:
            values.slice(low, middle - low).cast(target)
            low = middle
        except pa.ArrowInvalid:
            high = middle
    return low


def _shown(value: pa.Scalar) -> str:
    try:
        text = repr(value.as_py())
    except (ValueError, OverflowError):  # text that is not UTF-8, dates that Python has not
        text = "the value"
    return text if len(text) <= 80 else text[:80] + "…"


def _has_null(stored: pa.DataType) -> bool:
    if pa.types.is_null(stored):
        return True
    if isinstance(stored, pa.BaseExtensionType):
        return _has_null(stored.storage_type)
    if pa.types.is_dictionary(stored):
        return _has_null(stored.value_type)
    return any(_has_null(stored.field(index).type) for index in range(stored.num_fields))
