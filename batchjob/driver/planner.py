"""From a job to its frozen plan: what must be there first, how large shards are, whether a plan is this job's."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from functools import cached_property

import pyarrow as pa

import batchjob
from batchjob.driver.control_loop import Turns
from batchjob.driver.existing_output import compare
from batchjob.errors import InvalidJob
from batchjob.job.job import Job
from batchjob.job.runtime import Workers
from batchjob.output import success
from batchjob.output.schema import row_schema
from batchjob.plan.chunks import CHUNK_BYTES, Chunk, extend
from batchjob.plan.head import Head, current, new_head
from batchjob.plan.head import freeze as freeze_of_head
from batchjob.sources.listing import FEW_IMAGES, Input, Peek, peek
from batchjob.storage.probe import probe
from batchjob.storage.reader import Reader
from batchjob.storage.store import Store
from batchjob.types import Cursor

__all__ = ["Planning", "check_columns", "no_images", "shard_size"]

_PART_BYTES = 512 << 20
_PART_LIMIT = 4 << 30
_SHARD_ROWS = (64, 8192)
_SHARDS_A_WORKER = 4


def no_images(job: Job) -> InvalidJob:
    """What is said of an input that lists none."""
    return InvalidJob(
        f"{job.input.uri}: no images there (input.uri, its extensions, include and exclude); "
        "put some there, or run with --allow-empty for an output of no rows"
    )


class Planning:
    """A job's input on its way into the plan. What may block does so aside, while the turns go on.

    Args:
        job: whose input it is.
        store: its output.
        turns: of the control thread.
        note: told what people may want to know.
    """

    def __init__(self, job: Job, store: Store, turns: Turns, note: Callable[[str], None]) -> None:
        self._job, self._store, self._turns, self._note = job, store, turns, note

    @cached_property
    def _input(self) -> Input:
        return Input(self._job, Reader(self._job.storage))

    @cached_property
    def _patient_input(self) -> Input:
        """The same, once it is known to be there: an outage is waited for."""
        return Input(self._job, Reader(self._job.storage, outage=self._job.errors.outage_seconds))

    def look(self, allow_empty: bool) -> Peek:
        """Everything that can be said of job, input and store without a model. Nothing is frozen by it.

        Raises:
            JobError: what does not hold; InvalidJob or Temporary.
        """
        for step in (lambda: probe(self._store), self._check_files, lambda: self._input.require(self._note)):
            self._turns.during(step)
        self._turns.during(lambda: self._input.fields)
        self.check_columns()
        few = self._turns.during(lambda: peek(self._input, FEW_IMAGES))
        if few.rows == 0 and not allow_empty:
            raise no_images(self._job)
        return few

    def look_further(self, seen: Peek, workers: int) -> Peek:
        """As far as it takes to know how large shards should be for so many workers."""
        enough = (workers or _asked(self._job)) * _SHARDS_A_WORKER * _SHARD_ROWS[1]
        if seen.whole or seen.rows > enough:
            return seen
        return self._turns.during(lambda: peek(self._input, enough))

    def check_columns(self, task: Iterable[str] = ()) -> None:
        """See `check_columns`.

        Args:
            task: names of the task's columns, once they are known.
        """
        check_columns(self._job, self._input, task)

    def freeze(self, number: int, seen: Peek, workers: int, row_bytes: int, clear: Callable[[list[str]], None]) -> Head:
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
        size = shard_size(self._job, seen, workers, row_bytes)
        head = new_head(
            number,
            job=self._job.portable(),
            fingerprint=self._job.fingerprint(),
            shard_size=size,
            source_version=self._turns.during(lambda: self._input.version),
            batchjob=batchjob.__version__,
            defaults=self._job.resolved(),
        )
        if number:  # a discard that was cut short may have left it
            self._turns.during(lambda: success.clear_success(self._store, lambda: current(self._store)[1] is None))
        stands = self._turns.during(lambda: freeze_of_head(self._store, head, clear))
        compare(self._store, self._job, stands)
        return stands

    def chunks(self, head: Head) -> Iterator[Chunk]:
        """The plan's chunks, those that are there and those that are written now; for a thread of its own."""
        return extend(self._store, head, self._refs, lambda: self._unchanged(head))

    def close(self) -> None:
        """End what may still be listing aside."""
        for name in {"_input", "_patient_input"} & self.__dict__.keys():
            getattr(self, name).close()

    def _refs(self, after: Cursor) -> Iterator[pa.RecordBatch]:
        return self._patient_input.refs(after)

    def _unchanged(self, head: Head) -> None:
        self._patient_input.check_unchanged(head)

    def _check_files(self) -> None:
        """Weights, code and labels are there, as far as that shows without torch."""
        reader = Reader(self._job.storage)
        self._job.model.check(reader, self._job.base)
        self._job.task.check(reader, self._job.base)


def check_columns(job: Job, source: Input, task: Iterable[str] = ()) -> None:
    """Do the output's columns go together, and are those there that the task takes as the truth?

    Args:
        job: whose task and output it is.
        source: with the passthrough columns.
        task: names of the task's columns, once they are known.

    Raises:
        InvalidJob: a passthrough column clashes with ours, the task's or the output path's; `task.truth` is none.
    """
    columns = [pa.field(name, pa.string()) for name in dict.fromkeys(task)]
    row_schema(source.fields, columns, job.input.has_id, job.output.uri)
    job.task.check_truths([field for field in source.fields if not (job.input.has_id and field.name == "id")])


def shard_size(job: Job, seen: Peek, workers: int, row_bytes: int) -> int:
    """Images a shard: as the job says, else small enough to share out and to keep a part near 512 MiB.

    Args:
        job: its runtime and task count.
        seen: of the input; see `Planning.look_further`.
        workers: that share it, 0 where that is not known.
        row_bytes: bound on the bytes of the task's columns in a row, 0 where only its settings tell.

    Raises:
        InvalidJob: what the job says may exceed 4 GiB a part.
    """
    row_bytes = (row_bytes or job.task.row_bytes) + seen.row_bytes
    wanted = job.runtime.shard_size
    if wanted == "auto":
        least, most = _SHARD_ROWS
        share = -(-seen.rows // ((workers or _asked(job)) * _SHARDS_A_WORKER)) if seen.whole else most
        in_chunk = CHUNK_BYTES // max(1, seen.row_bytes)  # a chunk of the plan holds whole shards
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
