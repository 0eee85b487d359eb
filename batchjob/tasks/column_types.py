"""Columns that a job names itself: which names are free, and Arrow types from their names."""

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
_OURS = {"position", "id", "uri", "etag", "width", "height", "run_id", "model_id"}
_OURS |= {f"error_{name}" for name in ("stage", "type", "message")}
_LIST = re.compile(r"(?:list|array)<(?P<item>.+)>(?:\[(?P<size>\d+)\])?")
_STRUCT = re.compile(r"struct<(?P<members>.+)>")
_EXAMPLES = "int64, float32, bool, string, timestamp[us], list<string>, list<float32>[128], struct<x: int32, y: int32>"


def check_column_name(name: str) -> str:
    """The name, where a column of a task may have it. Raises ValueError."""
    if not _NAME.fullmatch(name):
        raise ValueError(f"{name!r} is no name for a column: letters, digits and '_', and no digit first")
    if name.casefold() in _OURS:
        raise ValueError(f"{name!r} is what batchjob calls a column of its own; take another name")
    return name


def check_distinct_names(names: Iterable[str]) -> None:
    """Raises ValueError where two names are one to readers that do not mind capitals."""
    seen: dict[str, str] = {}
    for name in names:
        other = seen.setdefault(name.casefold(), name)
        if seen[name.casefold()] is not name:
            raise ValueError(f"{other!r} and {name!r} would be one column to many readers; rename one")


def parse_arrow_type(name: str) -> pa.DataType:
    """The Arrow type of `float32`, `list<string>`, `list<float32>[128]`, `struct<x: int32, y: list<string>>`.

    Raises ValueError where it is none, or one that Parquet's readers do not share.
    """
    text = name.strip()
    if found := _LIST.fullmatch(text):
        size = int(found["size"]) if found["size"] else -1
        if size == 0:
            raise ValueError(f"{name!r} holds nothing; give the length of its lists")
        return pa.list_(parse_arrow_type(found["item"]), size)
    if found := _STRUCT.fullmatch(text):
        return pa.struct([_member(part) for part in _split(found["members"])])
    try:
        kind = pa.type_for_alias(text)
    except ValueError:
        raise ValueError(f"{name!r} is not a type; types are {_EXAMPLES}") from None
    return check_column_type(kind)


def check_column_type(kind: pa.DataType) -> pa.DataType:
    """The type, where all readers of Parquet know it. Raises ValueError."""
    if pa.types.is_null(kind) or pa.types.is_float16(kind) or isinstance(kind, pa.BaseExtensionType):
        raise ValueError(f"'{kind}' is not read by all readers of Parquet; types are {_EXAMPLES}")
    for place in range(kind.num_fields):
        check_column_type(kind.field(place).type)
    return kind


def format_arrow_type(kind: pa.DataType) -> str:
    """The name of a type as `arrow_type` reads it."""
    if pa.types.is_fixed_size_list(kind):
        return f"list<{format_arrow_type(kind.value_type)}>[{kind.list_size}]"
    if pa.types.is_list(kind):
        return f"list<{format_arrow_type(kind.value_type)}>"
    if pa.types.is_struct(kind):
        return f"struct<{', '.join(f'{part.name}: {format_arrow_type(part.type)}' for part in kind)}>"
    return {"float": "float32", "double": "float64"}.get(str(kind), str(kind))


def _member(text: str) -> pa.Field:
    name, colon, kind = text.partition(":")
    if not colon or not name.strip():
        raise ValueError(f"{text.strip()!r} is no member of a struct; write name: type")
    return pa.field(name.strip(), parse_arrow_type(kind))


def _split(text: str) -> list[str]:
    """At the commas that stand outside all brackets."""
    parts, depth, start = [], 0, 0
    for place, letter in enumerate(text):
        depth += (letter in "<[(") - (letter in ">])")
        if letter == "," and depth == 0:
            parts.append(text[start:place])
            start = place + 1
    return [*parts, text[start:]]


def _is_type(name: str) -> str:
    parse_arrow_type(name)
    return name


ColumnName = Annotated[str, AfterValidator(check_column_name)]
"""The name of a column that a job gives; none of those that every output has."""
TypeName = Annotated[str, AfterValidator(_is_type)]
"""What `arrow_type` reads."""
