"""Arrow types: their names in a job file, their plain forms, and those that some Parquet readers cannot open."""

from __future__ import annotations

import re

import pyarrow as pa

from batchjob.text import closest_match

__all__ = [
    "check_readable",
    "child_fields",
    "contains_null_type",
    "format_type",
    "is_binary",
    "is_list",
    "is_text",
    "parse_flat_type",
    "parse_type",
    "plain_type",
]

_TYPE_NAMES = [
    *("string", "binary", "bool", "int8", "int16", "int32", "int64", "uint8", "uint16", "uint32", "uint64"),
    *("float16", "float32", "float64", "date32", "timestamp"),
    *("timestamp[s]", "timestamp[ms]", "timestamp[us]", "timestamp[ns]"),
]
_ZONED_TIMESTAMP = re.compile(r"timestamp\[(s|ms|us|ns), ?tz=([\w/+:-]+)\]")
_DECIMAL = re.compile(r"decimal128\((\d+), ?(-?\d+)\)")
_LIST = re.compile(r"(?:list|array)<(?P<item>.+)>(?:\[(?P<size>\d+)\])?")
_STRUCT = re.compile(r"struct<(?P<members>.+)>")
_PLAIN_VIEWS = {pa.string_view(): pa.string(), pa.binary_view(): pa.binary()}
_EXAMPLES = "int64, float32, bool, string, timestamp[us], list<string>, list<float32>[128], struct<x: int32, y: int32>"


def parse_flat_type(name: str) -> pa.DataType:
    """Return the type with a name such as `int64`, `timestamp[us, tz=UTC]` or `decimal128(10, 2)`.

    Raises:
        ValueError: There is no such type; names the nearest one.
    """
    data_type = _find_flat_type(name)
    if data_type is None or pa.types.is_null(data_type):
        raise ValueError(f"{name!r} is not a type{_suggest_name(name)}; there are: {', '.join(_TYPE_NAMES)}")
    return data_type


def parse_type(name: str) -> pa.DataType:
    """Return a flat type, or a nested one: `list<string>`, `list<float32>[128]` or `struct<x: int32, y: list<string>>`.

    Raises:
        ValueError: If the text is not a type, or a type that some Parquet readers do not know.
    """
    text = name.strip()
    if match := _LIST.fullmatch(text):
        size = int(match["size"]) if match["size"] else -1
        if size == 0:
            raise ValueError(f"{name!r} holds nothing; give the length of its lists")
        return pa.list_(parse_type(match["item"]), size)
    if match := _STRUCT.fullmatch(text):
        return pa.struct([_parse_member(member) for member in _split_outside_brackets(match["members"])])
    data_type = _find_flat_type(text)
    if data_type is None:
        raise ValueError(f"{name!r} is not a type{_suggest_name(text)}; types are {_EXAMPLES}")
    return check_readable(data_type)


def check_readable(data_type: pa.DataType) -> pa.DataType:
    """Return the type if all Parquet readers know it, else raise ValueError."""
    unsupported = pa.types.is_null(data_type) or pa.types.is_float16(data_type)
    if unsupported or isinstance(data_type, pa.BaseExtensionType):
        raise ValueError(f"'{data_type}' is not read by all readers of Parquet; types are {_EXAMPLES}")
    for child in child_fields(data_type):
        check_readable(child.type)
    return data_type


def format_type(data_type: pa.DataType) -> str:
    """Write a type as text that `parse_type` reads."""
    if pa.types.is_fixed_size_list(data_type):
        return f"list<{format_type(data_type.value_type)}>[{data_type.list_size}]"
    if pa.types.is_list(data_type):
        return f"list<{format_type(data_type.value_type)}>"
    if pa.types.is_struct(data_type):
        return f"struct<{', '.join(f'{field.name}: {format_type(field.type)}' for field in data_type)}>"
    return {"float": "float32", "double": "float64"}.get(str(data_type), str(data_type))


def plain_type(stored: pa.DataType) -> pa.DataType:
    """Return a type without dictionaries, views and extensions, at every depth: the column's type in the output."""
    if isinstance(stored, pa.BaseExtensionType):
        return plain_type(stored.storage_type)
    if pa.types.is_dictionary(stored):
        return plain_type(stored.value_type)
    if stored in _PLAIN_VIEWS:
        return _PLAIN_VIEWS[stored]
    if pa.types.is_struct(stored):
        return pa.struct([field.with_type(plain_type(field.type)) for field in stored])
    if pa.types.is_map(stored):
        return pa.map_(plain_type(stored.key_type), plain_type(stored.item_type))
    if pa.types.is_fixed_size_list(stored):
        return pa.list_(plain_type(stored.value_type), stored.list_size)
    if pa.types.is_large_list(stored):
        return pa.large_list(plain_type(stored.value_type))
    return pa.list_(plain_type(stored.value_type)) if pa.types.is_list(stored) else stored


def child_fields(data_type: pa.DataType) -> list[pa.Field]:
    """Return the fields nested in a type: of a struct, a list, or a map (key, value); none in a flat type."""
    if pa.types.is_map(data_type):
        return [data_type.key_field, data_type.item_field]
    return [data_type.field(index) for index in range(data_type.num_fields)]


def contains_null_type(data_type: pa.DataType) -> bool:
    """Return True if a type, or a type nested in it, is Arrow's null type, which some readers cannot open."""
    plain = plain_type(data_type)
    return pa.types.is_null(plain) or any(contains_null_type(child.type) for child in child_fields(plain))


def is_text(data_type: pa.DataType) -> bool:
    """Return True for strings of any length; False for string views."""
    return bool(pa.types.is_string(data_type) or pa.types.is_large_string(data_type))


def is_binary(data_type: pa.DataType) -> bool:
    """Return True for byte strings of any length; False for binary views and for fixed sizes."""
    return bool(pa.types.is_binary(data_type) or pa.types.is_large_binary(data_type))


def is_list(data_type: pa.DataType) -> bool:
    """Return True for lists, large lists and lists of a fixed size."""
    kinds = (pa.types.is_list, pa.types.is_large_list, pa.types.is_fixed_size_list)
    return any(is_kind(data_type) for is_kind in kinds)


def _find_flat_type(name: str) -> pa.DataType | None:
    if name == "timestamp":
        return pa.timestamp("us")
    if zoned := _ZONED_TIMESTAMP.fullmatch(name):
        return pa.timestamp(zoned[1], zoned[2])
    if decimal := _DECIMAL.fullmatch(name):
        return pa.decimal128(int(decimal[1]), int(decimal[2]))
    try:
        return pa.type_for_alias(name)
    except ValueError:
        return None


def _suggest_name(name: str) -> str:
    near = closest_match(name, _TYPE_NAMES)
    return f" (did you mean {near!r}?)" if near else ""


def _parse_member(text: str) -> pa.Field:
    name, colon, type_name = text.partition(":")
    if not colon or not name.strip():
        raise ValueError(f"{text.strip()!r} is no member of a struct; write name: type")
    return pa.field(name.strip(), parse_type(type_name))


def _split_outside_brackets(text: str) -> list[str]:
    """Split at the commas outside all brackets: `x: int32, y: list<struct<a: int8, b: int8>>` has two parts."""
    parts, depth, start = [], 0, 0
    for index, letter in enumerate(text):
        depth += (letter in "<[(") - (letter in ">])")
        if letter == "," and depth == 0:
            parts.append(text[start:index])
            start = index + 1
    return [*parts, text[start:]]
