"""Rows of a shard as Arrow record batches, and the Parquet part that they are written to."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from batchjob.arrow_types import child_fields, contains_null_type, is_text
from batchjob.errors import BatchjobError, InvalidJob
from batchjob.output.provenance import PartFooter
from batchjob.types import ErrorRecord, ImageInfo, Shard

__all__ = ["MAX_MESSAGE_LENGTH", "ROW_GROUP_BYTES", "ROW_GROUP_ROWS", "PartWriter", "build_rows"]

ROW_GROUP_ROWS = 65_536
ROW_GROUP_BYTES = 64 * 1024 * 1024
MAX_MESSAGE_LENGTH = 1000
# A dictionary of values that never repeat is a second copy of the column.
_DISTINCT = {"id", "uri", "etag", "position"}


def build_rows(
    schema: pa.Schema,
    *,
    shard: Shard,
    start: int,
    image_infos: Sequence[ImageInfo],
    columns: Sequence[pa.Array],
    error_records: Sequence[ErrorRecord | None],
    run_id: str,
    model_id: str,
) -> pa.RecordBatch:
    """Build the rows of one batch in plan order, error rows included.

    An example with three images, of which the second could not be decoded and the third not be predicted:

        image_infos     a        b (error)   c
        columns         [x_a,                x_c]       two entries: b was not predicted
        error_records   [None,               error_c]
        task column     x_a      null        null
        error_stage     null     decode      predict

    Args:
        schema: Schema from `build_row_schema`.
        shard: Shard that the rows belong to.
        start: Offset of the first row within the shard.
        image_infos: Result of loading each image, one per row.
        columns: Columns of the task, with one entry per image that was loaded; empty if none was.
        error_records: Errors of the prediction, one entry per image that was loaded. Task columns are null there.
        run_id: Id of the plan.
        model_id: Name and digest of the model.

    Raises:
        BatchjobError: Lengths do not fit together; a bug.
    """
    refs = shard.refs[start : start + len(image_infos)]
    if len(refs) != len(image_infos):
        raise BatchjobError(f"{len(image_infos)} rows from {start} on do not lie in a shard of {len(shard.refs)}")
    row_errors, entries = _match_predictions(image_infos, error_records)
    values: dict[str, Any] = {
        "position": [ref.position for ref in refs],
        "uri": [ref.uri for ref in refs],
        "etag": [info.etag for info in image_infos],
        "width": [info.width for info in image_infos],
        "height": [info.height for info in image_infos],
        "run_id": [run_id] * len(refs),
        "model_id": [model_id] * len(refs),
        "error_stage": [error and error.stage for error in row_errors],
        "error_type": [error and error.type for error in row_errors],
        "error_message": [error and _shorten_message(error.message) for error in row_errors],
    }
    passthrough = shard.passthrough.slice(start, len(refs))
    values |= {name: passthrough.column(name) for name in passthrough.column_names}
    task_names = [field.name for field in schema if field.name not in values]
    if columns and len(columns) != len(task_names):
        raise BatchjobError(
            f"the task gave {len(columns)} columns, its schema has {len(task_names)}: {', '.join(task_names)}"
        )
    for index, name in enumerate(task_names):
        values[name] = _take_entries(columns[index], entries) if columns else None
    return pa.record_batch([_to_array(values[field.name], field, len(refs)) for field in schema], schema=schema)


class PartWriter:
    """Writer of one part; counts rows and errors as they pass.

    As a context manager it aborts unless it was closed; the file is then not a part.

    Args:
        path: Local file to write.
        schema: Schema that every batch must have.
        row_group_rows: Most rows in a row group; wide rows make smaller ones (`ROW_GROUP_BYTES`).

    Attributes:
        rows: Rows written so far.
        errors: Error rows by `stage/type`.
        examples: `uri: message` of the first row of each `stage/type`.
    """

    def __init__(self, path: Path, schema: pa.Schema, row_group_rows: int = ROW_GROUP_ROWS) -> None:
        untyped = [field.name for field in schema if contains_null_type(field.type)]
        if untyped:
            raise InvalidJob(f"columns without a type cannot be written: {', '.join(untyped)}")
        self.path, self._schema = path, schema
        self._row_group_rows = row_group_rows
        self._pending: list[pa.RecordBatch] = []
        self._pending_rows = self._pending_bytes = 0
        self._last_position: int | None = None
        self.rows = 0
        self.errors: dict[str, int] = {}
        self.examples: dict[str, str] = {}
        self._writer = pq.ParquetWriter(
            path,
            schema,
            compression="zstd",
            use_dictionary=_select_leaf_paths(schema, _has_repeated_values),
            write_statistics=_select_leaf_paths(schema, _has_useful_statistics),
        )

    @property
    def failed(self) -> int:
        """Error rows written so far."""
        return sum(self.errors.values())

    def add(self, batch: pa.RecordBatch) -> None:
        """Append rows.

        Raises:
            BatchjobError: The schema differs, or positions do not increase; a bug, never the data's fault.
        """
        if not batch.schema.equals(self._schema):
            raise BatchjobError(f"a batch has another schema than its part:\n{batch.schema}\nnot\n{self._schema}")
        if not batch.num_rows:
            return
        self._check_order(batch.column("position").to_pylist())
        self._count(batch)
        self._pending.append(batch)
        self._pending_rows += batch.num_rows
        self._pending_bytes += batch.nbytes
        if self._pending_rows >= self._row_group_rows or self._pending_bytes >= ROW_GROUP_BYTES:
            self._flush()

    def close(self, footer: PartFooter) -> None:
        """Write the footer, and read it back.

        Raises:
            BatchjobError: The counts in the footer are not those of the rows, or the file is incomplete.
        """
        if (footer.rows, footer.failed, dict(footer.errors)) != (self.rows, self.failed, self.errors):
            raise BatchjobError(
                f"the part holds {self.rows} rows and {self.failed} errors, its provenance says {footer.rows} "
                f"and {footer.failed}"
            )
        self._flush()
        self._writer.add_key_value_metadata({PartFooter.KEY: footer.to_json()})
        self._writer.close()
        written = pq.read_metadata(self.path)
        if written.num_rows != self.rows or written.metadata.get(PartFooter.KEY.encode()) is None:
            raise BatchjobError(f"the part at {self.path} does not hold what was written to it: is the disk full?")

    def abandon(self) -> None:
        """Stop writing. The file is then not a part."""
        self._pending.clear()
        self._writer.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.abandon()

    def _check_order(self, positions: Sequence[int]) -> None:
        last = self._last_position
        for position in positions:
            if last is not None and position <= last:
                raise BatchjobError(
                    f"position {position} came after {last}: a part holds rows in plan order, each once"
                )
            last = position
        self._last_position = last

    def _count(self, batch: pa.RecordBatch) -> None:
        self.rows += batch.num_rows
        stages = batch.column("error_stage")
        if stages.null_count == batch.num_rows:
            return
        errors = batch.filter(pc.is_valid(stages)).select(["error_stage", "error_type", "error_message", "uri"])
        for stage, kind, message, uri in zip(*(column.to_pylist() for column in errors.columns), strict=True):
            name = f"{stage}/{kind}"
            self.errors[name] = self.errors.get(name, 0) + 1
            self.examples.setdefault(name, f"{uri}: {message}")

    def _flush(self) -> None:
        if self._pending:
            table = pa.Table.from_batches(self._pending, self._schema)
            self._writer.write_table(table, row_group_size=max(table.num_rows, 1))
        self._pending, self._pending_rows, self._pending_bytes = [], 0, 0


def _match_predictions(
    image_infos: Sequence[ImageInfo], error_records: Sequence[ErrorRecord | None]
) -> tuple[list[ErrorRecord | None], list[int | None]]:
    """Return for each row its error if it has one, and its entry in the task's columns otherwise; see `build_rows`."""
    loaded = sum(info.error is None for info in image_infos)
    if loaded != len(error_records):
        raise BatchjobError(f"{len(error_records)} predictions came for {loaded} images")
    predictions = enumerate(error_records)
    row_errors: list[ErrorRecord | None] = []
    entries: list[int | None] = []
    for info in image_infos:
        entry, error = (None, info.error) if info.error is not None else next(predictions)
        entries.append(entry if error is None else None)
        row_errors.append(error)
    return row_errors, entries


def _take_entries(column: pa.Array, entries: list[int | None]) -> pa.Array:
    if len(column) == len(entries) and None not in entries:
        return column
    return column.take(pa.array(entries, pa.int64()))


def _to_array(values: Any, field: pa.Field, length: int) -> pa.Array:
    if values is None:
        return pa.nulls(length, field.type)
    if isinstance(values, pa.ChunkedArray):
        values = values.combine_chunks() if values.num_chunks != 1 else values.chunk(0)
    if isinstance(values, pa.Array):
        return values if values.type == field.type else values.cast(field.type)
    return pa.array(values, field.type)


def _shorten_message(message: str) -> str:
    """Put a message on one line of valid UTF-8, cut to `MAX_MESSAGE_LENGTH` characters."""
    line = " ".join(message.encode("utf-8", "replace").decode("utf-8").split())
    return line if len(line) <= MAX_MESSAGE_LENGTH else line[: MAX_MESSAGE_LENGTH - 1] + "…"


def _select_leaf_paths(schema: pa.Schema, predicate: Callable[[str, pa.DataType], bool]) -> list[str]:
    """Return the Parquet paths of the leaf columns for which `predicate(path, type)` is True.

    An example: `boxes: list<struct<label: string, box: list<float>>>` has the leaves `boxes.list.element.label` and
    `boxes.list.element.box.list.element`.
    """

    def walk(path: str, data_type: pa.DataType) -> list[str]:
        if pa.types.is_map(data_type):
            children = [("key_value.key", data_type.key_type), ("key_value.value", data_type.item_type)]
        elif pa.types.is_struct(data_type):
            children = [(field.name, field.type) for field in child_fields(data_type)]
        elif child_fields(data_type):
            children = [("list.element", data_type.value_type)]
        else:
            return [path] if predicate(path, data_type) else []
        return [leaf for name, child in children for leaf in walk(f"{path}.{name}", child)]

    return [leaf for field in schema for leaf in walk(field.name, field.type)]


def _has_repeated_values(path: str, data_type: pa.DataType) -> bool:
    """Return True for columns that a dictionary makes smaller: texts and small integers."""
    if path in _DISTINCT or pa.types.is_floating(data_type):
        return False
    is_small_integer = pa.types.is_integer(data_type) and data_type.bit_width <= 32
    return is_text(data_type) or pa.types.is_string_view(data_type) or is_small_integer


def _has_useful_statistics(path: str, data_type: pa.DataType) -> bool:
    """Return False for floats in lists: no query filters embeddings by the range of their values."""
    return ".list.element" not in path or not pa.types.is_floating(data_type)
