"""Rows to one Parquet part that every common reader opens as it is."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Sequence

import pyarrow as pa

from batchjob.errors import InvalidJob

__all__ = ["build_row_schema"]

_FACTS = (pa.field("etag", pa.string()), pa.field("width", pa.int32()), pa.field("height", pa.int32()))
_RUN = (pa.field("run_id", pa.string(), nullable=False), pa.field("model_id", pa.string(), nullable=False))
_ERROR = tuple(pa.field(f"error_{name}", pa.string()) for name in ("stage", "type", "message"))
_HIVE_SEGMENT = re.compile(r"([^/=]+)=[^/]*")


def build_row_schema(
    passthrough_fields: Sequence[pa.Field], task_fields: Sequence[pa.Field], has_id: bool = False, output_uri: str = ""
) -> pa.Schema:
    """The schema of all parts, columns in their order.

    Args:
        passthrough: the source's fields; with `has_id` the first is the id.
        task: the task's fields.
        has_id: whether the source has an id column.
        output: the output URI, whose `name=value` folders readers turn into columns.

    Raises:
        InvalidJob: two columns have one name, a reader would mix a column with a folder, or a column has no type.
    """
    first, rest = (
        (list(passthrough_fields[:1]), list(passthrough_fields[1:])) if has_id else ([], list(passthrough_fields))
    )
    position = pa.field("position", pa.int64(), nullable=False)
    uri = pa.field("uri", pa.string(), nullable=False)
    fields = [position, *first, uri, *rest, *_FACTS, *task_fields, *_RUN, *_ERROR]
    _check_names([*first, *rest], fields, output_uri)
    for field in fields:
        if _is_untyped(field.type):
            raise InvalidJob(f"input.passthrough: column {field.name!r} holds only nulls, so it has no type: drop it")
    return pa.schema(fields)


def _check_names(passthrough: Sequence[pa.Field], fields: Sequence[pa.Field], output: str) -> None:
    # DuckDB compares names without case, and gives a folder's value in place of a column's without a word.
    folders = {name.casefold(): name for name in _HIVE_SEGMENT.findall(output.rpartition("://")[2])}
    theirs = {field.name for field in passthrough}
    count = Counter(field.name.casefold() for field in fields)
    for field in fields:
        name = field.name
        folder = folders.get(name.casefold())
        advice = "leave it out of passthrough, or give it another name in the manifest"
        if name in theirs and count[name.casefold()] > 1:
            raise InvalidJob(f"input.passthrough: there would be two columns {name!r} in the output; {advice}")
        if folder is not None:
            what = f"input.passthrough: column {name!r}" if name in theirs else f"output.uri: our column {name!r}"
            advice = advice if name in theirs else "name the folder otherwise"
            raise InvalidJob(f"{what} clashes with the folder {folder}=… of {output}; {advice}")


def _is_untyped(kind: pa.DataType) -> bool:
    return pa.types.is_null(kind) or any(_is_untyped(child.type) for child in _children(kind))


def _children(kind: pa.DataType) -> list[pa.Field]:
    if pa.types.is_map(kind):
        return [kind.key_field, kind.item_field]
    return [kind.field(index) for index in range(kind.num_fields)]
