"""Which images, in which shards: frozen once, in numbered chunks, each put-if-absent; adopted by whoever comes later.

A plan lies in `_batchjob/plans/NNNN/`: `head.json` (who and what), `chunk-NNNNNNN.arrow` (Arrow IPC streams of refs and
passthrough columns, their shards in the schema's metadata), `schema.arrow` (what all workers agreed on), `discarded`
(the tombstone). Nothing here is ever rewritten.
"""

from __future__ import annotations

import hashlib
import io
import json
import secrets
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, field
from datetime import UTC, datetime
from typing import Any

import pyarrow as pa

from batchjob.errors import AlreadyExists, InvalidJob, NotFound, Unavailable
from batchjob.records import Cursor, ImageRef, Shard, ShardKey
from batchjob.storage import Store

__all__ = [
    "FORMAT",
    "Chunk",
    "Contract",
    "Head",
    "PlanReader",
    "agree",
    "bury",
    "chunks",
    "current",
    "extend",
    "freeze",
    "is_buried",
    "is_discarded",
    "new_head",
]

FORMAT = 1
CHUNK_ROWS = 65_536
_REF_COLUMNS = ("uri", "location", "size", "etag")
_CHUNK_META, _CONTRACT_META = b"batchjob.chunk", b"batchjob.contract"
_HEAD_BYTES = 1 << 16
_LOOKS = 4

Refs = Callable[[Cursor], Iterator[pa.RecordBatch]]


@dataclass(frozen=True)
class Head:
    """What a plan is: written first, compared before anything else.

    Attributes:
        plan: random id of this plan.
        number: its folder; grows by one with each `discard`.
        job: the job as submitted, its folder's paths written `./…`.
        fingerprint: the settings that alter predictions, by dotted name.
        shard_size: images a shard.
        source_version: digest of the manifest, None where the source has no version.
    """

    plan: str
    number: int
    job: dict[str, Any]
    fingerprint: dict[str, Any]
    shard_size: int
    source_version: str | None
    batchjob: str
    created: str = field(default_factory=lambda: datetime.now(UTC).isoformat(timespec="seconds"))
    format: int = FORMAT

    @property
    def folder(self) -> str:
        return _folder(self.number)


@dataclass(frozen=True)
class Chunk:
    """A confirmed piece of a plan: its shards, where the source stood after it, its predecessor's digest."""

    number: int
    start: int
    cursor: Cursor
    last: bool
    shards: tuple[ShardKey, ...]
    previous: str = ""


@dataclass(frozen=True)
class Contract:
    """What the first warmed-up worker fixed for all: row schema, model digest, the images' shape as prepared."""

    schema: pa.Schema
    model: str
    size: tuple[int, ...] | None


def new_head(number: int, **facts: Any) -> Head:
    """A head with a fresh random plan id."""
    return Head(plan=secrets.token_hex(8), number=number, **facts)


def current(store: Store) -> tuple[int, Head | None]:
    """The number of the plan in force and its head; head None when none is written yet.

    Raises:
        InvalidJob: the plan was written in a format that this version does not know (a discarded one may be).
    """
    number = 0
    while (data := _read(store, f"{_folder(number)}head.json")) is not None:
        if _read(store, f"{_folder(number)}discarded") is None:
            return number, _parse_head(data, store)
        number += 1
    return number, None


def freeze(store: Store, head: Head) -> Head:
    """Put the head if absent, while `predictions/` is empty; another driver's head is adopted instead.

    Raises:
        InvalidJob: parts lie there without a plan.
    """
    key = f"{head.folder}head.json"
    foreign = next(iter(store.list("predictions/")), None)
    if foreign is not None and _read(store, key) is None:  # with a head, another driver has begun meanwhile
        raise InvalidJob(
            f"{store.uri}: {foreign.uri} is there but no plan is; output.uri must be empty or hold this job's own "
            "output: choose another folder, or remove it"
        )
    return _parse_head(_settle(store, key, json.dumps(asdict(head), indent=1).encode()), store)


def is_discarded(store: Store, head: Head) -> bool:
    """Whether the plan's tombstone stands."""
    return _read(store, f"{head.folder}discarded") is not None


def is_buried(store: Store, plan: str) -> bool:
    """Whether `plan` is the id of a discarded plan of this output."""
    number = 0
    while (data := _read(store, f"{_folder(number)}head.json")) is not None:
        if json.loads(data)["plan"] == plan:
            return _read(store, f"{_folder(number)}discarded") is not None
        number += 1
    return False


def bury(store: Store, head: Head) -> None:
    """Put the tombstone: from now on no worker commits a part of this plan."""
    _settle(store, f"{head.folder}discarded", b"{}\n")


def chunks(store: Store, head: Head) -> Iterator[Chunk]:
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
        if chunk.start != rows:
            raise _broken(store, head, number)
        yield chunk
        rows, number = chunk.cursor.rows, number + 1


def extend(store: Store, head: Head, refs: Refs, unchanged: Callable[[], None]) -> Iterator[Chunk]:
    """Every chunk of the plan, confirmed: those that are there, then those written now from where they end.

    Args:
        refs: the source's images after a cursor.
        unchanged: raises when the source is no longer the one that was planned; called before writing starts and
            before the last chunk is put.

    Raises:
        InvalidJob: the source changed, or the chunks that are there do not follow each other.
    """
    cursor, number = Cursor(), 0
    size = max(1, CHUNK_ROWS // head.shard_size) * head.shard_size
    for chunk in chunks(store, head):
        yield chunk
        if chunk.last:
            return
        cursor, number = chunk.cursor, chunk.number + 1
    unchanged()
    while True:
        previous = _digest(store, head, number - 1)
        for rows, last in _cut(refs(cursor), size):
            if last:
                unchanged()
            body = _encode(head, number, cursor, previous, rows, last)
            ours = _settle(store, _chunk_key(head, number), body) == body
            chunk = _peek(store, head, number)
            if chunk.previous != previous:
                raise _broken(store, head, number)
            yield chunk
            if chunk.last:
                return
            cursor, number = chunk.cursor, number + 1
            if not ours:
                break
            previous = hashlib.sha256(body).hexdigest()


class PlanReader:
    """Reads shards' members back; keeps the last chunk, since neighbours come together."""

    def __init__(self, store: Store, head: Head) -> None:
        self._store, self._head = store, head
        self._chunk: tuple[int, pa.Table] | None = None

    def shard(self, key: ShardKey) -> Shard:
        """The shard's refs and passthrough columns. Raises NotFound when its chunk is gone."""
        rows = self._rows(key.chunk).slice(key.offset, key.rows)
        return Shard(key, _refs(rows, key.index * self._head.shard_size), rows.drop_columns(list(_REF_COLUMNS)))

    def first(self, count: int) -> tuple[ImageRef, ...]:
        """The plan's first images, `count` or as many as its first chunk holds: the same for every worker."""
        return _refs(self._rows(0).slice(0, count), 0)

    @property
    def passthrough(self) -> pa.Schema:
        """Schema of the passthrough columns."""
        schema = self._rows(0).schema
        return pa.schema([schema.field(name) for name in schema.names if name not in _REF_COLUMNS])

    def _rows(self, number: int) -> pa.Table:
        if self._chunk is None or self._chunk[0] != number:
            data = self._store.read(_chunk_key(self._head, number)).data
            self._chunk = number, pa.ipc.open_stream(data).read_all().replace_schema_metadata(None)
        return self._chunk[1]


def agree(store: Store, head: Head, ours: Contract) -> Contract:
    """Put the contract if absent, and return the one that stands; its image size is the one that counts.

    Raises:
        InvalidJob: the one that stands has another schema or model digest.
    """
    key = f"{head.folder}schema.arrow"
    facts = json.dumps({"model": ours.model, "size": ours.size})
    body = ours.schema.with_metadata({_CONTRACT_META: facts}).serialize().to_pybytes()
    theirs = _parse_contract(_settle(store, key, body))
    if theirs.model != ours.model:
        raise InvalidJob(
            f"the model loaded here has digest {ours.model[:12]}, the plan at {store.uri} was begun with "
            f"{theirs.model[:12]}: weights or model code changed meanwhile; restore them, or `batchjob discard "
            f"{store.uri} --yes` and run again"
        )
    if not theirs.schema.equals(ours.schema):
        raise InvalidJob(
            f"rows would have another schema here than the plan at {store.uri} fixed "
            f"({_schema_difference(theirs, ours)}); use the versions it was begun with, or `batchjob discard` it"
        )
    return theirs


def _schema_difference(theirs: Contract, ours: Contract) -> str:
    there, here = set(map(str, theirs.schema)), set(map(str, ours.schema))
    return f"here {sorted(here - there)}, there {sorted(there - here)}"


def _parse_contract(data: bytes) -> Contract:
    schema = pa.ipc.read_schema(pa.py_buffer(data))
    facts = json.loads(schema.metadata[_CONTRACT_META])
    size = tuple(facts["size"]) if facts["size"] else None
    return Contract(schema.remove_metadata(), facts["model"], size)


def _parse_head(data: bytes, store: Store) -> Head:
    facts = json.loads(data)
    if facts.get("format") != FORMAT:
        raise InvalidJob(
            f"{store.uri}: its plan has format {facts.get('format')}, this version knows {FORMAT}; "
            f"finish it with batchjob {facts.get('batchjob')}"
        )
    return Head(**facts)


def _folder(number: int) -> str:
    return f"_batchjob/plans/{number:04d}/"


def _chunk_key(head: Head, number: int) -> str:
    return f"{head.folder}chunk-{number:07d}.arrow"


def _cut(batches: Iterator[pa.RecordBatch], size: int) -> Iterator[tuple[pa.Table, bool]]:
    """Tables of exactly `size` rows, the final one shorter (empty only when there is nothing at all)."""
    held: list[pa.RecordBatch] = []
    rows, schema = 0, None
    for batch in batches:
        schema = batch.schema
        held.append(batch)
        rows += batch.num_rows
        while rows > size:  # not ≥: a full chunk waits until something follows it, or it is the last
            table = pa.Table.from_batches(held)
            yield table.slice(0, size), False
            held, rows = table.slice(size).to_batches(), rows - size
    if schema is None:
        raise InvalidJob("the source gave no batch, not even an empty one with its schema")
    yield pa.Table.from_batches(held, schema), True


def _encode(head: Head, number: int, cursor: Cursor, previous: str, rows: pa.Table, last: bool) -> bytes:
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


def _shards(head: Head, start: int, rows: pa.Table) -> list[tuple[str, int]]:
    """Id and number of rows of each shard. An empty plan has one shard of no rows; an empty end of a plan has none."""
    found = []
    for offset in range(0, rows.num_rows or (start == 0), head.shard_size):
        part = rows.slice(offset, head.shard_size)
        found.append((_shard_id(head, (start + offset) // head.shard_size, part), part.num_rows))
    return found


def _shard_id(head: Head, index: int, members: pa.Table) -> str:
    digest = hashlib.sha256(f"{head.plan}\0{index}\0".encode())
    for name in ("location", "size", "etag"):
        digest.update("\0".join(map(str, members.column(name).to_pylist())).encode())
    return digest.hexdigest()[:16]


def _read(store: Store, key: str) -> bytes | None:
    try:
        return store.read(key).data
    except NotFound:
        return None


def _settle(store: Store, key: str, body: bytes) -> bytes:
    """Put if absent; the bytes that stand then, ours or another's. "Exists" with nothing stored is asked again."""
    for _ in range(_LOOKS):
        try:
            store.put_if_absent(key, body)
            return body
        except AlreadyExists:
            if (stands := _read(store, key)) is not None:
                return stands
    raise Unavailable(f"{store.uri}/{key}: the store answers 'exists' to every PUT and shows nothing; run again")


def _broken(store: Store, head: Head, number: int) -> InvalidJob:
    return InvalidJob(
        f"{store.uri}/{_chunk_key(head, number)} does not follow the chunk before it: the plan is damaged; "
        f"`batchjob discard {store.uri} --yes` and run again"
    )


def _digest(store: Store, head: Head, number: int) -> str:
    return hashlib.sha256(store.read(_chunk_key(head, number)).data).hexdigest() if number >= 0 else ""


def _peek(store: Store, head: Head, number: int) -> Chunk:
    key = _chunk_key(head, number)
    try:
        schema = pa.ipc.open_stream(store.read_head(key, _HEAD_BYTES)).schema
    except (pa.ArrowInvalid, OSError):  # more shards than fit in the first bytes
        schema = pa.ipc.open_stream(store.read(key).data).schema
    facts = json.loads(schema.metadata[_CHUNK_META])
    if facts["plan"] != head.plan:
        raise InvalidJob(f"{store.uri}: {key} belongs to plan {facts['plan']}, head.json says {head.plan}")
    return _chunk(head, facts)


def _chunk(head: Head, facts: dict[str, Any]) -> Chunk:
    keys, offset = [], 0
    for i, (shard, rows) in enumerate(facts["shards"]):
        keys.append(ShardKey(facts["start"] // head.shard_size + i, shard, rows, facts["number"], offset))
        offset += rows
    end = Cursor(**facts["cursor"])
    return Chunk(facts["number"], facts["start"], end, facts["last"], tuple(keys), facts["previous"])


def _refs(rows: pa.Table, start: int) -> tuple[ImageRef, ...]:
    columns = (rows.column(name).to_pylist() for name in _REF_COLUMNS)
    return tuple(ImageRef(start + i, *values) for i, values in enumerate(zip(*columns, strict=True)))
