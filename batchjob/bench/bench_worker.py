"""A worker as in a run, with a plan and an output of its own in a temporary folder."""

from __future__ import annotations

import queue
import time
from collections.abc import Iterator, Sequence
from contextlib import closing, contextmanager
from dataclasses import dataclass, replace
from itertools import count, islice
from pathlib import Path

import pyarrow as pa

from batchjob import __version__
from batchjob.bench.input_sample import DEFAULT_IMAGES, InputSample, repeat_rows
from batchjob.bench.machine_stats import read_cpu_seconds
from batchjob.driver.planner import choose_shard_size
from batchjob.errors import AttemptFailed, InvalidJob
from batchjob.job.job import Job
from batchjob.loader.shard_queue import ShardQueue
from batchjob.output.provenance import ShardResult
from batchjob.output.scratch import ScratchFolder
from batchjob.plan import chunks
from batchjob.plan.head import new_head, put_head
from batchjob.sources.listing import SMALL_INPUT_IMAGES, InputPreview, estimate_encoded_bytes
from batchjob.storage.store import open_store
from batchjob.types import Batch, ImageRef, Shard, ShardKey, StageTiming
from batchjob.worker.messages import ShardCommitted, ShardFailed, WorkerSetup
from batchjob.worker.plan_session import PlanSession
from batchjob.worker.setup import LoadedWorker, load
from batchjob.worker.worker import Worker

__all__ = ["BenchWorker", "RunRecord", "open_bench_worker"]

_SETUP_LOCATIONS = 256
_MIN_BATCHES = 4  # of a run whose number of images is not given
_SAMPLE_BYTES = 256 << 20  # of prepared pixels, held in memory
_SAMPLE_BATCHES = 8
_COMMIT_TIMEOUT_SECONDS = 600.0
_FIRST_CLONE_INDEX = 1_000_000  # above the indices of all shards of the plan


@dataclass(frozen=True)
class RunRecord:
    """Record of a run through the worker; times by `time.perf_counter`.

    Attributes:
        started: Start of the run.
        ended: Time when the last part was committed.
        cpu_seconds: CPU time of all processes; None if the system does not tell.
        timings: Timings of all stages.
        results: Results of all shards.
    """

    started: float
    ended: float
    cpu_seconds: float | None
    timings: tuple[StageTiming, ...]
    results: tuple[ShardResult, ...]

    @property
    def images(self) -> int:
        """Number of rows, error rows included."""
        return sum(result.footer.rows for result in self.results)

    @property
    def failed(self) -> int:
        """Number of error rows."""
        return sum(result.footer.failed for result in self.results)

    def timings_of(self, stage: str) -> list[StageTiming]:
        """Return the timings of a stage, in the order in which they ended."""
        return sorted((timing for timing in self.timings if timing.stage == stage), key=lambda timing: timing.ended)


@contextmanager
def open_bench_worker(
    job: Job, images: int | None, cores: int, sample: InputSample, started: float | None = None
) -> Iterator[BenchWorker]:
    """Start a worker for measurements; it and its folder are removed at the end.

    Args:
        job: Job to measure; its output is not touched.
        images: Images of a run; None takes as many as the batches need, 1,000 at least.
        cores: Cores that the worker may use.
        sample: First images of the job.
        started: Time at which loading began, imports included, by `time.perf_counter`; None for now.

    Raises:
        InvalidJob: If model, preprocessing or device do not fit, or there are fewer than two batches of images.
        Temporary: If the disk is full.
    """
    with closing(ScratchFolder()) as scratch:
        output = job.output.model_copy(update={"uri": str(scratch.path / "out")})
        job = job.model_copy(update={"output": output})
        started = time.perf_counter() if started is None else started
        with closing(load(job, _build_setup(job, images or DEFAULT_IMAGES, sample), cores)) as resources:
            loaded = _limit_batch_size(resources, images, sample.rows)
            batch_size = loaded.info.batch_size
            images = images or max(DEFAULT_IMAGES, _MIN_BATCHES * batch_size)
            _require_two_batches(job, batch_size, images, sample.rows)
            keys = _write_plan(job, loaded.info.row_bytes, images, sample)
            session = PlanSession.join(loaded, 0)
            shards = tuple(session.read_shard(key) for key in keys)
            load_seconds = time.perf_counter() - started
            with closing(BenchWorker(loaded, session, shards, cores, scratch.path, load_seconds)) as worker:
                yield worker


class BenchWorker:
    """Worker whose components are measured, alone and together in a run.

    Args:
        loaded: The loaded model and loader.
        session: The plan.
        shards: Shards of a run, in plan order.
        cores: Cores that the worker may use.
        folder: Folder for all files that a measurement writes; the output is its subfolder `out`.
        load_seconds: Time until the worker was ready to run shards, in seconds.

    Attributes:
        job: The measured job, with its output in `folder`.
        info: Properties of the loaded worker.
        reader: Reader of the images.
        engine: The model with its preprocessing and postprocessing.
        loader: Loader of the batches.
        predictor: Predictor in the execution config of the run.
        part_builder: Builder of the parts.
        cpu_parallelism: Batches computed at once, and threads for each.
        timings: Timings of the current run.
    """

    def __init__(
        self,
        loaded: LoadedWorker,
        session: PlanSession,
        shards: tuple[Shard, ...],
        cores: int,
        folder: Path,
        load_seconds: float,
    ) -> None:
        self.shards, self.cores, self.folder, self.load_seconds = shards, cores, folder, load_seconds
        self.timings: list[StageTiming] = []
        self._events: queue.Queue[ShardCommitted | ShardFailed] = queue.Queue()
        self._clone_indices = count(_FIRST_CLONE_INDEX)
        self._worker = Worker(loaded, session, on_event=self._events.put, timing_sink=self.timings.append)
        self.job, self.info, self.reader, self.engine = loaded.job, loaded.info, loaded.reader, loaded.engine
        self.loader, self.predictor = loaded.loader_setup.loader, session.predictor
        self.part_builder = self._worker.part_builder
        self.cpu_parallelism = loaded.cpu_parallelism

    @property
    def batch_size(self) -> int:
        """Images per call of the model."""
        return self.info.batch_size

    @property
    def images(self) -> int:
        """Images of a run."""
        return sum(shard.key.rows for shard in self.shards)

    @property
    def sample_shard(self) -> Shard:
        """Short shard: the first batches of the first shard, as many as may be held in memory."""
        first = self.shards[0]
        batch_bytes = self.engine.example_image.nbytes * self.batch_size
        batches = min(max(1, _SAMPLE_BYTES // max(1, batch_bytes)), _SAMPLE_BATCHES)
        rows = min(first.key.rows, batches * self.batch_size)
        return self.clone_shard(replace(first, refs=first.refs[:rows], passthrough=first.passthrough.slice(0, rows)))

    def clone_shard(self, shard: Shard, refs: Sequence[ImageRef] | None = None) -> Shard:
        """Copy a shard under an index that no part has yet.

        Args:
            shard: Shard to copy.
            refs: Images of the copy, if they differ from those of the shard.
        """
        refs = tuple(refs or shard.refs)
        return replace(shard, key=replace(shard.key, index=next(self._clone_indices), rows=len(refs)), refs=refs)

    def run(self, shards: Sequence[Shard]) -> RunRecord:
        """Run shards through the worker into parts.

        Raises:
            BatchjobError: The error of a failed attempt.
        """
        del self.timings[:]
        cpu_before, started = read_cpu_seconds(), time.perf_counter()
        self._worker.run(ShardQueue.of(shards))
        results = tuple(self.next_result() for _ in shards)
        ended, cpu_after = time.perf_counter(), read_cpu_seconds()
        cpu_seconds = None if cpu_before is None or cpu_after is None else cpu_after - cpu_before
        return RunRecord(started, ended, cpu_seconds, tuple(self.timings), results)

    def next_result(self) -> ShardResult:
        """Wait for the result of the next shard.

        Raises:
            BatchjobError: The error of its attempt, if that failed.
        """
        try:
            event = self._events.get(timeout=_COMMIT_TIMEOUT_SECONDS)
        except queue.Empty:
            raise AttemptFailed(f"no part was committed within {_COMMIT_TIMEOUT_SECONDS:.0f} s") from None
        if isinstance(event, ShardFailed):
            raise event.error
        return event.result

    def load_batches(self, shard: Shard) -> list[Batch]:
        """Load the batches of a shard with the loader."""
        return [_move_out_of_shared_memory(batch) for batch in self.loader.batches(ShardQueue.of([shard]))]

    def part_bytes(self, result: ShardResult) -> int:
        """Return the size of a committed part."""
        return (self.folder / "out" / result.key.part_key).stat().st_size

    def close(self) -> None:
        """Stop the worker and its processes."""
        self._worker.close()


def _build_setup(job: Job, images: int, sample: InputSample) -> WorkerSetup:
    rows, table = max(images, sample.rows), pa.Table.from_batches(sample.batches)
    locations = tuple(table.column("location").slice(0, _SETUP_LOCATIONS).to_pylist())
    input_bytes = estimate_encoded_bytes(table.column("size")) * rows // sample.rows
    small_input_bytes = input_bytes if rows <= SMALL_INPUT_IMAGES else None
    return WorkerSetup(job.serialize(), str(job.folder), None, locations, small_input_bytes)


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


def _write_plan(job: Job, row_bytes: int, images: int, sample: InputSample) -> list[ShardKey]:
    """Write a plan as a run of so many images would; return the keys of its shards."""
    store, rows = open_store(job.output.uri, job.storage), max(images, sample.rows)
    listed_row_bytes = sum(batch.nbytes for batch in sample.batches) // sample.rows
    preview = InputPreview(rows, rows < chunks.CHUNK_ROWS, (), listed_row_bytes)
    # Shards of equal size. Example: 1000 images in shards of at most 300 are 4 shards of 250.
    shard_count = -(-images // choose_shard_size(job, preview, 1, row_bytes))
    shard_size = -(-images // shard_count)
    head = put_head(
        store,
        new_head(
            0,
            job=job.serialize(),
            fingerprint=job.fingerprint(),
            shard_size=shard_size,
            source_version=None,
            batchjob=__version__,
            defaults=job.resolved_settings(),
        ),
    )
    planned_rows = max(rows, shard_count * shard_size)
    plan = chunks.extend_plan(store, head, lambda _: repeat_rows(sample.batches, planned_rows), lambda: None)
    return list(islice((key for chunk in plan for key in chunk.shards), shard_count))


def _move_out_of_shared_memory(batch: Batch) -> Batch:
    """Copy the pixels to memory of this process: the shared memory of loader processes is scarce."""
    if batch.pixels is None or batch.pixels.is_pinned():
        return batch
    return replace(batch, pixels=batch.pixels.clone())
