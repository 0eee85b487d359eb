"""Columns of all parts: their Arrow schema, and the checks on their names."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Sequence

import pyarrow as pa

from batchjob.arrow_types import contains_null_type
from batchjob.errors import InvalidJob

__all__ = ["build_row_schema"]

_POSITION = pa.field("position", pa.int64(), nullable=False)
_URI = pa.field("uri", pa.string(), nullable=False)
_IMAGE = (pa.field("etag", pa.string()), pa.field("width", pa.int32()), pa.field("height", pa.int32()))
_RUN = (pa.field("run_id", pa.string(), nullable=False), pa.field("model_id", pa.string(), nullable=False))
_ERROR = tuple(pa.field(f"error_{name}", pa.string()) for name in ("stage", "type", "message"))
_HIVE_SEGMENT = re.compile(r"([^/=]+)=[^/]*")


def build_row_schema(
    passthrough_fields: Sequence[pa.Field], task_fields: Sequence[pa.Field], has_id: bool = False, output_uri: str = ""
) -> pa.Schema:
    """Build the schema of all parts, columns in their order.

    Args:
        passthrough_fields: Columns of the source; with `has_id` the first one is the id.
        task_fields: Columns of the task.
        has_id: True if the source has an id column.
        output_uri: URI of the output. Readers turn each of its `name=value` folders into a column.

    Returns:
        position, id, uri, passthrough, etag, width, height, task columns, run_id, model_id, error columns.

    Raises:
        InvalidJob: Two columns have one name, a column has the name of a folder, or a column has no type.
    """
    id_fields = list(passthrough_fields[:1]) if has_id else []
    other_fields = list(passthrough_fields[len(id_fields) :])
    fields = [_POSITION, *id_fields, _URI, *other_fields, *_IMAGE, *task_fields, *_RUN, *_ERROR]
    _check_names(passthrough_fields, fields, output_uri)
    for field in fields:
        if contains_null_type(field.type):
            raise InvalidJob(f"input.passthrough: column {field.name!r} holds only nulls, so it has no type: drop it")
    return pa.schema(fields)


def _check_names(passthrough_fields: Sequence[pa.Field], fields: Sequence[pa.Field], output_uri: str) -> None:
    # DuckDB ignores case in names, and silently returns the value of a folder in place of the column's.
    folders = {name.casefold(): name for name in _HIVE_SEGMENT.findall(output_uri.rpartition("://")[2])}
    passthrough_names = {field.name for field in passthrough_fields}
    name_counts = Counter(field.name.casefold() for field in fields)
    for field in fields:
        name = field.name
        folder = folders.get(name.casefold())
        advice = f"rename it, as in passthrough: {{{name}: {{as: my_{name}}}}}, or leave it out"
        if name in passthrough_names and name_counts[name.casefold()] > 1:
            raise InvalidJob(f"input.passthrough: there would be two columns {name!r} in the output; {advice}")
        if folder is not None:
            ours = name not in passthrough_names
            column = f"output.uri: our column {name!r}" if ours else f"input.passthrough: column {name!r}"
            advice = "name the folder otherwise" if ours else advice
            raise InvalidJob(f"{column} clashes with the folder {folder}=… of {output_uri}; {advice}")
