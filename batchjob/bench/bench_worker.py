"""A worker as in a run, with a plan and an output of its own in a temporary folder."""

from __future__ import annotations

import queue
import time
from collections.abc import Iterator, Sequence
from contextlib import closing, contextmanager
from dataclasses import replace
from itertools import count, islice
from pathlib import Path

import pyarrow as pa
import torch

from batchjob import __version__, system
from batchjob.bench.machine_stats import read_cpu_seconds
from batchjob.bench.results import RunMetrics, StageMeasurement
from batchjob.bench.run_metrics import compute_run_metrics
from batchjob.driver.planner import choose_shard_size
from batchjob.errors import InvalidJob
from batchjob.job.job import Job
from batchjob.loader.shard_queue import ShardQueue
from batchjob.output.provenance import ShardResult
from batchjob.output.scratch import ScratchFolder
from batchjob.plan import chunks
from batchjob.plan.head import new_head, put_head
from batchjob.sources.listing import SMALL_INPUT_IMAGES, InputPreview, SourceListing, estimate_encoded_bytes
from batchjob.storage.reader import Reader
from batchjob.storage.store import open_store
from batchjob.text import format_count
from batchjob.types import Batch, Cursor, Shard, ShardKey, StageTiming
from batchjob.worker.messages import ShardCommitted, ShardFailed, WorkerSetup
from batchjob.worker.plan_session import PlanSession
from batchjob.worker.setup import LoadedWorker, load
from batchjob.worker.worker import Worker

__all__ = ["BenchWorker", "PixelBatch", "count_images", "open_bench_worker"]

_DEFAULT_IMAGES = 1000
_SETUP_LOCATIONS = 256
_MIN_BATCHES = 4  # of a run whose number of images is not given
_SAMPLE_BYTES = 256 << 20  # of prepared pixels, held in memory
_SAMPLE_BATCHES = 8
_FIRST_SAMPLE_INDEX = 1_000_000  # above the indices of all shards of the plan

PixelBatch = tuple[torch.Tensor, tuple[tuple[int, ...], ...] | None]
"""Pixels and shapes of the good images of a batch, as in `Batch`: the arguments of the predictor."""


def count_images(batch: PixelBatch) -> int:
    """Return the number of images of a batch."""
    return len(batch[0] if batch[1] is None else batch[1])


@contextmanager
def open_bench_worker(job: Job, images: int | None) -> Iterator[BenchWorker]:
    """List the first images and start a worker for measurements; it and its folder are removed at the end.

    Args:
        job: Job to measure; its output is not touched.
        images: Images of a run; None takes as many as the batches need, 1,000 at least.

    Raises:
        InvalidJob: If model, preprocessing or device do not fit, or there are fewer than two batches of images.
        Temporary: If the disk is full.
    """
    listed, listing = _list_images(job, images or _DEFAULT_IMAGES)
    cpus = job.runtime.cpus_per_worker
    cores = system.available_cores() if cpus == "auto" else max(1, int(cpus))
    with closing(ScratchFolder()) as scratch:
        output = job.output.model_copy(update={"uri": str(scratch.path / "out")})
        job = job.model_copy(update={"output": output})
        started, rows = time.perf_counter(), max(images or _DEFAULT_IMAGES, listed.num_rows)
        sample = tuple(listed.column("location").slice(0, _SETUP_LOCATIONS).to_pylist())
        input_bytes = estimate_encoded_bytes(listed.column("size")) * rows // listed.num_rows
        small_input_bytes = input_bytes if rows <= SMALL_INPUT_IMAGES else None
        setup = WorkerSetup(job.serialize(), str(job.folder), None, sample, small_input_bytes)
        with closing(load(job, setup, cores)) as resources:
            loaded = _limit_batch_size(resources, images, listed.num_rows)
            images = images or max(_DEFAULT_IMAGES, _MIN_BATCHES * loaded.info.batch_size)
            _require_two_batches(job, loaded.info.batch_size, images, listed.num_rows)
            keys = _write_plan(job, images, listed)
            session = PlanSession.join(loaded, 0)
            with closing(BenchWorker(loaded, session, keys, cores, scratch.path)) as worker:
                worker.listing, worker.listed = listing, listed.num_rows
                worker.load_seconds = time.perf_counter() - started
                yield worker


class BenchWorker:
    """Worker whose components are measured, alone and together in a run.

    Args:
        loaded: The loaded model and loader, of which most attributes come.
        session: The plan.
        keys: Shards of a run, in plan order.
        cores: Cores that the worker may use.
        folder: Folder for all files that a measurement writes; the output is its subfolder `out`.

    Attributes:
        predictor: Predictor in the execution config of the run.
        batch_size: Images per call of the model.
        parallel_batches: Batches computed at once.
        timings: Timings of the current run.
        listing: Throughput of the listing.
        listed: Number of images that were listed.
        load_seconds: Time until the worker was ready to run shards, in seconds.
    """

    listing: StageMeasurement
    listed: int
    load_seconds: float

    def __init__(
        self, loaded: LoadedWorker, session: PlanSession, keys: Sequence[ShardKey], cores: int, folder: Path
    ) -> None:
        self.shards, self.cores, self.folder = tuple(map(session.read_shard, keys)), cores, folder
        self.timings: list[StageTiming] = []
        self._events: queue.Queue[ShardCommitted | ShardFailed] = queue.Queue()
        self._cpu_before = 0.0
        self._sample_indices = count(_FIRST_SAMPLE_INDEX)
        self._worker = Worker(loaded, session, on_event=self._events.put, timing_sink=self._record_timing)
        self.job, self.info, self.reader, self.engine = loaded.job, loaded.info, loaded.reader, loaded.engine
        self.loader, self.predictor = loaded.loader_setup.loader, session.predictor
        self.part_builder, self.batch_size = self._worker.part_builder, loaded.info.batch_size
        self.parallel_batches = loaded.cpu_parallelism.parallel_batches

    @property
    def sample_shard(self) -> Shard:
        """Short shard: the first batches of the first shard, as many as may be held in memory; never the same twice."""
        first = self.shards[0]
        fitting_rows = max(self.batch_size, _SAMPLE_BYTES // max(1, self.engine.example_image.nbytes))
        rows = min(first.key.rows, fitting_rows, _SAMPLE_BATCHES * self.batch_size)
        key = replace(first.key, index=next(self._sample_indices), rows=rows)
        return replace(first, key=key, refs=first.refs[:rows], passthrough=first.passthrough.slice(0, rows))

    def run(self, shards: Sequence[Shard]) -> RunMetrics:
        """Run shards through the worker. Raises the error of a failed attempt, or InvalidJob if no image is good."""
        del self.timings[:]
        self._worker.run(ShardQueue.of(shards))
        footers = [self.next_result().footer for _ in shards]
        cpu_seconds, failed = read_cpu_seconds() - self._cpu_before, sum(footer.failed for footer in footers)
        if failed == sum(footer.rows for footer in footers):
            raise InvalidJob(
                f"{self.job.input.uri}: {format_count(failed, 'image')} tried, each an error row: nothing can be "
                "measured; `batchjob run` and `batchjob errors` say why"
            )
        return compute_run_metrics(
            self.timings, failed, cpu_seconds, self.load_seconds, self.info.ahead, self.parallel_batches
        )

    def _record_timing(self, timing: StageTiming) -> None:
        if timing.stage == "forward" and all(before.stage != "forward" for before in self.timings):
            self._cpu_before = read_cpu_seconds()  # without the start of the loader processes
        self.timings.append(timing)

    def next_result(self) -> ShardResult:
        """Wait for the result of the next shard. Raises the error of its attempt, if that failed."""
        event = self._events.get()
        if isinstance(event, ShardFailed):
            raise event.error
        return event.result

    def load_sample(self) -> list[Batch]:
        """Load the batches of the sample, out of the shared memory of the loader processes, which is scarce."""
        return [
            batch if batch.pixels is None or batch.pixels.is_pinned() else replace(batch, pixels=batch.pixels.clone())
            for batch in self.loader.batches(ShardQueue.of([self.sample_shard]))
        ]

    def select_pixels(self, batches: Sequence[Batch]) -> list[PixelBatch]:
        """Return the batches in which all images are good; if there is none, those with at least one good image."""
        usable = [(batch.pixels, batch.shapes) for batch in batches if batch.pixels is not None]
        if not usable:
            rows = sum(len(batch.image_infos) for batch in batches)
            raise InvalidJob(f"none of the first {rows} images can be decoded: nothing can be measured")
        return [batch for batch in usable if count_images(batch) == self.batch_size] or usable

    def close(self) -> None:
        """Stop the worker and its processes."""
        self._worker.close()


def _list_images(job: Job, images: int) -> tuple[pa.Table, StageMeasurement]:
    """List the first images of a job: as many as a run needs, and as the first chunk of its plan would have."""
    listing, wanted = SourceListing(job.input, Reader(job.storage), job.output.uri), max(images, chunks.CHUNK_ROWS)
    batches, rows = list[pa.RecordBatch](), 0
    started, cpu_started = time.perf_counter(), time.process_time()
    for batch in listing.refs(Cursor()):
        batches.append(batch)
        rows += batch.num_rows
        if rows >= wanted:
            break
    seconds, cpu_seconds = time.perf_counter() - started, time.process_time() - cpu_started
    if not rows:
        raise InvalidJob(f"{job.input.uri}: no images there, so there is nothing to measure; look at input")
    stage = StageMeasurement("list", rows / seconds, cpu_seconds / rows * 1e3, note="in the driver, once")
    return pa.Table.from_batches(batches), stage


def _limit_batch_size(loaded: LoadedWorker, images: int | None, listed: int) -> LoadedWorker:
    """Make a batch size that the worker chose itself so small that two batches can be measured.

    Example: a GPU has room for batches of 1,024. With `--images 600`, or 600 images in the job, batches have 300.
    """
    limit = max(1, min(images or listed, listed) // 2)
    if not loaded.loader_setup.chooses_batch_size or loaded.info.batch_size <= limit:
        return loaded
    loaded.loader_setup.set_batch_size(limit)
    return replace(loaded, info=replace(loaded.info, batch_size=limit))


def _require_two_batches(job: Job, batch_size: int, images: int, listed: int) -> None:
    for number, text in ((images, f"--images {images:,}"), (listed, f"{job.input.uri} lists {listed:,}")):
        if number < 2 * batch_size:
            raise InvalidJob(
                f"{text}: fewer than two batches of {batch_size:,}, on which nothing can be measured; take more "
                "images, or a smaller runtime.batch_size"
            )


def _write_plan(job: Job, images: int, listed: pa.Table) -> list[ShardKey]:
    """Write a plan as a run of so many images would, with the listed ones over and over; return its shards' keys."""
    store, rows = open_store(job.output.uri, job.storage), max(images, listed.num_rows)
    preview = InputPreview(rows, rows < chunks.CHUNK_ROWS, (), listed.nbytes // listed.num_rows)
    # Shards of equal size. Example: 1000 images in shards of at most 300 are 4 shards of 250.
    shard_count = -(-images // choose_shard_size(job, preview, 1))
    shard_size = -(-images // shard_count)
    head = new_head(
        0,
        job=job.serialize(),
        fingerprint=job.fingerprint(),
        defaults=job.resolved_settings(),
        shard_size=shard_size,
        source_version=None,
        batchjob=__version__,
    )
    rows = max(rows, shard_count * shard_size)
    batches = pa.concat_tables([listed] * -(-rows // listed.num_rows)).slice(0, rows).to_batches()
    plan = chunks.extend_plan(store, put_head(store, head), lambda _: iter(batches), lambda: None)
    return list(islice((key for chunk in plan for key in chunk.shards), shard_count))
