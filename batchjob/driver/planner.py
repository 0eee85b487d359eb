"""Planner: check the input, choose the shard size, freeze the head of the plan, write its chunks."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from contextlib import suppress

import pyarrow as pa

from batchjob import __version__
from batchjob.driver.control_loop import ControlLoop
from batchjob.driver.existing_output import check_fingerprint
from batchjob.errors import InvalidJob, StorageError, Unavailable
from batchjob.job.job import Job
from batchjob.output.schema import build_row_schema
from batchjob.output.success import delete_orphaned_success
from batchjob.plan.chunks import CHUNK_BYTES, Chunk, extend_plan
from batchjob.plan.head import PlanHead, new_head, put_head, read_current_head
from batchjob.sources.listing import SMALL_INPUT_IMAGES, InputPreview, SourceListing, preview_listing
from batchjob.sources.prefix import suggest_input
from batchjob.storage.probe import probe_store
from batchjob.storage.reader import Reader
from batchjob.storage.store import Store

__all__ = ["Planner", "check_columns", "choose_shard_size", "no_images_error"]

_TARGET_PART_BYTES = 512 << 20
_MAX_PART_BYTES = 4 << 30
_MIN_SHARD_ROWS = 64
_MAX_SHARD_ROWS = 8192
_MIN_SHARDS_PER_WORKER = 4


class Planner:
    """Make the plan of a job. Whatever may block runs in another thread while the control loop ticks.

    Args:
        job: The job.
        store: Its output.
        control_loop: Control loop of the driver.
        note: Called with lines for the user.
    """

    def __init__(self, job: Job, store: Store, control_loop: ControlLoop, note: Callable[[str], None]) -> None:
        self._job, self._store, self._control_loop, self._note = job, store, control_loop, note
        self._listing = SourceListing(job.input, Reader(job.storage), job.output.uri)
        # For writing chunks. By then the input is known to be there, so an outage is waited out.
        reader = Reader(job.storage, outage_timeout=job.errors.outage_seconds)
        self._outage_tolerant_listing = SourceListing(job.input, reader, job.output.uri)

    def preview_input(self, allow_empty: bool) -> InputPreview:
        """Check everything that can be checked without a model, and list the first images. Writes no plan.

        Args:
            allow_empty: Accept an input without images.

        Raises:
            InvalidJob: A check failed, or the input has no images.
            Temporary: The input is not there yet.
        """
        run_blocking = self._control_loop.run_blocking
        run_blocking(lambda: probe_store(self._store))
        run_blocking(self._check_files)
        run_blocking(lambda: self._listing.check_requirements(self._note))
        run_blocking(lambda: self._listing.fields)
        self.check_columns()
        preview = run_blocking(lambda: preview_listing(self._listing, SMALL_INPUT_IMAGES))
        if preview.rows == 0 and not allow_empty:
            raise no_images_error(self._job, preview)
        return preview

    def count_images(self) -> int:
        """Return the images of the input if a manifest tells before it is read; 0 if it does not, or cannot be read."""

        def count() -> int:
            # It is a hint only: whatever is wrong with the input is reported where it is read.
            with suppress(InvalidJob, StorageError, Unavailable, OSError, pa.ArrowException):
                return self._listing.count_images() or 0
            return 0

        return self._control_loop.run_blocking(count)

    def extend_preview(self, preview: InputPreview, workers: int) -> InputPreview:
        """List as many images as it takes to choose the shard size.

        Args:
            preview: Preview so far; returned as it is if it is long enough.
            workers: Workers that share the input; 0 if unknown.
        """
        min_rows = (workers or self._job.runtime.requested_workers) * _MIN_SHARDS_PER_WORKER * _MAX_SHARD_ROWS
        if preview.complete or preview.rows > min_rows:
            return preview
        return self._control_loop.run_blocking(lambda: preview_listing(self._listing, min_rows))

    def check_columns(self, task_columns: Iterable[str] = ()) -> None:
        """Check the columns of the output; see the function `check_columns`."""
        check_columns(self._job, self._listing, task_columns)

    def freeze(
        self, number: int, preview: InputPreview, workers: int, delete_stale: Callable[[list[str]], None]
    ) -> PlanHead:
        """Write the head of a plan, or adopt the head that another driver has written meanwhile.

        Args:
            number: Number of the plan.
            preview: Preview of the input.
            workers: Workers that share the input; 0 if unknown.
            delete_stale: Called with the parts that lie in the output; see `put_head`.

        Raises:
            InvalidJob: Shards would be too large, or the plan in force is another job's.
        """
        head = new_head(
            number,
            job=self._job.describe(),
            fingerprint=self._job.fingerprint(),
            shard_size=choose_shard_size(self._job, preview, workers),
            source_version=self._control_loop.run_blocking(lambda: self._listing.version),
            batchjob=__version__,
            defaults=self._job.resolved_settings(),
        )
        if number:
            # A discard that was interrupted may have left the old plan's `_SUCCESS`.
            self._control_loop.run_blocking(
                lambda: delete_orphaned_success(self._store, lambda: read_current_head(self._store)[1] is None)
            )
        current_head = self._control_loop.run_blocking(lambda: put_head(self._store, head, delete_stale))
        check_fingerprint(self._store, self._job, current_head)
        return current_head

    def iter_chunks(self, head: PlanHead) -> Iterator[Chunk]:
        """Yield the chunks of the plan: first those that are there, then those that are written now. May block."""
        listing = self._outage_tolerant_listing
        yield from extend_plan(self._store, head, listing.refs, lambda: listing.check_unchanged(head.source_version))
        # None if the whole plan was there.
        for line in listing.skipped.describe():
            self._note(line)

    def close(self) -> None:
        """End listings that are still running in other threads."""
        self._listing.close()
        self._outage_tolerant_listing.close()

    def _check_files(self) -> None:
        """Check that weights, code and labels are there, as far as that can be seen without torch."""
        reader = Reader(self._job.storage)
        self._job.model.check(reader, self._job.folder)
        self._job.task.check(reader, self._job.folder)


def no_images_error(job: Job, preview: InputPreview) -> InvalidJob:
    """Make the error of an input without images."""
    reasons = "; ".join(preview.skipped) or "input.uri, its extensions, include and exclude"
    other = suggest_input(job.input.uri) if job.input.type == "prefix" else None
    advice = other or "put some there, or run with --allow-empty for an output of no rows"
    return InvalidJob(f"{job.input.uri}: no images there ({reasons}); {advice}")


def check_columns(job: Job, listing: SourceListing, task_columns: Iterable[str] = ()) -> None:
    """Check that the output's columns do not clash, and that the columns of the ground truth are there.

    Args:
        job: The job.
        listing: Its input, which has the passthrough columns.
        task_columns: Names of the task's columns; none while they are unknown.

    Raises:
        InvalidJob: A passthrough column clashes with one of ours, of the task or of the output path; or `task.truth`
            names no passthrough column.
    """
    columns = [pa.field(name, pa.string()) for name in dict.fromkeys(task_columns)]
    build_row_schema(listing.fields, columns, job.input.has_id, job.output.uri)
    job.task.check_truth_columns([field for field in listing.fields if not (job.input.has_id and field.name == "id")])


def choose_shard_size(job: Job, preview: InputPreview, workers: int) -> int:
    """Choose the images per shard: as the job says, or else so that all workers have work and parts stay near 512 MiB.

    Example: 10,000 images for 2 workers, embeddings of 768 float32, no passthrough columns.
        share of a worker's 4 shards: 10,000 / (2 * 4) = 1,250 rows
        at most 8,192 rows, and 512 MiB / (768 * 4 B) = 174,762 rows a part
        → 1,250 images per shard

    Args:
        job: The job; `runtime.shard_size`, `runtime.workers` and its task decide.
        preview: Preview of the input; see `Planner.extend_preview`.
        workers: Workers that share the input; 0 if unknown.

    Raises:
        InvalidJob: Parts of the size that the job says may exceed 4 GiB.
    """
    row_bytes = job.task.row_bytes + preview.row_bytes
    requested = job.runtime.shard_size
    if requested == "auto":
        workers = workers or job.runtime.requested_workers
        rows = -(-preview.rows // (workers * _MIN_SHARDS_PER_WORKER)) if preview.complete else _MAX_SHARD_ROWS
        rows_per_part = _TARGET_PART_BYTES // max(1, row_bytes)
        # A chunk of the plan holds whole shards.
        rows_per_chunk = CHUNK_BYTES // max(1, preview.row_bytes)
        return max(1, min(max(_MIN_SHARD_ROWS, rows), _MAX_SHARD_ROWS, rows_per_part, rows_per_chunk))
    if requested * row_bytes > _MAX_PART_BYTES:
        raise InvalidJob(
            f"runtime.shard_size: {requested:,} rows of up to {row_bytes:,} bytes may exceed 4 GiB a part; "
            f"give at most {max(1, _MAX_PART_BYTES // row_bytes):,}"
        )
    return requested
