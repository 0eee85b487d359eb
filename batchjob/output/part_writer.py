"""Rows to one Parquet part that every common reader opens as it is."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from batchjob.errors import BatchjobError, InvalidJob
from batchjob.output.provenance import PartFooter
from batchjob.output.schema import _children, _is_untyped
from batchjob.types import ErrorRecord, ImageInfo, Shard

if TYPE_CHECKING:
    from types import TracebackType
    from typing import Self

__all__ = ["PartWriter", "build_rows"]

ROW_GROUP_ROWS = 65_536
ROW_GROUP_BYTES = 64 * 1024 * 1024
MESSAGE_LENGTH = 1000
_DISTINCT = {"id", "uri", "etag", "position"}  # a dictionary of values that never repeat is a second copy


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
    """A batch of rows, good and bad, in plan order.

    Args:
        schema: from `row_schema`.
        shard: whose rows these are.
        start: offset of the first within the shard.
        facts: what the loader learned, one per row.
        columns: the task's, one entry per row whose facts hold no fault; none at all where there is no such row.
        faults: likewise one per such row: what the prediction met. Task columns are null there.
        run_id: of this run.
        model_id: of this model.
    """
    refs = shard.refs[start : start + len(image_infos)]
    if len(refs) != len(image_infos):
        raise BatchjobError(f"{len(image_infos)} rows from {start} on do not lie in a shard of {len(shard.refs)}")
    final, picked = _settled(image_infos, error_records)
    values: dict[str, Any] = {
        "position": [ref.position for ref in refs],
        "uri": [ref.uri for ref in refs],
        "etag": [fact.etag for fact in image_infos],
        "width": [fact.width for fact in image_infos],
        "height": [fact.height for fact in image_infos],
        "run_id": [run_id] * len(refs),
        "model_id": [model_id] * len(refs),
        "error_stage": [fault and fault.stage for fault in final],
        "error_type": [fault and fault.type for fault in final],
        "error_message": [fault and _one_line(fault.message) for fault in final],
    }
    passthrough = shard.passthrough.slice(start, len(refs))
    values |= {name: passthrough.column(name) for name in passthrough.column_names}
    taken = {field.name: index for index, field in enumerate(f for f in schema if f.name not in values)}
    if columns and len(columns) != len(taken):
        raise BatchjobError(f"the task gave {len(columns)} columns, its schema has {len(taken)}: {', '.join(taken)}")
    for name, index in taken.items():
        values[name] = _spread(columns[index], picked) if columns else None
    return pa.record_batch([_array(values[field.name], field, len(refs)) for field in schema], schema=schema)


def _settled(
    facts: Sequence[ImageInfo], faults: Sequence[ErrorRecord | None]
) -> tuple[list[ErrorRecord | None], list[int | None]]:
    """Per row, its fault if any, and else the entry of the task's columns that belongs to it."""
    loaded = sum(fact.error is None for fact in facts)
    if loaded != len(faults):
        raise BatchjobError(f"{len(faults)} predictions came for {loaded} images")
    entries = enumerate(faults)
    final: list[ErrorRecord | None] = []
    picked: list[int | None] = []
    for fact in facts:
        entry, fault = (None, fact.error) if fact.error is not None else next(entries)
        picked.append(entry if fault is None else None)
        final.append(fault)
    return final, picked


def _spread(column: pa.Array, picked: list[int | None]) -> pa.Array:
    if len(column) == len(picked) and None not in picked:
        return column
    return column.take(pa.array(picked, pa.int64()))


def _array(values: Any, field: pa.Field, length: int) -> pa.Array:
    if values is None:
        return pa.nulls(length, field.type)
    if isinstance(values, pa.ChunkedArray):
        values = values.combine_chunks() if values.num_chunks != 1 else values.chunk(0)
    if isinstance(values, pa.Array):
        return values if values.type == field.type else values.cast(field.type)
    return pa.array(values, field.type)


def _one_line(message: str) -> str:
    line = " ".join(message.encode("utf-8", "replace").decode("utf-8").split())
    return line if len(line) <= MESSAGE_LENGTH else line[: MESSAGE_LENGTH - 1] + "…"


class PartWriter:
    """Writes one part; counts its rows and errors as they go by.

    Leaving it as a context without `close` gives the file up; what lies there then is not a part.

    Args:
        path: a local file that is made here.
        schema: of every batch, exactly.
        row_group_rows: rows in a row group at most; wide rows make smaller ones.

    Attributes:
        rows: written so far.
        errors: `stage/type` → rows.
        examples: `stage/type` → `uri: message` of the first such row.
    """

    def __init__(self, path: Path, schema: pa.Schema, row_group_rows: int = ROW_GROUP_ROWS) -> None:
        untyped = [field.name for field in schema if _is_untyped(field.type)]
        if untyped:
            raise InvalidJob(f"columns without a type cannot be written: {', '.join(untyped)}")
        self.path, self._schema = path, schema
        self._group_rows = row_group_rows
        self._waiting: list[pa.RecordBatch] = []
        self._waiting_rows = self._waiting_bytes = 0
        self._last_position: int | None = None
        self.rows = 0
        self.errors: dict[str, int] = {}
        self.examples: dict[str, str] = {}
        self._writer = pq.ParquetWriter(
            path,
            schema,
            compression="zstd",
            use_dictionary=_leaves(schema, _repeats),
            write_statistics=_leaves(schema, _is_searched),
        )

    @property
    def failed(self) -> int:
        """Rows that hold an error."""
        return sum(self.errors.values())

    def add(self, batch: pa.RecordBatch) -> None:
        """Append rows. Raises BatchjobError where the schema differs or positions do not grow: a bug, not the data."""
        if not batch.schema.equals(self._schema):
            raise BatchjobError(f"a batch has another schema than its part:\n{batch.schema}\nnot\n{self._schema}")
        if not batch.num_rows:
            return
        self._check_order(batch.column("position").to_pylist())
        self._count(batch)
        self._waiting.append(batch)
        self._waiting_rows += batch.num_rows
        self._waiting_bytes += batch.nbytes
        if self._waiting_rows >= self._group_rows or self._waiting_bytes >= ROW_GROUP_BYTES:
            self._flush()

    def close(self, footer: PartFooter) -> None:
        """Write the footer and look at it. Raises BatchjobError where its counts are not the rows' own."""
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
        """Give the file up; what lies there then is not a part."""
        self._waiting.clear()
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
        bad = batch.filter(pc.is_valid(stages)).select(["error_stage", "error_type", "error_message", "uri"])
        for stage, kind, message, uri in zip(*(column.to_pylist() for column in bad.columns), strict=True):
            name = f"{stage}/{kind}"
            self.errors[name] = self.errors.get(name, 0) + 1
            self.examples.setdefault(name, f"{uri}: {message}")

    def _flush(self) -> None:
        if self._waiting:
            table = pa.Table.from_batches(self._waiting, self._schema)
            self._writer.write_table(table, row_group_size=max(table.num_rows, 1))
        self._waiting, self._waiting_rows, self._waiting_bytes = [], 0, 0


def _leaves(schema: pa.Schema, wanted: Any) -> list[str]:
    """Parquet paths of the leaf columns that `wanted(path, type)` picks."""

    def walk(path: str, kind: pa.DataType) -> list[str]:
        if pa.types.is_map(kind):
            inner = [("key_value.key", kind.key_type), ("key_value.value", kind.item_type)]
        elif pa.types.is_struct(kind):
            inner = [(field.name, field.type) for field in _children(kind)]
        elif _children(kind):
            inner = [("list.element", kind.value_type)]
        else:
            return [path] if wanted(path, kind) else []
        return [leaf for name, child in inner for leaf in walk(f"{path}.{name}", child)]

    return [leaf for field in schema for leaf in walk(field.name, field.type)]


def _repeats(path: str, kind: pa.DataType) -> bool:
    if path in _DISTINCT or pa.types.is_floating(kind):
        return False
    texts = pa.types.is_string(kind) or pa.types.is_large_string(kind) or pa.types.is_string_view(kind)
    return bool(texts or (pa.types.is_integer(kind) and kind.bit_width <= 32))


def _is_searched(path: str, kind: pa.DataType) -> bool:
    return ".list.element" not in path or not pa.types.is_floating(kind)
