"""The parts of a run over a billion images that are simulated: the list, the workers, the store."""

from __future__ import annotations

import io
import pickle
from collections import Counter, OrderedDict
from collections.abc import Iterable, Iterator
from itertools import count
from pathlib import Path
from typing import BinaryIO

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from batchjob.errors import AlreadyExists, NotFound
from batchjob.output.provenance import Provenance, ShardResult
from batchjob.plan.chunks import CHUNK_ROWS, Chunk
from batchjob.plan.head import Head
from batchjob.pool.placement import Placement
from batchjob.sources.source import BATCH_ROWS, REF_FIELDS
from batchjob.storage.objects import Blob, Stat
from batchjob.types import Cursor, ShardKey
from batchjob.worker.messages import Done, Event, Loaded, Ready, Setup

__all__ = ["HEAD", "SHARD_ROWS", "CountingStore", "SimulatedPool", "chunks", "refs"]

SHARD_ROWS = 10_000
HEAD = Head("0123456789abcdef", 0, {}, {}, SHARD_ROWS, None, "")
_LOADED = Loaded("cpu", "fp32", "simulated@000000000000", ("label_id", "score"), batch_size=128, seconds=0.0, ahead=512)
_PAGE = 1_000  # keys in an answer to a listing
_PART_BYTES = 400_000
_KEPT = 4  # bodies: a chunk is looked at once after its PUT


def refs(after: Cursor, images: int) -> Iterator[pa.RecordBatch]:
    """What a source would list after a cursor: keys as of a bucket, sizes, random tags."""
    rng = np.random.default_rng(0)
    for start in range(after.rows, images, BATCH_ROWS):
        rows = min(BATCH_ROWS, images - start)
        numbers = pc.utf8_lpad(pa.array(np.arange(start, start + rows)).cast(pa.string()), 12, "0")
        uris = pc.binary_join_element_wise("s3://a-bucket/some/images/", numbers, ".jpg", "")
        offsets = pa.array(np.arange(rows + 1, dtype=np.int32) * 32)
        tags = pa.StringArray.from_buffers(
            rows, offsets.buffers()[1], pa.py_buffer(rng.bytes(rows * 16).hex().encode())
        )
        sizes = pa.array(rng.integers(20_000, 200_000, rows))
        yield pa.RecordBatch.from_arrays([uris, uris, sizes, tags], schema=pa.schema(REF_FIELDS))


def chunks(images: int) -> Iterator[Chunk]:
    """The chunks of a plan that stands, without their rows."""
    most = CHUNK_ROWS // SHARD_ROWS
    shards = images // SHARD_ROWS
    for number, first in enumerate(range(0, shards, most)):
        keys = tuple(
            ShardKey(index, f"{index:016x}", SHARD_ROWS, number, (index - first) * SHARD_ROWS)
            for index in range(first, min(first + most, shards))
        )
        rows = (keys[-1].index + 1) * SHARD_ROWS
        yield Chunk(number, first * SHARD_ROWS, Cursor(rows), rows == images, keys)


def made(key: ShardKey) -> Provenance:
    """What the part of a shard says in its footer."""
    seconds = {"wall": 40.0, "read": 10.0, "decode": 20.0, "transform": 5.0, "predict": 30.0, "write": 1.0}
    versions = {"batchjob": "0.1", "torch": "2.15", "torchvision": "0.30", "pyarrow": "26.0"}
    attempt = f"{key.index:016x}"
    return Provenance(HEAD.plan, key.id, key.index, attempt, 0, "f" * 64, "m" * 64, key.rows, 0, {}, seconds, versions)


class SimulatedPool:
    """Workers that commit whatever they are given at the next turn, placed by the real `Placement`. See `Pool`."""

    def __init__(self, workers: int, store: CountingStore) -> None:
        self.size, self._store = workers, store
        self._placement = Placement(workers)
        self._events: list[Event] = []

    def start(self, setup: Setup) -> None:  # noqa: ARG002 - as all pools
        for number in range(self.size):
            self._placement.enter(str(number), _LOADED.ahead)
            self._events.append(Ready(str(number), _LOADED))

    def free(self) -> int:
        return self._placement.free()

    def submit(self, key: ShardKey, plan: int) -> None:
        self._placement.submit(key, plan)

    def idle(self) -> int:
        return self._placement.idle()

    def back_up(self, key: ShardKey, plan: int) -> None:
        self._placement.back_up(key, plan)

    def wait(self, timeout: float) -> list[Event]:  # noqa: ARG002
        events, self._events = self._events, []
        for due in self._placement.due():
            stat = self._store.commit(due.key)
            result = ShardResult(due.key, made(due.key), {}, True, stat.etag)
            events.append(Done(pickle.loads(pickle.dumps(result))))
            self._placement.finish(due.worker, due.key)
        return events

    def close(self) -> None: ...


class CountingStore:
    """A `Store` that holds names and no parts, and counts what it is asked; of what was put last, the bodies too."""

    uri = "simulated://out"

    def __init__(self) -> None:
        self.requests: Counter[str] = Counter()
        self.sent = 0
        self._numbers = count()
        self._stats: dict[str, Stat] = {}
        self._bodies: OrderedDict[str, bytes] = OrderedDict()
        self._keys: dict[str, ShardKey] = {}

    def fill(self, keys: Iterable[ShardKey]) -> None:
        """Let the parts of these shards be there."""
        for key in keys:
            self.commit(key)
            self._keys[key.part] = key

    def commit(self, key: ShardKey) -> Stat:
        """A worker's PUT, which is none of the driver's requests."""
        return self._note(key.part, _PART_BYTES)

    def read(self, key: str) -> Blob:
        """Raises NotFound."""
        self.requests["GET"] += 1
        stat = self._stat(key)
        return Blob(self._bodies[key], stat.etag, stat.version)

    def read_head(self, key: str, size: int) -> bytes:
        """The first `size` bytes, or all. Raises NotFound."""
        return self.read(key).data[:size]

    def read_tail(self, key: str, size: int) -> bytes:
        """A footer as a part has it."""
        self.requests["GET"] += 1
        metadata = {Provenance.KEY: made(self._keys[key]).dump()}
        sink = io.BytesIO()
        pq.write_table(pa.table({"position": pa.array([], pa.int64())}).replace_schema_metadata(metadata), sink)
        return sink.getvalue()[-size:]

    def open(self, key: str) -> BinaryIO:
        """Its bytes as a file."""
        return io.BytesIO(self.read(key).data)

    def stat(self, key: str) -> Stat:
        """Raises NotFound."""
        self.requests["HEAD"] += 1
        return self._stat(key)

    def list(self, prefix: str) -> Iterator[Stat]:
        """Page after page."""
        found = sorted(key for key in self._stats if key.startswith(prefix))
        self.requests["LIST"] += max(1, -(-len(found) // _PAGE))
        return (self._stats[key] for key in found)

    def put_if_absent(self, key: str, body: bytes | Path) -> Stat:
        """Raises AlreadyExists."""
        self.requests["PUT"] += 1
        if key in self._stats:
            raise AlreadyExists(key)
        assert isinstance(body, bytes)
        self.sent += len(body)
        self._bodies[key] = body
        if len(self._bodies) > _KEPT:
            self._bodies.popitem(last=False)
        return self._note(key, len(body))

    def replace_if_match(self, key: str, body: bytes | Path, version: str) -> Stat:
        """Nothing is replaced here."""
        raise AssertionError(f"{key} {version} {len(str(body))}")

    def delete(self, key: str) -> None:
        """Absent is fine."""
        self.requests["DELETE"] += 1
        self._stats.pop(key, None)

    def delete_if_match(self, key: str, version: str) -> None:  # noqa: ARG002 - nobody else writes here
        """Absent is fine."""
        self.delete(key)

    def _stat(self, key: str) -> Stat:
        if key not in self._stats:
            raise NotFound(key)
        return self._stats[key]

    def _note(self, key: str, size: int) -> Stat:
        tag = f"{next(self._numbers):032x}"
        self._stats[key] = Stat(key, size, tag, tag)
        return self._stats[key]
