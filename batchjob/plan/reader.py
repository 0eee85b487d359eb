"""The reader of a plan: the image refs and passthrough columns of a shard."""

from __future__ import annotations

from collections.abc import Iterator

import pyarrow as pa

from batchjob.plan.chunks import REF_COLUMNS, broken_chunk_error, chunk_key, read_chunks
from batchjob.plan.head import PlanHead, report_damage
from batchjob.storage.store import Store
from batchjob.types import ImageRef, Shard, ShardKey

__all__ = ["PlanReader"]


class PlanReader:
    """Reads shards of a plan. Keeps the last chunk, because neighbouring shards are read one after the other.

    Args:
        store: Output of the job.
        head: Head of the plan.
    """

    def __init__(self, store: Store, head: PlanHead) -> None:
        self._store, self._head = store, head
        self._cached_chunk: tuple[int, pa.Table] | None = None

    def read_shard(self, key: ShardKey) -> Shard:
        """Read the refs and passthrough columns of a shard. Raises NotFound if its chunk is gone."""
        rows = self._read_rows(key.chunk).slice(key.offset, key.rows)
        if rows.num_rows != key.rows:
            raise broken_chunk_error(self._store, self._head, key.chunk)
        refs = _to_refs(rows, key.index * self._head.shard_size)
        return Shard(key, refs, rows.drop_columns(list(REF_COLUMNS)))

    def read_first_refs(self, count: int) -> tuple[ImageRef, ...]:
        """Read the first images of the plan, `count` or as many as its first chunk holds: the same for every worker."""
        return _to_refs(self._read_rows(0).slice(0, count), 0)

    def iterate_chunks(self) -> Iterator[pa.Table]:
        """Yield the rows of each chunk of a complete plan, in order, with one chunk in memory at a time."""
        for chunk in read_chunks(self._store, self._head):
            yield self._read_rows(chunk.number)

    @property
    def passthrough_schema(self) -> pa.Schema:
        """Schema of the passthrough columns, with `id` if there is one."""
        schema = self._read_rows(0).schema
        return pa.schema([schema.field(name) for name in schema.names if name not in REF_COLUMNS])

    def _read_rows(self, number: int) -> pa.Table:
        if self._cached_chunk is None or self._cached_chunk[0] != number:
            key = chunk_key(self._head, number)
            data = self._store.read(key).data
            with report_damage(self._store, key):
                table = pa.ipc.open_stream(data).read_all().replace_schema_metadata(None)
                table.validate(full=True)
                table.select(REF_COLUMNS)
            self._cached_chunk = number, table
        return self._cached_chunk[1]


def _to_refs(rows: pa.Table, first_position: int) -> tuple[ImageRef, ...]:
    """Return the rows as image refs. For example, with `first_position` 6 the third row has position 8."""
    columns = (rows.column(name).to_pylist() for name in REF_COLUMNS)
    return tuple(ImageRef(first_position + i, *values) for i, values in enumerate(zip(*columns, strict=True)))
