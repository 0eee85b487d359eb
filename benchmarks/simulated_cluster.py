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
from batchjob.output.provenance import PartFooter, ShardResult
from batchjob.plan.chunks import CHUNK_ROWS, Chunk
from batchjob.plan.head import PlanHead
from batchjob.pool.placement import Placement
from batchjob.sources.source import BATCH_ROWS, REF_FIELDS
from batchjob.storage.objects import ObjectData, ObjectInfo
from batchjob.types import Cursor, ShardKey
from batchjob.worker.messages import ShardCommitted, WorkerEvent, WorkerInfo, WorkerReady, WorkerSetup

__all__ = ["HEAD", "SHARD_ROWS", "CountingStore", "SimulatedPool", "generate_chunks", "generate_refs"]

SHARD_ROWS = 10_000
HEAD = PlanHead("0123456789abcdef", 0, {}, {}, SHARD_ROWS, None, "")
_LOADED = WorkerInfo(
    "cpu", "fp32", "simulated@000000000000", ("label_id", "score"), batch_size=128, seconds=0.0, ahead=512
)
_PAGE = 1_000  # keys in an answer to a listing
_PART_BYTES = 400_000
_KEPT = 4  # bodies: a chunk is looked at once after its PUT


def generate_refs(after: Cursor, images: int) -> Iterator[pa.RecordBatch]:
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


def generate_chunks(images: int) -> Iterator[Chunk]:
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


def make_footer(key: ShardKey) -> PartFooter:
    """What the part of a shard says in its footer."""
    seconds = {"wall": 40.0, "read": 10.0, "decode": 20.0, "transform": 5.0, "predict": 30.0, "write": 1.0}
    versions = {"batchjob": "0.1", "torch": "2.15", "torchvision": "0.30", "pyarrow": "26.0"}
    attempt = f"{key.index:016x}"
    return PartFooter(HEAD.plan, key.id, key.index, attempt, 0, "f" * 64, "m" * 64, key.rows, 0, {}, seconds, versions)


class SimulatedPool:
    """Workers that commit whatever they are given at the next turn, placed by the real `Placement`. See `Pool`."""

    def __init__(self, workers: int, store: CountingStore) -> None:
        self.size, self._store = workers, store
        self._placement = Placement(workers)
        self._events: list[WorkerEvent] = []

    def start(self, setup: WorkerSetup) -> None:  # noqa: ARG002 - as all pools
        for number in range(self.size):
            self._placement.add_worker(str(number), _LOADED.ahead)
            self._events.append(WorkerReady(str(number), _LOADED))

    def free_slots(self) -> int:
        return self._placement.free_slots()

    def submit(self, key: ShardKey, plan_number: int) -> None:
        self._placement.submit(key, plan_number)

    def idle_workers(self) -> int:
        return self._placement.idle_workers()

    def submit_speculative(self, key: ShardKey, plan_number: int) -> None:
        self._placement.submit_speculative(key, plan_number)

    def wait(self, timeout: float) -> list[WorkerEvent]:  # noqa: ARG002
        events, self._events = self._events, []
        for due in self._placement.take_assignments():
            stat = self._store.commit_part(due.key)
            result = ShardResult(due.key, make_footer(due.key), {}, True, stat.etag)
            events.append(ShardCommitted(pickle.loads(pickle.dumps(result))))
            self._placement.finish(due.worker, due.key)
        return events

    def close(self) -> None: ...


class CountingStore:
    """A `Store` that holds names and no parts, and counts what it is asked; of what was put last, the bodies too."""

    uri = "simulated://out"

    def __init__(self) -> None:
        self.requests: Counter[str] = Counter()
        self.sent_bytes = 0
        self._numbers = count()
        self._stats: dict[str, ObjectInfo] = {}
        self._bodies: OrderedDict[str, bytes] = OrderedDict()
        self._keys: dict[str, ShardKey] = {}

    def add_parts(self, keys: Iterable[ShardKey]) -> None:
        """Let the parts of these shards be there."""
        for key in keys:
            self.commit_part(key)
            self._keys[key.part_key] = key

    def commit_part(self, key: ShardKey) -> ObjectInfo:
        """A worker's PUT, which is none of the driver's requests."""
        return self._note(key.part_key, _PART_BYTES)

    def read(self, key: str) -> ObjectData:
        """Raises NotFound."""
        self.requests["GET"] += 1
        stat = self._stat(key)
        return ObjectData(self._bodies[key], stat.etag, stat.version)

    def read_head(self, key: str, size: int) -> bytes:
        """The first `size` bytes, or all. Raises NotFound."""
        return self.read(key).data[:size]

    def read_tail(self, key: str, size: int) -> bytes:
        """A footer as a part has it."""
        self.requests["GET"] += 1
        metadata = {PartFooter.KEY: make_footer(self._keys[key]).to_json()}
        sink = io.BytesIO()
        pq.write_table(pa.table({"position": pa.array([], pa.int64())}).replace_schema_metadata(metadata), sink)
        return sink.getvalue()[-size:]

    def open(self, key: str) -> BinaryIO:
        """Its bytes as a file."""
        return io.BytesIO(self.read(key).data)

    def stat(self, key: str) -> ObjectInfo:
        """Raises NotFound."""
        self.requests["HEAD"] += 1
        return self._stat(key)

    def list(self, prefix: str) -> Iterator[ObjectInfo]:
        """Page after page."""
        found = sorted(key for key in self._stats if key.startswith(prefix))
        self.requests["LIST"] += max(1, -(-len(found) // _PAGE))
        return (self._stats[key] for key in found)

    def put_if_absent(self, key: str, body: bytes | Path) -> ObjectInfo:
        """Raises AlreadyExists."""
        self.requests["PUT"] += 1
        if key in self._stats:
            raise AlreadyExists(key)
        assert isinstance(body, bytes)
        self.sent_bytes += len(body)
        self._bodies[key] = body
        if len(self._bodies) > _KEPT:
            self._bodies.popitem(last=False)
        return self._note(key, len(body))

    def replace_if_match(self, key: str, body: bytes | Path, version: str) -> ObjectInfo:
        """Nothing is replaced here."""
        raise AssertionError(f"{key} {version} {len(str(body))}")

    def delete(self, key: str) -> None:
        """Absent is fine."""
        self.requests["DELETE"] += 1
        self._stats.pop(key, None)

    def delete_if_match(self, key: str, version: str) -> None:  # noqa: ARG002 - nobody else writes here
        """Absent is fine."""
        self.delete(key)

    def _stat(self, key: str) -> ObjectInfo:
        if key not in self._stats:
            raise NotFound(key)
        return self._stats[key]

    def _note(self, key: str, size: int) -> ObjectInfo:
        tag = f"{next(self._numbers):032x}"
        self._stats[key] = ObjectInfo(key, size, tag, tag)
        return self._stats[key]
