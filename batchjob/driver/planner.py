"""From a job to its frozen plan: what must be there first, how large shards are, whether a plan is this job's."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from functools import cached_property

import pyarrow as pa

import batchjob
from batchjob.driver.control_loop import ControlLoop
from batchjob.driver.existing_output import check_fingerprint
from batchjob.errors import InvalidJob
from batchjob.job.job import Job
from batchjob.job.runtime import Workers
from batchjob.output import success
from batchjob.output.schema import build_row_schema
from batchjob.plan.chunks import CHUNK_BYTES, Chunk, extend_plan
from batchjob.plan.head import PlanHead, new_head, read_current_head
from batchjob.plan.head import put_head as freeze_of_head
from batchjob.sources.listing import SMALL_INPUT_IMAGES, InputPreview, SourceListing, preview_listing
from batchjob.storage.probe import probe_store
from batchjob.storage.reader import Reader
from batchjob.storage.store import Store
from batchjob.types import Cursor

__all__ = ["Planner", "check_columns", "choose_shard_size", "no_images_error"]

_PART_BYTES = 512 << 20
_PART_LIMIT = 4 << 30
_SHARD_ROWS = (64, 8192)
_SHARDS_A_WORKER = 4


def no_images_error(job: Job) -> InvalidJob:
    """What is said of an input that lists none."""
    return InvalidJob(
        f"{job.input.uri}: no images there (input.uri, its extensions, include and exclude); "
        "put some there, or run with --allow-empty for an output of no rows"
    )


class Planner:
    """A job's input on its way into the plan. What may block does so aside, while the turns go on.

    Args:
        job: whose input it is.
        store: its output.
        turns: of the control thread.
        note: told what people may want to know.
    """

    def __init__(self, job: Job, store: Store, control_loop: ControlLoop, note: Callable[[str], None]) -> None:
        self._job, self._store, self._turns, self._note = job, store, control_loop, note

    @cached_property
    def _input(self) -> SourceListing:
        return SourceListing(self._job.input, Reader(self._job.storage), self._job.output.uri)

    @cached_property
    def _patient_input(self) -> SourceListing:
        """The same, once it is known to be there: an outage is waited for."""
        reader = Reader(self._job.storage, outage_timeout=self._job.errors.outage_seconds)
        return SourceListing(self._job.input, reader, self._job.output.uri)

    def preview_input(self, allow_empty: bool) -> InputPreview:
        """Everything that can be said of job, input and store without a model. Nothing is frozen by it.

        Raises:
            JobError: what does not hold; InvalidJob or Temporary.
        """
        for step in (
            lambda: probe_store(self._store),
            self._check_files,
            lambda: self._input.check_requirements(self._note),
        ):
            self._turns.run_blocking(step)
        self._turns.run_blocking(lambda: self._input.fields)
        self.check_columns()
        few = self._turns.run_blocking(lambda: preview_listing(self._input, SMALL_INPUT_IMAGES))
        if few.rows == 0 and not allow_empty:
            raise no_images_error(self._job)
        return few

    def extend_preview(self, preview: InputPreview, workers: int) -> InputPreview:
        """As far as it takes to know how large shards should be for so many workers."""
        enough = (workers or _asked(self._job)) * _SHARDS_A_WORKER * _SHARD_ROWS[1]
        if preview.complete or preview.rows > enough:
            return preview
        return self._turns.run_blocking(lambda: preview_listing(self._input, enough))

    def check_columns(self, task_columns: Iterable[str] = ()) -> None:
        """See `check_columns`.

        Args:
            task: names of the task's columns, once they are known.
        """
        check_columns(self._job, self._input, task_columns)

    def freeze(
        self,
        number: int,
        preview: InputPreview,
        workers: int,
        row_bytes: int,
        delete_stale: Callable[[list[str]], None],
    ) -> PlanHead:
        """Write the head of plan number `number`; or adopt the one that another driver wrote meanwhile.

        Args:
            number: of the plan.
            seen: of the input.
            workers: that share it, 0 where that is not known.
            row_bytes: bound on the bytes of the task's columns in a row, 0 where only its settings tell.
            clear: see `plan.freeze`.

        Raises:
            InvalidJob: shards would be too large, or the plan that stands is another job's.
        """
        size = choose_shard_size(self._job, preview, workers, row_bytes)
        head = new_head(
            number,
            job=self._job.serialize(),
            fingerprint=self._job.fingerprint(),
            shard_size=size,
            source_version=self._turns.run_blocking(lambda: self._input.version),
            batchjob=batchjob.__version__,
            defaults=self._job.resolved_settings(),
        )
        if number:  # a discard that was cut short may have left it
            self._turns.run_blocking(
                lambda: success.delete_orphaned_success(self._store, lambda: read_current_head(self._store)[1] is None)
            )
        stands = self._turns.run_blocking(lambda: freeze_of_head(self._store, head, delete_stale))
        check_fingerprint(self._store, self._job, stands)
        return stands

    def iter_chunks(self, head: PlanHead) -> Iterator[Chunk]:
        """The plan's chunks, those that are there and those that are written now; for a thread of its own."""
        return extend_plan(self._store, head, self._refs, lambda: self._unchanged(head))

    def close(self) -> None:
        """End what may still be listing aside."""
        for name in {"_input", "_patient_input"} & self.__dict__.keys():
            getattr(self, name).close()

    def _refs(self, after: Cursor) -> Iterator[pa.RecordBatch]:
        return self._patient_input.refs(after)

    def _unchanged(self, head: PlanHead) -> None:
        self._patient_input.check_unchanged(head.source_version)

    def _check_files(self) -> None:
        """Weights, code and labels are there, as far as that shows without torch."""
        reader = Reader(self._job.storage)
        self._job.model.check(reader, self._job.folder)
        self._job.task.check(reader, self._job.folder)


def check_columns(job: Job, listing: SourceListing, task_columns: Iterable[str] = ()) -> None:
    """Do the output's columns go together, and are those there that the task takes as the truth?

    Args:
        job: whose task and output it is.
        source: with the passthrough columns.
        task: names of the task's columns, once they are known.

    Raises:
        InvalidJob: a passthrough column clashes with ours, the task's or the output path's; `task.truth` is none.
    """
    columns = [pa.field(name, pa.string()) for name in dict.fromkeys(task_columns)]
    build_row_schema(listing.fields, columns, job.input.has_id, job.output.uri)
    job.task.check_truth_columns([field for field in listing.fields if not (job.input.has_id and field.name == "id")])


def choose_shard_size(job: Job, preview: InputPreview, workers: int, row_bytes: int) -> int:
    """Images a shard: as the job says, else small enough to share out and to keep a part near 512 MiB.

    Args:
        job: its runtime and task count.
        seen: of the input; see `Planning.look_further`.
        workers: that share it, 0 where that is not known.
        row_bytes: bound on the bytes of the task's columns in a row, 0 where only its settings tell.

    Raises:
        InvalidJob: what the job says may exceed 4 GiB a part.
    """
    row_bytes = (row_bytes or job.task.row_bytes) + preview.row_bytes
    wanted = job.runtime.shard_size
    if wanted == "auto":
        least, most = _SHARD_ROWS
        share = -(-preview.rows // ((workers or _asked(job)) * _SHARDS_A_WORKER)) if preview.complete else most
        in_chunk = CHUNK_BYTES // max(1, preview.row_bytes)  # a chunk of the plan holds whole shards
        return max(1, min(max(least, share), most, _PART_BYTES // max(1, row_bytes), in_chunk))
    if wanted * row_bytes > _PART_LIMIT:
        raise InvalidJob(
            f"runtime.shard_size: {wanted:,} rows of up to {row_bytes:,} bytes may exceed 4 GiB a part; "
            f"give at most {max(1, _PART_LIMIT // row_bytes):,}"
        )
    return wanted


def _asked(job: Job) -> int:
    """Workers that the job asks for, 1 where it leaves that open."""
    asked = job.runtime.workers
    return asked.max if isinstance(asked, Workers) else 1 if asked == "auto" else asked
