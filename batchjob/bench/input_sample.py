"""The first images of a job, listed once for the whole bench."""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import cycle

import pyarrow as pa

from batchjob.bench.results import StageMeasurement
from batchjob.errors import InvalidJob
from batchjob.job.job import Job
from batchjob.plan import chunks
from batchjob.sources.listing import SourceListing
from batchjob.storage.reader import Reader
from batchjob.types import Cursor

__all__ = ["DEFAULT_IMAGES", "InputSample", "repeat_rows", "sample_input"]

DEFAULT_IMAGES = 1000


@dataclass(frozen=True)
class InputSample:
    """The first images of a job: as many as the bench runs, and as decide the tuning of a run.

    Attributes:
        batches: Record batches of the source.
        rows: Number of images in them.
        stage: Throughput of the listing.
    """

    batches: tuple[pa.RecordBatch, ...]
    rows: int
    stage: StageMeasurement


def sample_input(job: Job, images: int) -> InputSample:
    """List the first images of a job.

    Args:
        job: Job to measure.
        images: Images of a run.

    Raises:
        InvalidJob: If there are no images.
    """
    listing = SourceListing(job.input, Reader(job.storage), job.output.uri)
    # Tuning decides by the first chunk of a plan, so at least the images of one chunk are needed.
    wanted_rows = max(images, chunks.CHUNK_ROWS)
    batches: list[pa.RecordBatch] = []
    rows, started, cpu_started = 0, time.perf_counter(), time.process_time()
    for batch in listing.refs(Cursor()):
        batches.append(batch)
        rows += batch.num_rows
        if rows >= wanted_rows:
            break
    seconds, cpu_seconds = time.perf_counter() - started, time.process_time() - cpu_started
    if not rows:
        raise InvalidJob(f"{job.input.uri}: no images there, so there is nothing to measure; look at input")
    stage = StageMeasurement("list", rows / seconds, cpu_seconds / rows * 1e3, note="in the driver, once")
    return InputSample(tuple(batches), rows, stage)


def repeat_rows(batches: Sequence[pa.RecordBatch], rows: int) -> Iterator[pa.RecordBatch]:
    """Yield exactly this many rows, starting over from the first batch as often as necessary."""
    remaining = rows
    for batch in cycle([batch for batch in batches if batch.num_rows]):
        yield batch.slice(0, remaining)
        remaining -= batch.num_rows
        if remaining <= 0:
            return
