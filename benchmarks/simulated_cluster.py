"""Simulated surroundings of a driver with a billion images: the source's listing, the workers and the store."""

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
_WORKER_INFO = WorkerInfo(
    "cpu", "fp32", "simulated@000000000000", ("label_id", "score"), batch_size=128, seconds=0.0, ahead=512
)
_KEYS_PER_LISTING = 1_000
_PART_BYTES = 400_000
_MAX_BODIES = 4  # kept by the store: a chunk is read once after its PUT


def generate_refs(after: Cursor, images: int) -> Iterator[pa.RecordBatch]:
    """Generate the listing of a source after a cursor: keys like those of a bucket, sizes, random ETags."""
    rng = np.random.default_rng(0)
    for start in range(after.rows, images, BATCH_ROWS):
        rows = min(BATCH_ROWS, images - start)
        names = pc.utf8_lpad(pa.array(np.arange(start, start + rows)).cast(pa.string()), 12, "0")
        uris = pc.binary_join_element_wise("s3://a-bucket/some/images/", names, ".jpg", "")
        offsets = pa.array(np.arange(rows + 1, dtype=np.int32) * 32)
        etags = pa.StringArray.from_buffers(
            rows, offsets.buffers()[1], pa.py_buffer(rng.bytes(rows * 16).hex().encode())
        )
        sizes = pa.array(rng.integers(20_000, 200_000, rows))
        yield pa.RecordBatch.from_arrays([uris, uris, sizes, etags], schema=pa.schema(REF_FIELDS))


def generate_chunks(images: int) -> Iterator[Chunk]:
    """Generate the chunks of an existing plan, without their rows."""
    shards_per_chunk = CHUNK_ROWS // SHARD_ROWS
    shards = images // SHARD_ROWS
    for number, first in enumerate(range(0, shards, shards_per_chunk)):
        keys = tuple(
            ShardKey(index, f"{index:016x}", SHARD_ROWS, number, (index - first) * SHARD_ROWS)
            for index in range(first, min(first + shards_per_chunk, shards))
        )
        rows = (keys[-1].index + 1) * SHARD_ROWS
        yield Chunk(number, first * SHARD_ROWS, Cursor(rows), rows == images, keys)


def make_footer(key: ShardKey) -> PartFooter:
    """Make the footer of a shard's part."""
    seconds = {"wall": 40.0, "read": 10.0, "decode": 20.0, "transform": 5.0, "predict": 30.0, "write": 1.0}
    versions = {"batchjob": "0.1", "torch": "2.15", "torchvision": "0.30", "pyarrow": "26.0"}
    attempt = f"{key.index:016x}"
    return PartFooter(HEAD.plan, key.id, key.index, attempt, 0, "f" * 64, "m" * 64, key.rows, 0, {}, seconds, versions)


class SimulatedPool:
    """Pool of workers that commit their shards at the next `wait`, assigned by the real `Placement`. See `Pool`."""

    def __init__(self, workers: int, store: CountingStore) -> None:
        self.size, self._store = workers, store
        self._placement = Placement(workers)
        self._events: list[WorkerEvent] = []

    def start(self, setup: WorkerSetup) -> None:  # noqa: ARG002 - required by Pool
        for number in range(self.size):
            self._placement.add_worker(str(number), _WORKER_INFO.ahead)
            self._events.append(WorkerReady(str(number), _WORKER_INFO))

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
        for assignment in self._placement.take_assignments():
            info = self._store.commit_part(assignment.key)
            result = ShardResult(assignment.key, make_footer(assignment.key), {}, True, info.etag)
            events.append(ShardCommitted(pickle.loads(pickle.dumps(result))))
            self._placement.finish(assignment.worker, assignment.key)
        return events

    def close(self) -> None: ...


class CountingStore:
    """Store that holds names but no parts, and counts requests; it keeps the bodies that were put last."""

    uri = "simulated://out"

    def __init__(self) -> None:
        self.requests: Counter[str] = Counter()
        self.sent_bytes = 0
        self._numbers = count()
        self._infos: dict[str, ObjectInfo] = {}
        self._bodies: OrderedDict[str, bytes] = OrderedDict()
        self._keys: dict[str, ShardKey] = {}

    def add_parts(self, keys: Iterable[ShardKey]) -> None:
        """Add the parts of these shards, uncounted."""
        for key in keys:
            self.commit_part(key)
            self._keys[key.part_key] = key

    def commit_part(self, key: ShardKey) -> ObjectInfo:
        """Add a part for a worker's PUT, which does not count as a request of the driver."""
        return self._add(key.part_key, _PART_BYTES)

    def read(self, key: str) -> ObjectData:
        """Read an object that was put lately. Raises NotFound."""
        self.requests["GET"] += 1
        info = self._find(key)
        return ObjectData(self._bodies[key], info.etag, info.version)

    def read_head(self, key: str, size: int) -> bytes:
        """Read the first `size` bytes, or all. Raises NotFound."""
        return self.read(key).data[:size]

    def read_tail(self, key: str, size: int) -> bytes:
        """Return the end of a part with its footer."""
        self.requests["GET"] += 1
        metadata = {PartFooter.KEY: make_footer(self._keys[key]).to_json()}
        sink = io.BytesIO()
        pq.write_table(pa.table({"position": pa.array([], pa.int64())}).replace_schema_metadata(metadata), sink)
        return sink.getvalue()[-size:]

    def open(self, key: str) -> BinaryIO:
        """Open an object as a file. Raises NotFound."""
        return io.BytesIO(self.read(key).data)

    def stat(self, key: str) -> ObjectInfo:
        """Return an object's info. Raises NotFound."""
        self.requests["HEAD"] += 1
        return self._find(key)

    def list(self, prefix: str) -> Iterator[ObjectInfo]:
        """List objects, in as many requests as a real store needs."""
        keys = sorted(key for key in self._infos if key.startswith(prefix))
        self.requests["LIST"] += max(1, -(-len(keys) // _KEYS_PER_LISTING))
        return (self._infos[key] for key in keys)

    def put_if_absent(self, key: str, body: bytes | Path) -> ObjectInfo:
        """Put an object. Raises AlreadyExists."""
        self.requests["PUT"] += 1
        if key in self._infos:
            raise AlreadyExists(key)
        assert isinstance(body, bytes)
        self.sent_bytes += len(body)
        self._bodies[key] = body
        if len(self._bodies) > _MAX_BODIES:
            self._bodies.popitem(last=False)
        return self._add(key, len(body))

    def replace_if_match(self, key: str, body: bytes | Path, version: str) -> ObjectInfo:
        """Refuse: a run that is not a retry replaces nothing."""
        raise AssertionError(f"{key} {version} {len(str(body))}")

    def delete(self, key: str) -> None:
        """Delete an object; an absent one is fine."""
        self.requests["DELETE"] += 1
        self._infos.pop(key, None)

    def delete_if_match(self, key: str, version: str) -> None:  # noqa: ARG002 - there is no other writer
        """Delete an object; an absent one is fine."""
        self.delete(key)

    def _find(self, key: str) -> ObjectInfo:
        if key not in self._infos:
            raise NotFound(key)
        return self._infos[key]

    def _add(self, key: str, size: int) -> ObjectInfo:
        etag = f"{next(self._numbers):032x}"
        self._infos[key] = ObjectInfo(key, size, etag, etag)
        return self._infos[key]
