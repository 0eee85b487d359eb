"""The chunks of a plan: images cut into shards, each chunk put once; adopted by whoever comes later, and read back."""

from __future__ import annotations

import hashlib
import io
import json
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from typing import Any

import pyarrow as pa

from batchjob.errors import InvalidJob, NotFound
from batchjob.plan.head import PlanHead, report_damage
from batchjob.storage.store import Store, put_or_get
from batchjob.types import Cursor, ShardKey

__all__ = ["CHUNK_BYTES", "CHUNK_ROWS", "Chunk", "extend_plan", "read_chunks"]

CHUNK_ROWS = 65_536
CHUNK_BYTES = 64 << 20  # of Arrow data, so that wide passthrough columns fill no driver's memory
_REF_COLUMNS = ("uri", "location", "size", "etag")
_CHUNK_META = b"batchjob.chunk"
_HEAD_BYTES = 1 << 16
ReadRefs = Callable[[Cursor], Iterator[pa.RecordBatch]]


@dataclass(frozen=True)
class Chunk:
    """A confirmed piece of a plan: its shards, where the source stood after it, its predecessor's digest."""

    number: int
    first_row: int
    end_cursor: Cursor
    is_last: bool
    shards: tuple[ShardKey, ...]
    previous_digest: str = ""


def read_chunks(store: Store, head: PlanHead) -> Iterator[Chunk]:
    """The chunks written so far, in order; the plan is whole when the final one says `last`.

    Raises:
        InvalidJob: one belongs to another plan, or does not begin where the one before it ends.
    """
    rows = number = 0
    while True:
        try:
            chunk = _peek(store, head, number)
        except NotFound:
            return
        if chunk.first_row != rows:
            raise _broken(store, head, number)
        yield chunk
        rows, number = chunk.end_cursor.rows, number + 1


def extend_plan(
    store: Store, head: PlanHead, read_refs: ReadRefs, check_unchanged: Callable[[], None]
) -> Iterator[Chunk]:
    """Every chunk of the plan, confirmed: those that are there, then those written now from where they end.

    Args:
        refs: the source's images after a cursor.
        unchanged: raises when the source is no longer the one that was planned; called before writing starts and
            before the last chunk is put.

    Raises:
        InvalidJob: the source changed, or the chunks that are there do not follow each other.
    """
    cursor, number = Cursor(), 0
    for chunk in read_chunks(store, head):
        yield chunk
        if chunk.is_last:
            return
        cursor, number = chunk.end_cursor, chunk.number + 1
    check_unchanged()
    while True:
        previous = _digest(store, head, number - 1)
        for rows, last in _cut(read_refs(cursor), head.shard_size):
            if last:
                check_unchanged()
            body = _encode(head, number, cursor, previous, rows, last)
            ours = put_or_get(store, _chunk_key(head, number), body) == body
            chunk = _peek(store, head, number)
            if chunk.previous_digest != previous:
                raise _broken(store, head, number)
            yield chunk
            if chunk.is_last:
                return
            cursor, number = chunk.end_cursor, number + 1
            if not ours:
                break
            previous = hashlib.sha256(body).hexdigest()


def _chunk_key(head: PlanHead, number: int) -> str:
    return f"{head.folder}chunk-{number:07d}.arrow"


def _cut(batches: Iterator[pa.RecordBatch], shard: int) -> Iterator[tuple[pa.Table, bool]]:
    """Tables of whole shards of `shard` rows, the final one shorter (empty only when there is nothing at all).

    Each holds at most CHUNK_ROWS rows and about CHUNK_BYTES bytes, but one shard at least.
    """
    held: list[pa.RecordBatch] = []
    rows = size = 0
    schema = None
    for batch in batches:
        schema = batch.schema
        held.append(batch)
        rows, size = rows + batch.num_rows, size + batch.nbytes
        # not ≥: a full chunk waits until something follows it, or it is the last
        while rows > (most := _chunk_rows(shard, size / max(1, rows))):
            table = pa.Table.from_batches(held)
            yield table.slice(0, most), False
            held = table.slice(most).to_batches()
            rows, size = rows - most, sum(rest.nbytes for rest in held)
    if schema is None:
        raise InvalidJob("the source gave no batch, not even an empty one with its schema")
    yield pa.Table.from_batches(held, schema), True


def _chunk_rows(shard: int, row_bytes: float) -> int:
    """As many whole shards as fit into a chunk, in rows."""
    most = min(CHUNK_ROWS, int(CHUNK_BYTES / max(row_bytes, 1)))
    return max(1, most // shard) * shard


def _encode(head: PlanHead, number: int, cursor: Cursor, previous: str, rows: pa.Table, last: bool) -> bytes:
    """A chunk as an Arrow IPC stream: schema message first, so that a reader of shards needs only its beginning."""
    end = Cursor(cursor.rows + rows.num_rows, rows.column("location")[-1].as_py() if rows.num_rows else cursor.last)
    facts = {
        "plan": head.plan,
        "number": number,
        "start": cursor.rows,
        "previous": previous,
        "cursor": asdict(end),
        "last": last,
        "shards": _shards(head, cursor.rows, rows),
    }
    sink = io.BytesIO()
    schema = rows.schema.with_metadata({_CHUNK_META: json.dumps(facts)})
    with pa.ipc.new_stream(sink, schema, options=pa.ipc.IpcWriteOptions(compression="zstd")) as writer:
        writer.write_table(rows.combine_chunks().cast(schema))
    return sink.getvalue()


def _shards(head: PlanHead, start: int, rows: pa.Table) -> list[tuple[str, int]]:
    """Id and number of rows of each shard. An empty plan has one shard of no rows; an empty end of a plan has none."""
    found = []
    for offset in range(0, rows.num_rows or (start == 0), head.shard_size):
        part = rows.slice(offset, head.shard_size)
        found.append((_shard_id(head, (start + offset) // head.shard_size, part), part.num_rows))
    return found


def _shard_id(head: PlanHead, index: int, members: pa.Table) -> str:
    digest = hashlib.sha256(f"{head.plan}\0{index}\0".encode())
    for name in ("location", "size", "etag"):
        digest.update("\0".join(map(str, members.column(name).to_pylist())).encode())
    return digest.hexdigest()[:16]


def _broken(store: Store, head: PlanHead, number: int) -> InvalidJob:
    return InvalidJob(
        f"{store.uri}/{_chunk_key(head, number)} does not follow the chunk before it: the plan is damaged; "
        f"`batchjob discard {store.uri} --yes` and run again"
    )


def _digest(store: Store, head: PlanHead, number: int) -> str:
    return hashlib.sha256(store.read(_chunk_key(head, number)).data).hexdigest() if number >= 0 else ""


def _peek(store: Store, head: PlanHead, number: int) -> Chunk:
    key = _chunk_key(head, number)
    try:
        schema = pa.ipc.open_stream(store.read_head(key, _HEAD_BYTES)).schema
    except (pa.ArrowInvalid, OSError):  # more shards than fit in the first bytes
        data = store.read(key).data
        with report_damage(store, key):
            schema = pa.ipc.open_stream(data).schema
    with report_damage(store, key):
        facts = json.loads(schema.metadata[_CHUNK_META])
        owner, chunk = facts["plan"], _chunk(head, facts)
    if owner != head.plan:
        raise InvalidJob(f"{store.uri}: {key} belongs to plan {owner}, head.json says {head.plan}")
    if chunk.number != number:
        raise _broken(store, head, number)
    return chunk


def _chunk(head: PlanHead, facts: dict[str, Any]) -> Chunk:
    keys, offset = [], 0
    for i, (shard, rows) in enumerate(facts["shards"]):
        keys.append(ShardKey(facts["start"] // head.shard_size + i, shard, rows, facts["number"], offset))
        offset += rows
    end = Cursor(**facts["cursor"])
    return Chunk(facts["number"], facts["start"], end, facts["last"], tuple(keys), facts["previous"])
