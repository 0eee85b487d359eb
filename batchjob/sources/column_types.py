"""Columns of a manifest: checks of their names and types, and casts that name the row that fails."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable

import pyarrow as pa
import pyarrow.compute as pc

from batchjob.arrow_types import contains_null_type, is_binary, is_text, plain_type
from batchjob.errors import InvalidJob
from batchjob.text import closest_match

__all__ = [
    "can_cast",
    "cast_column",
    "holds_image_files",
    "is_stored_text",
    "require_column",
    "require_known_type",
]

_MAX_LISTED_COLUMNS = 30
_MAX_VALUE_LENGTH = 80  # characters of a value in a message
# Beginnings of image files: JPEG, PNG, GIF, WebP, BMP, TIFF.
_IMAGE_BEGINNINGS = (b"\xff\xd8\xff", b"\x89PNG", b"GIF8", b"RIFF", b"BM", b"II*\0", b"MM\0*")


def require_column(names: Iterable[str], column: str, file: str, job_key: str) -> None:
    """Check that a column is there exactly once.

    Args:
        names: Names of the file's columns.
        column: Column that the job names.
        file: URI of the file, for the message.
        job_key: Key of the job that names the column.

    Raises:
        InvalidJob: The column is not there, or twice; names the nearest column and those that are there.
    """
    counts = Counter(names)
    if counts[column] == 1:
        return
    if counts[column] > 1:
        raise InvalidJob(f"{job_key}: {file} has {counts[column]} columns called {column!r}; rename all but one")
    by_lower_case = {name.lower(): name for name in counts}
    near = closest_match(column.lower(), list(by_lower_case))
    hint = f" (did you mean {by_lower_case[near]!r}?)" if near else ""
    listed = ", ".join(list(counts)[:_MAX_LISTED_COLUMNS]) + (", …" if len(counts) > _MAX_LISTED_COLUMNS else "")
    raise InvalidJob(f"{job_key}: {file} has no column {column!r}{hint}; it has: {listed}")


def require_known_type(stored: pa.DataType, file: str, column: str, job_key: str) -> None:
    """Raise InvalidJob if a part of the type is null: readers of the output could not tell what the column holds."""
    if contains_null_type(stored):
        raise InvalidJob(
            f"{job_key}: column {column!r} of {file} holds only nulls and has no type; "
            f"give it one, as in passthrough: {{{column}: string}}, or leave it out"
        )


def is_stored_text(stored: pa.DataType) -> bool:
    """Return True for a type of text, also for one whose writer marked it as binary."""
    return is_text(stored) or is_binary(stored)


def holds_image_files(stored: pa.DataType, values: pa.Array | None = None) -> bool:
    """Return True for a column of encoded images: binary values that begin like one, or a struct that has its bytes.

    Args:
        stored: Type of the column.
        values: Its first values, if they are known.
    """
    stored = plain_type(stored)
    if pa.types.is_struct(stored):
        return any(is_binary(field.type) for field in stored)
    if not is_binary(stored) or values is None:
        return False
    first = next((value for value in values.slice(0, 100).to_pylist() if value), b"")
    # A path may begin with such letters too, but it holds no zero byte and is text.
    return bool(first.startswith(_IMAGE_BEGINNINGS) and (b"\0" in first or first[0] > 0x7F))


def can_cast(stored: pa.DataType, target: pa.DataType) -> bool:
    """Return True if Arrow can cast the plain form of one type to the other."""
    try:
        pa.nulls(0, plain_type(stored)).cast(target)
    except pa.ArrowNotImplementedError:
        return False
    return True


def cast_column(values: pa.Array, target: pa.DataType, file: str, column: str, first_row: int) -> pa.Array:
    """Cast values without changing any of them. Empty text is null in any type but text, and so is NaN in integers.

    Args:
        values: Values of the column.
        target: Type to cast to.
        file: URI of the file, for the message.
        column: Name of the column, for the message.
        first_row: Row of the first value in the file, from 0.

    Raises:
        InvalidJob: A value does not fit; names the first such row.
    """
    if isinstance(values, pa.ExtensionArray):
        values = values.storage
    if values.type == target:
        return values
    try:
        values = values.cast(plain_type(values.type))
        if is_stored_text(values.type) and not is_stored_text(target):
            values = pc.utf8_trim_whitespace(values.cast(pa.string()))
            values = pc.if_else(pc.equal(values, pa.scalar("")), pa.scalar(None, pa.string()), values)
        if pa.types.is_integer(target):
            values = _nan_to_null(values)
        return values.cast(target)
    except pa.ArrowNotImplementedError as error:
        raise InvalidJob(f"{file}: column {column!r} is {values.type} here and cannot become {target}") from error
    except pa.ArrowInvalid as error:
        row = _find_misfit(values, target)
        hint = "; give the type a time zone, or none, as the values have it" if "zone offset" in str(error) else ""
        raise InvalidJob(
            f"{file}, row {first_row + row + 1}: {_format_value(values[row])} in column {column!r} is no "
            f"{target}{hint}; correct it, or give the column another type"
        ) from error


def _nan_to_null(values: pa.Array) -> pa.Array:
    """Prepare integers as pandas writes them where some are missing: NaN becomes null, and the text `3.0` is 3."""
    if pa.types.is_floating(values.type):
        return pc.if_else(pc.is_nan(values), pa.scalar(None, values.type), values)
    if pa.types.is_string(values.type):
        is_nan = pc.equal(pc.utf8_lower(values), pa.scalar("nan"))
        values = pc.if_else(is_nan, pa.scalar(None, pa.string()), values)
        return pc.replace_substring_regex(values, r"^([+-]?[0-9]+)\.0*$", r"\1")
    return values


def _find_misfit(values: pa.Array, target: pa.DataType) -> int:
    """Return the first row that cannot be cast, by binary search: rows before `low` fit, one before `high` does not."""
    low, high = 0, len(values)
    while high - low > 1:
        middle = (low + high) // 2
        try:
            values.slice(low, middle - low).cast(target)
            low = middle
        except pa.ArrowInvalid:
            high = middle
    return low


def _format_value(value: pa.Scalar) -> str:
    try:
        text = repr(value.as_py())
    except (ValueError, OverflowError):  # Text that is not UTF-8, or a date that Python does not have.
        text = "the value"
    return text if len(text) <= _MAX_VALUE_LENGTH else text[:_MAX_VALUE_LENGTH] + "…"
