"""The chunks of a plan: images cut into shards, each chunk put once; adopted by whoever comes later, and read back."""

from __future__ import annotations

import pyarrow as pa

from batchjob.plan.chunks import _REF_COLUMNS, _broken, _chunk_key
from batchjob.plan.head import PlanHead, report_damage
from batchjob.storage.store import Store
from batchjob.types import ImageRef, Shard, ShardKey

__all__ = ["PlanReader"]


class PlanReader:
    """Reads shards' members back; keeps the last chunk, since neighbours come together."""

    def __init__(self, store: Store, head: PlanHead) -> None:
        self._store, self._head = store, head
        self._chunk: tuple[int, pa.Table] | None = None

    def read_shard(self, key: ShardKey) -> Shard:
        """The shard's refs and passthrough columns. Raises NotFound when its chunk is gone."""
        rows = self._rows(key.chunk).slice(key.offset, key.rows)
        if rows.num_rows != key.rows:
            raise _broken(self._store, self._head, key.chunk)
        return Shard(key, _refs(rows, key.index * self._head.shard_size), rows.drop_columns(list(_REF_COLUMNS)))

    def read_first_refs(self, count: int) -> tuple[ImageRef, ...]:
        """The plan's first images, `count` or as many as its first chunk holds: the same for every worker."""
        return _refs(self._rows(0).slice(0, count), 0)

    @property
    def passthrough_schema(self) -> pa.Schema:
        """Schema of the passthrough columns."""
        schema = self._rows(0).schema
        return pa.schema([schema.field(name) for name in schema.names if name not in _REF_COLUMNS])

    def _rows(self, number: int) -> pa.Table:
        if self._chunk is None or self._chunk[0] != number:
            key = _chunk_key(self._head, number)
            data = self._store.read(key).data
            with report_damage(self._store, key):
                table = pa.ipc.open_stream(data).read_all().replace_schema_metadata(None)
                table.validate(full=True)
                table.select(_REF_COLUMNS)
            self._chunk = number, table
        return self._chunk[1]


def _refs(rows: pa.Table, start: int) -> tuple[ImageRef, ...]:
    columns = (rows.column(name).to_pylist() for name in _REF_COLUMNS)
    return tuple(ImageRef(start + i, *values) for i, values in enumerate(zip(*columns, strict=True)))
