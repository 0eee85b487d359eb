"""Names and types of columns that a job defines itself: free column names, and Arrow types written as text."""

from __future__ import annotations

import re
from collections.abc import Iterable
from typing import Annotated

import pyarrow as pa
from pydantic import AfterValidator

__all__ = [
    "ColumnName",
    "TypeName",
    "check_column_name",
    "check_column_type",
    "check_distinct_names",
    "format_arrow_type",
    "parse_arrow_type",
]

_NAME = re.compile(r"[^\W\d]\w{0,127}")
_RESERVED_NAMES = {"position", "id", "uri", "etag", "width", "height", "run_id", "model_id"}
_RESERVED_NAMES |= {f"error_{name}" for name in ("stage", "type", "message")}
_LIST = re.compile(r"(?:list|array)<(?P<item>.+)>(?:\[(?P<size>\d+)\])?")
_STRUCT = re.compile(r"struct<(?P<members>.+)>")
_EXAMPLES = "int64, float32, bool, string, timestamp[us], list<string>, list<float32>[128], struct<x: int32, y: int32>"


def check_column_name(name: str) -> str:
    """Return the name if a column of a task may have it, else raise ValueError."""
    if not _NAME.fullmatch(name):
        raise ValueError(f"{name!r} is no name for a column: letters, digits and '_', and no digit first")
    if name.casefold() in _RESERVED_NAMES:
        raise ValueError(f"{name!r} is what batchjob calls a column of its own; take another name")
    return name


def check_distinct_names(names: Iterable[str]) -> None:
    """Raise ValueError if two names differ in case only: many Parquet readers ignore the case."""
    seen: dict[str, str] = {}
    for name in names:
        first = seen.setdefault(name.casefold(), name)
        if first is not name:
            raise ValueError(f"{first!r} and {name!r} would be one column to many readers; rename one")


def parse_arrow_type(name: str) -> pa.DataType:
    """Parse `float32`, `list<string>`, `list<float32>[128]` or `struct<x: int32, y: list<string>>`.

    Raises:
        ValueError: If the text is not a type, or a type that some Parquet readers do not know.
    """
    text = name.strip()
    if match := _LIST.fullmatch(text):
        size = int(match["size"]) if match["size"] else -1
        if size == 0:
            raise ValueError(f"{name!r} holds nothing; give the length of its lists")
        return pa.list_(parse_arrow_type(match["item"]), size)
    if match := _STRUCT.fullmatch(text):
        return pa.struct([_parse_struct_member(member) for member in _split_outside_brackets(match["members"])])
    try:
        data_type = pa.type_for_alias(text)
    except ValueError:
        raise ValueError(f"{name!r} is not a type; types are {_EXAMPLES}") from None
    return check_column_type(data_type)


def check_column_type(data_type: pa.DataType) -> pa.DataType:
    """Return the type if all Parquet readers know it, else raise ValueError."""
    unsupported = pa.types.is_null(data_type) or pa.types.is_float16(data_type)
    if unsupported or isinstance(data_type, pa.BaseExtensionType):
        raise ValueError(f"'{data_type}' is not read by all readers of Parquet; types are {_EXAMPLES}")
    for index in range(data_type.num_fields):
        check_column_type(data_type.field(index).type)
    return data_type


def format_arrow_type(data_type: pa.DataType) -> str:
    """Write a type as text that `parse_arrow_type` reads."""
    if pa.types.is_fixed_size_list(data_type):
        return f"list<{format_arrow_type(data_type.value_type)}>[{data_type.list_size}]"
    if pa.types.is_list(data_type):
        return f"list<{format_arrow_type(data_type.value_type)}>"
    if pa.types.is_struct(data_type):
        return f"struct<{', '.join(f'{field.name}: {format_arrow_type(field.type)}' for field in data_type)}>"
    return {"float": "float32", "double": "float64"}.get(str(data_type), str(data_type))


def _parse_struct_member(text: str) -> pa.Field:
    name, colon, type_name = text.partition(":")
    if not colon or not name.strip():
        raise ValueError(f"{text.strip()!r} is no member of a struct; write name: type")
    return pa.field(name.strip(), parse_arrow_type(type_name))


def _split_outside_brackets(text: str) -> list[str]:
    """Split at the commas outside all brackets: `x: int32, y: list<struct<a: int8, b: int8>>` has two parts."""
    parts, depth, start = [], 0, 0
    for index, letter in enumerate(text):
        depth += (letter in "<[(") - (letter in ">])")
        if letter == "," and depth == 0:
            parts.append(text[start:index])
            start = index + 1
    return [*parts, text[start:]]


def _check_type_name(name: str) -> str:
    parse_arrow_type(name)
    return name


ColumnName = Annotated[str, AfterValidator(check_column_name)]
"""Name of a column that a job defines; none of the names that every output has."""
TypeName = Annotated[str, AfterValidator(_check_type_name)]
"""Text that `parse_arrow_type` reads."""
