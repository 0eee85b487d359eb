"""A worker as a run has it, with a plan and an output of its own in a folder that goes away again."""

from __future__ import annotations

import queue
import time
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, closing, contextmanager
from dataclasses import dataclass, replace
from itertools import count, cycle, islice
from pathlib import Path

import pyarrow as pa

import batchjob
from batchjob.bench.machine_stats import read_cpu_seconds
from batchjob.bench.results import StageMeasurement
from batchjob.driver.planner import choose_shard_size
from batchjob.errors import AttemptFailed, InvalidJob
from batchjob.inference.cpu_parallelism import CpuParallelism
from batchjob.inference.engine import Engine
from batchjob.inference.gpu_decode import GpuDecodingLoader
from batchjob.inference.predictor import Predictor
from batchjob.job.job import Job
from batchjob.loader.loader import Loader
from batchjob.loader.shard_queue import ShardQueue
from batchjob.output.part_builder import PartBuilder
from batchjob.output.provenance import ShardResult
from batchjob.output.scratch import ScratchFolder
from batchjob.plan import chunks
from batchjob.plan.head import new_head, put_head
from batchjob.sources.listing import SMALL_INPUT_IMAGES, InputPreview, SourceListing, estimate_encoded_bytes
from batchjob.storage.reader import Reader
from batchjob.storage.store import open_store
from batchjob.types import Batch, Cursor, ImageRef, Shard, ShardKey, StageTiming
from batchjob.worker.messages import ShardCommitted, ShardFailed, WorkerEvent, WorkerInfo, WorkerSetup
from batchjob.worker.plan_session import PlanSession
from batchjob.worker.setup import load
from batchjob.worker.worker import Worker

__all__ = ["BenchWorker", "InputSample", "RunRecord", "open_bench_worker", "sample_input"]

_SAMPLE = 256
_SAMPLE_BYTES = 256 << 20  # of prepared pixels that are held
_SAMPLE_BATCHES = 8
_PATIENCE_SECONDS = 600.0  # for the last commits of a run


@dataclass(frozen=True)
class InputSample:
    """The first images of a job: as many as decide how a run would be tuned.

    Attributes:
        batches: as the source gave them.
        rows: in them.
        stage: how listing went.
    """

    batches: tuple[pa.RecordBatch, ...]
    rows: int
    stage: StageMeasurement


@dataclass(frozen=True)
class RunRecord:
    """A run through the worker, by `time.perf_counter`."""

    began: float
    ended: float
    cpu_s: float | None
    timings: tuple[StageTiming, ...]
    results: tuple[ShardResult, ...]

    @property
    def images(self) -> int:
        return sum(result.footer.rows for result in self.results)

    @property
    def failed(self) -> int:
        """Error rows among them."""
        return sum(result.footer.failed for result in self.results)

    def timings_of(self, stage: str) -> list[StageTiming]:
        """Its stretches, in the order they ended."""
        return sorted((span for span in self.timings if span.stage == stage), key=lambda span: span.ended)


def sample_input(job: Job, images: int) -> InputSample:
    """The job's list, as far as a bench and the decision on a recipe need it.

    Raises:
        InvalidJob: there are no images.
    """
    source = SourceListing(job.input, Reader(job.storage), job.output.uri)
    most = max(images, chunks.CHUNK_ROWS)
    found: list[pa.RecordBatch] = []
    rows, began, cpu = 0, time.perf_counter(), time.process_time()
    for batch in source.refs(Cursor()):
        found.append(batch)
        rows += batch.num_rows
        if rows >= most:
            break
    seconds, spent = time.perf_counter() - began, time.process_time() - cpu
    if not rows:
        raise InvalidJob(f"{job.input.uri}: no images there, so there is nothing to measure; look at input")
    note = "in the driver, once"
    return InputSample(tuple(found), rows, StageMeasurement("list", rows / seconds, spent / rows * 1e3, note=note))


@dataclass(frozen=True)
class WorkerComponents:
    """Components of a worker, each of which is measured alone."""

    reader: Reader
    engine: Engine
    loader: Loader
    predictor: Predictor
    part_builder: PartBuilder
    cpu_parallelism: CpuParallelism
    gpu_decoding: GpuDecodingLoader | None


class BenchWorker:
    """What a bench measures with.

    Attributes:
        job: whose output is the folder.
        parts: of the worker.
        loaded: what the worker said of itself.
        load_s: seconds until it stood.
        began: when it was begun, by `time.perf_counter`.
        shards: of one run, in the plan's order.
        sample: a short shard: the first batches.
        folder: for whatever must lie on a disk meanwhile.
    """

    def __init__(self, job: Job, images: int, cores: int, listed: InputSample, folder: Path) -> None:
        self.job, self.cores, self.folder = job, cores, folder
        self.timings: list[StageTiming] = []
        self._events: queue.Queue[WorkerEvent] = queue.Queue()
        self._indices = count(1_000_000)  # of shards that are no longer the plan's own
        rows = max(images, listed.rows)
        table = pa.Table.from_batches(listed.batches)
        locations = tuple(table.column("location").slice(0, _SAMPLE).to_pylist())
        size = estimate_encoded_bytes(table.column("size")) * rows // listed.rows
        setup = WorkerSetup(
            job.serialize(), str(job.folder), None, locations, size if rows <= SMALL_INPUT_IMAGES else None
        )
        self.began = time.perf_counter()
        self._resources = ExitStack()
        try:
            self._loaded = self._resources.enter_context(closing(load(job, setup, cores)))
            self.loaded: WorkerInfo = self._loaded.info
            self._check_enough(images, listed.rows)
            self.shards = self._planned(images, rows, listed)
        except BaseException:
            self.close()
            raise
        self.load_s = time.perf_counter() - self.began

    @property
    def parts(self) -> WorkerComponents:
        loaded = self._loaded
        return WorkerComponents(
            loaded.reader,
            loaded.engine,
            loaded.loader_setup.loader,
            self._worker.session.predictor,
            self._worker.part_builder,
            loaded.cpu_parallelism,
            loaded.loader_setup.gpu_decoding,
        )

    @property
    def batch_size(self) -> int:
        """Images in a call of the model."""
        return self.loaded.batch_size

    @property
    def images(self) -> int:
        """In a run."""
        return sum(shard.key.rows for shard in self.shards)

    @property
    def sample_shard(self) -> Shard:
        """The first batches of the first shard, as many as may be held in memory."""
        first = self.shards[0]
        held = max(1, _SAMPLE_BYTES // max(1, self.parts.engine.example_image.nbytes * self.batch_size))
        rows = min(first.key.rows, min(held, _SAMPLE_BATCHES) * self.batch_size)
        return self.clone_shard(replace(first, refs=first.refs[:rows], passthrough=first.passthrough.slice(0, rows)))

    def clone_shard(self, shard: Shard, refs: Sequence[ImageRef] | None = None) -> Shard:
        """A shard under a number that no part has yet, maybe of images that lie elsewhere."""
        members = tuple(refs or shard.refs)
        return replace(shard, key=replace(shard.key, index=next(self._indices), rows=len(members)), refs=members)

    def run(self, shards: Sequence[Shard]) -> RunRecord:
        """Shards through the worker into parts.

        Raises:
            BatchjobError: what an attempt at one of them failed by.
        """
        del self.timings[:]
        cpu, began = read_cpu_seconds(), time.perf_counter()
        self._worker.run(ShardQueue.of(shards))
        results = tuple(self.next_result() for _ in shards)
        ended, spent = time.perf_counter(), read_cpu_seconds()
        used = None if cpu is None or spent is None else spent - cpu
        return RunRecord(began, ended, used, tuple(self.timings), results)

    def next_result(self) -> ShardResult:
        """What the next shard came to. Raises what its attempt failed by."""
        while True:
            try:
                event = self._events.get(timeout=_PATIENCE_SECONDS)
            except queue.Empty:
                raise AttemptFailed(f"no part was committed within {_PATIENCE_SECONDS:.0f} s") from None
            if isinstance(event, ShardFailed):
                raise event.error
            if isinstance(event, ShardCommitted):
                return event.result

    def load_batches(self, shard: Shard) -> list[Batch]:
        """A shard as the loader gives it, all decoded there, held in memory of this process."""
        queue = ShardQueue.of([replace(shard, decode_on_cpu=True)])
        return [_kept(batch) for batch in self.parts.loader.batches(queue)]

    def part_bytes(self, result: ShardResult) -> int:
        """Of a committed part."""
        return (self.folder / "out" / result.key.part_key).stat().st_size

    def close(self) -> None:
        """End the worker and its processes."""
        self._resources.close()

    def _check_enough(self, images: int, listed: int) -> None:
        size = self.loaded.batch_size
        for number, what in ((images, f"--images {images:,}"), (listed, f"{self.job.input.uri} lists {listed:,}")):
            if number < 2 * size:
                raise InvalidJob(
                    f"{what}: fewer than two batches of {size:,}, on which nothing can be measured; take more images, "
                    "or a smaller runtime.batch_size"
                )

    def _planned(self, images: int, rows: int, listed: InputSample) -> tuple[Shard, ...]:
        """Freeze a plan as a run of that many images would, and join it."""
        job, store = self.job, open_store(self.job.output.uri, self.job.storage)
        seen = InputPreview(
            rows, rows < chunks.CHUNK_ROWS, (), sum(batch.nbytes for batch in listed.batches) // listed.rows
        )
        most = choose_shard_size(job, seen, 1, self.loaded.row_bytes)
        number = -(-images // most)
        size = -(-images // number)
        head = put_head(
            store,
            new_head(
                0,
                job=job.serialize(),
                fingerprint=job.fingerprint(),
                shard_size=size,
                source_version=None,
                batchjob=batchjob.__version__,
                defaults=job.resolved_settings(),
            ),
        )
        found = chunks.extend_plan(
            store, head, lambda _: _repeated(listed.batches, max(rows, number * size)), lambda: None
        )
        keys = islice((key for chunk in found for key in chunk.shards), number)
        return self._begun(list(keys))

    def _begun(self, keys: Sequence[ShardKey]) -> tuple[Shard, ...]:
        session = PlanSession.join(self._loaded, 0)
        worker = Worker(self._loaded, session, on_event=self._events.put, timing_sink=self.timings.append)
        self._worker = self._resources.enter_context(closing(worker))
        return tuple(session.read_shard(key) for key in keys)


@contextmanager
def open_bench_worker(job: Job, images: int, cores: int, listed: InputSample) -> Iterator[BenchWorker]:
    """A rig, and nothing left of it afterwards.

    Args:
        job: what to measure; its output is not touched.
        images: that a run has.
        cores: that the worker may use.
        listed: from `look`.

    Raises:
        InvalidJob: model, preprocessing or device do not fit, or there are fewer than two batches.
        Temporary: the disk is full.
    """
    spool = ScratchFolder()
    try:
        output = job.output.model_copy(update={"uri": str(spool.path / "out")})
        rig = BenchWorker(job.model_copy(update={"output": output}), images, cores, listed, spool.path)
        try:
            yield rig
        finally:
            rig.close()
    finally:
        spool.close()


def _repeated(batches: Sequence[pa.RecordBatch], rows: int) -> Iterator[pa.RecordBatch]:
    """That many rows at least where there are so many, and else the same again from the first."""
    left = rows
    for batch in cycle([batch for batch in batches if batch.num_rows]):
        yield batch.slice(0, left)
        left -= batch.num_rows
        if left <= 0:
            return


def _kept(batch: Batch) -> Batch:
    """The same in memory of its own: what loader processes share is scarce."""
    if batch.pixels is None or batch.pixels.is_pinned():
        return batch
    return replace(batch, pixels=batch.pixels.clone())
