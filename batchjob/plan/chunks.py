"""Chunks of a plan: image refs cut into shards and written once, as numbered Arrow streams.

A plan lies in `_batchjob/plans/NNNN/`: `head.json` (see head.py), `chunk-NNNNNNN.arrow` (refs and passthrough columns;
the shards stand in the schema's metadata), `schema.arrow` (see contract.py), `discarded` (the tombstone). Nothing there
is ever rewritten.
"""

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

__all__ = [
    "CHUNK_BYTES",
    "CHUNK_ROWS",
    "REF_COLUMNS",
    "Chunk",
    "broken_chunk_error",
    "chunk_key",
    "count_planned_images",
    "extend_plan",
    "read_chunks",
]

CHUNK_ROWS = 65_536
# Limit of Arrow data, so that wide passthrough columns do not fill the driver's memory.
CHUNK_BYTES = 64 << 20
REF_COLUMNS = ("uri", "location", "size", "etag")
_METADATA_KEY = b"batchjob.chunk"
_HEAD_BYTES = 1 << 16  # read to find the shards: the schema message is the first one of the stream

ReadRefs = Callable[[Cursor], Iterator[pa.RecordBatch]]


@dataclass(frozen=True)
class Chunk:
    """A confirmed piece of a plan, without its rows.

    Attributes:
        number: Number of the chunk, from 0.
        first_row: Position of its first image in the plan.
        end_cursor: Cursor of the source after the last row of the chunk.
        is_last: True if the plan ends with this chunk.
        shards: Shards of the chunk, in order.
        previous_digest: SHA-256 of the chunk before it, hexadecimal; empty for the first chunk.
    """

    number: int
    first_row: int
    end_cursor: Cursor
    is_last: bool
    shards: tuple[ShardKey, ...]
    previous_digest: str = ""


def read_chunks(store: Store, head: PlanHead) -> Iterator[Chunk]:
    """Yield the chunks written so far, in order; the plan is complete if the final one has `is_last`.

    Raises:
        InvalidJob: A chunk belongs to another plan, or does not begin where the one before it ends.
    """
    rows = number = 0
    while True:
        try:
            chunk = _read_chunk(store, head, number)
        except NotFound:
            return
        if chunk.first_row != rows:
            raise broken_chunk_error(store, head, number)
        yield chunk
        rows, number = chunk.end_cursor.rows, number + 1


def count_planned_images(store: Store, head: PlanHead) -> tuple[int, bool]:
    """Return the images planned so far, and True if these are all; reads a few objects, however many chunks there are.

    Chunks are numbered without gaps. With 1,500 of them, the numbers 0, 1, 3, 7, … 2047 are tried until one is absent,
    then the gap between the last that is there and the first that is not is halved: 22 requests.
    """
    last, absent = -1, 0
    while _has_chunk(store, head, absent):
        last, absent = absent, 2 * absent + 1
    while absent - last > 1:
        middle = (last + absent) // 2
        last, absent = (middle, absent) if _has_chunk(store, head, middle) else (last, middle)
    if last < 0:
        return 0, False
    chunk = _read_chunk(store, head, last)
    return chunk.end_cursor.rows, chunk.is_last


def _has_chunk(store: Store, head: PlanHead, number: int) -> bool:
    try:
        store.stat(chunk_key(head, number))
    except NotFound:
        return False
    return True


def extend_plan(
    store: Store, head: PlanHead, read_refs: ReadRefs, check_unchanged: Callable[[], None]
) -> Iterator[Chunk]:
    """Yield every chunk of the plan: those that are stored, then those that are written from where they end.

    Each chunk is yielded once it is stored. If another driver has stored a chunk first, its chunk is adopted, and the
    listing starts again from the end of that chunk.

    Args:
        store: Output of the job.
        head: Head of the plan.
        read_refs: Returns the source's batches of images after a cursor.
        check_unchanged: Raises InvalidJob if the source is not the one that was planned; called before anything is
            written and before the last chunk.

    Raises:
        InvalidJob: The source changed, or the stored chunks do not follow each other.
    """
    cursor, number = Cursor(), 0
    for chunk in read_chunks(store, head):
        yield chunk
        if chunk.is_last:
            return
        cursor, number = chunk.end_cursor, chunk.number + 1
    check_unchanged()
    while True:
        previous_digest = hashlib.sha256(store.read(chunk_key(head, number - 1)).data).hexdigest() if number else ""
        for rows, is_last in _cut_chunks(read_refs(cursor), head.shard_size):
            if is_last:
                check_unchanged()
            body = _encode_chunk(head, number, cursor, previous_digest, rows, is_last)
            is_ours = put_or_get(store, chunk_key(head, number), body) == body
            chunk = _read_chunk(store, head, number)
            if chunk.previous_digest != previous_digest:
                raise broken_chunk_error(store, head, number)
            yield chunk
            if chunk.is_last:
                return
            cursor, number = chunk.end_cursor, number + 1
            if not is_ours:
                break
            previous_digest = hashlib.sha256(body).hexdigest()


def chunk_key(head: PlanHead, number: int) -> str:
    """Return the key of a chunk in the output."""
    return f"{head.folder}chunk-{number:07d}.arrow"


def broken_chunk_error(store: Store, head: PlanHead, number: int) -> InvalidJob:
    """Return the error of a chunk that does not follow the one before it."""
    return InvalidJob(
        f"{store.uri}/{chunk_key(head, number)} does not follow the chunk before it: the plan is damaged; "
        f"`batchjob discard {store.uri} --yes` and run again"
    )


def _cut_chunks(batches: Iterator[pa.RecordBatch], shard_size: int) -> Iterator[tuple[pa.Table, bool]]:
    """Yield the rows of each chunk, and True with the last one.

    A chunk holds whole shards: at most `CHUNK_ROWS` rows and about `CHUNK_BYTES` bytes, but at least one shard. Only
    the last shard of the plan is shorter; the last chunk is empty only if there are no images at all. For example, 14
    images in shards of 3, with `CHUNK_ROWS` 7, are chunks of 6, 6 and 2 rows.
    """
    held: list[pa.RecordBatch] = []
    rows = size = 0
    schema = None
    for batch in batches:
        schema = batch.schema
        held.append(batch)
        rows, size = rows + batch.num_rows, size + batch.nbytes
        # Not ≥: a full chunk waits until a row follows it, because it may be the last one.
        while rows > (chunk_rows := _rows_per_chunk(shard_size, size / max(1, rows))):
            table = pa.Table.from_batches(held)
            yield table.slice(0, chunk_rows), False
            held = table.slice(chunk_rows).to_batches()
            rows, size = rows - chunk_rows, sum(rest.nbytes for rest in held)
    if schema is None:
        raise InvalidJob("the source gave no batch, not even an empty one with its schema")
    yield pa.Table.from_batches(held, schema), True


def _rows_per_chunk(shard_size: int, row_bytes: float) -> int:
    """Return the rows of as many whole shards as fit into a chunk: shards of 3 rows and a limit of 7 rows give 6."""
    limit = min(CHUNK_ROWS, int(CHUNK_BYTES / max(row_bytes, 1)))
    return max(1, limit // shard_size) * shard_size


def _encode_chunk(
    head: PlanHead, number: int, start: Cursor, previous_digest: str, rows: pa.Table, is_last: bool
) -> bytes:
    """Encode a chunk as an Arrow IPC stream: its first message, the schema, holds everything but the rows."""
    end = Cursor(start.rows + rows.num_rows, rows.column("location")[-1].as_py() if rows.num_rows else start.last)
    metadata = {
        "plan": head.plan,
        "number": number,
        "start": start.rows,
        "previous": previous_digest,
        "cursor": asdict(end),
        "last": is_last,
        "shards": _cut_shards(head, start.rows, rows),
    }
    sink = io.BytesIO()
    schema = rows.schema.with_metadata({_METADATA_KEY: json.dumps(metadata)})
    with pa.ipc.new_stream(sink, schema, options=pa.ipc.IpcWriteOptions(compression="zstd")) as writer:
        writer.write_table(rows.combine_chunks().cast(schema))
    return sink.getvalue()


def _cut_shards(head: PlanHead, first_row: int, rows: pa.Table) -> list[tuple[str, int]]:
    """Return id and number of rows of each shard of a chunk.

    For example, 5 rows that begin at row 6, in shards of 3, are shard 2 of 3 rows and shard 3 of 2 rows. A plan without
    images has one shard of no rows; an empty chunk at the end of a plan has none.
    """
    shards = []
    for offset in range(0, rows.num_rows or (first_row == 0), head.shard_size):
        members = rows.slice(offset, head.shard_size)
        shard_id = _hash_shard(head, (first_row + offset) // head.shard_size, members)
        shards.append((shard_id, members.num_rows))
    return shards


def _hash_shard(head: PlanHead, index: int, members: pa.Table) -> str:
    digest = hashlib.sha256(f"{head.plan}\0{index}\0".encode())
    for name in ("location", "size", "etag"):
        digest.update("\0".join(map(str, members.column(name).to_pylist())).encode())
    return digest.hexdigest()[:16]


def _read_chunk(store: Store, head: PlanHead, number: int) -> Chunk:
    """Read a chunk without its rows: the first 64 KiB hold its shards, unless there are thousands."""
    key = chunk_key(head, number)
    try:
        schema = pa.ipc.open_stream(store.read_head(key, _HEAD_BYTES)).schema
    except (pa.ArrowInvalid, OSError):
        data = store.read(key).data
        with report_damage(store, key):
            schema = pa.ipc.open_stream(data).schema
    with report_damage(store, key):
        metadata = json.loads(schema.metadata[_METADATA_KEY])
        plan_id, chunk = metadata["plan"], _parse_chunk(head, metadata)
    if plan_id != head.plan:
        raise InvalidJob(f"{store.uri}: {key} belongs to plan {plan_id}, head.json says {head.plan}")
    if chunk.number != number:
        raise broken_chunk_error(store, head, number)
    return chunk


def _parse_chunk(head: PlanHead, metadata: dict[str, Any]) -> Chunk:
    first_row, shards, offset = metadata["start"], [], 0
    for i, (shard_id, rows) in enumerate(metadata["shards"]):
        shards.append(ShardKey(first_row // head.shard_size + i, shard_id, rows, metadata["number"], offset))
        offset += rows
    end_cursor = Cursor(**metadata["cursor"])
    return Chunk(metadata["number"], first_row, end_cursor, metadata["last"], tuple(shards), metadata["previous"])
