"""Predicted batches to committed parts, in threads of its own, so that the model never waits for Arrow or storage."""

from __future__ import annotations

import queue
import secrets
import threading
import time
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Future
from contextlib import suppress
from dataclasses import dataclass
from functools import partial
from importlib.metadata import version
from pathlib import Path

import pyarrow as pa
import pyarrow.compute as pc

from batchjob.concurrency import DaemonThreadPool
from batchjob.errors import BatchjobError, as_batchjob_error
from batchjob.output import commit, retry
from batchjob.output.part_writer import PartWriter, build_rows
from batchjob.output.provenance import PartFooter, ShardResult
from batchjob.output.scratch import as_disk_full_error
from batchjob.preprocessing.geometry import ImageGeometry
from batchjob.storage.store import Store
from batchjob.tasks.postprocess import Postprocess
from batchjob.types import (
    Batch,
    ErrorRecord,
    ImageInfo,
    Prediction,
    Shard,
    ShardKey,
    StepMonitor,
    TimingSink,
    no_monitor,
    record_timing,
)

__all__ = ["PartBuilder", "PartMetadata"]

_BATCHES_WAITING = 2
_COMMITS_PENDING = 2
_RECORDED = ("batchjob", "torch", "torchvision", "pyarrow", "pillow")
GetGeometry = Callable[[ImageInfo], ImageGeometry]
OnResult = Callable[[ShardKey, ShardResult | BatchjobError], None]
"""Called with the committed shard, or with the error that ended the attempt."""


@dataclass(frozen=True)
class PartMetadata:
    """What every row and every footer of this worker says.

    Attributes:
        plan: id of the plan.
        fingerprint: digest of the job's.
        model: digest of weights and model code; `model_id` is its name in the rows.
        recipe: in words, by which the model ran here.
        schema: of every part.
    """

    plan_id: str
    fingerprint: str
    model_digest: str
    model_id: str
    execution_config: str
    schema: pa.Schema


@dataclass(frozen=True)
class _QueuedBatch:
    """One batch on its way into its part."""

    shard: Shard
    batch: Batch
    predicted: Prediction | None
    seconds: float
    last: bool


class PartBuilder:
    """Takes batches in the order they were predicted; tells what became of each shard.

    Args:
        store: of the output.
        spool: local folder for parts in the making.
        imprint: see `Imprint`.
        post: the task's half after the model.
        frames: where the model's input lies in an image.
        wanted: raises when the plan was discarded meanwhile; asked before each commit.
        on_result: Called once per attempt, from any thread, with its result.
        watch: told how long each batch and each commit took.
        step: Wraps the work on each batch and part, so that one that hangs is noticed.
    """

    def __init__(  # noqa: PLR0913 - all by keyword, from the one place that puts a worker together
        self,
        *,
        store: Store,
        scratch_folder: Path,
        metadata: PartMetadata,
        postprocess: Postprocess,
        get_geometry: GetGeometry,
        raise_if_discarded: Callable[[], None],
        on_result: OnResult,
        timing_sink: TimingSink = lambda span: None,
        step: StepMonitor = no_monitor,
    ) -> None:
        self._store, self._spool, self._imprint, self._post = store, scratch_folder, metadata, postprocess
        self._frames, self._wanted, self._watch, self._step = get_geometry, raise_if_discarded, timing_sink, step
        self._on_result = on_result
        self._drafts: dict[int, _PartInProgress] = {}
        self._failed: set[int] = set()
        self._waiting: queue.Queue[_QueuedBatch | Callable[[], None] | None] = queue.Queue(_BATCHES_WAITING)
        self._room = threading.Semaphore(_COMMITS_PENDING)
        self._committer = DaemonThreadPool(1, "commit")
        self._thread = threading.Thread(target=self._work, name="assembly", daemon=True)
        self._thread.start()

    def add(
        self, shard: Shard, batch: Batch, prediction: Prediction | None, *, forward_seconds: float, is_last: bool
    ) -> None:
        """The next batch of a shard; waits while others are still in the queue.

        Args:
            shard: whose batch it is.
            batch: as loaded.
            predicted: what the model gave, None where no image was good.
            seconds: that the prediction took here.
            last: no more of this shard will come.
        """
        self._waiting.put(_QueuedBatch(shard, batch, prediction, forward_seconds, is_last))

    def add_empty_shard(self, shard: Shard) -> None:
        """A shard of no images."""
        self._waiting.put(lambda: self._begin_empty(shard))

    def fail_attempt(self, shard: Shard, error: BatchjobError) -> None:
        """This attempt has ended; it is told once."""
        self._waiting.put(lambda: self._drop(shard, error))

    def has_failed(self, attempt: int) -> bool:
        """Whether the attempt of that number has ended without a part, as far as is known here by now."""
        return attempt in self._failed

    def close(self) -> None:
        """Finish what was added, commits included."""
        self._waiting.put(None)
        self._thread.join()
        for _ in range(_COMMITS_PENDING):
            self._room.acquire()
        self._committer.shutdown()

    # -- in the thread -----------------------------------------------------------------------------------------

    def _work(self) -> None:
        while (item := self._waiting.get()) is not None:
            if isinstance(item, _QueuedBatch):
                self._advance(item)
            else:
                item()
        for draft in self._drafts.values():
            draft.give_up()

    def _advance(self, item: _QueuedBatch) -> None:
        """One batch further. What is still to come of an attempt that has failed is passed over."""
        take = item.shard.attempt_number
        if take in self._failed:
            return
        try:
            with self._step("results", model=True):
                self._enter(self._draft(item.shard), item)
        except Exception as error:  # noqa: BLE001 - ends this attempt; the driver decides how far it reaches
            self._drop(item.shard, self._fault(error))
            return
        if item.last:
            self._seal(self._drafts.pop(take))

    def _draft(self, shard: Shard) -> _PartInProgress:
        if shard.attempt_number not in self._drafts:
            self._drafts[shard.attempt_number] = _PartInProgress(self._spool, shard, self._imprint.schema)
        return self._drafts[shard.attempt_number]

    def _drop(self, shard: Shard, error: BatchjobError) -> None:
        """No more of this attempt."""
        if shard.attempt_number in self._failed:
            return
        self._failed.add(shard.attempt_number)
        if (draft := self._drafts.pop(shard.attempt_number, None)) is not None:
            draft.give_up()
        self._on_result(shard.key, error)

    def _enter(self, draft: _PartInProgress, item: _QueuedBatch) -> None:
        """Rows of one batch into the part."""
        draft.spend(item.batch.stage_seconds)
        columns: list[pa.Array] = []
        faults: list[ErrorRecord | None] = []
        began = time.perf_counter()
        if item.predicted is not None:
            predicted = item.predicted.wait()
            frames = [self._frames(fact) for fact in item.batch.image_infos if fact.error is None]
            began, waited = time.perf_counter(), time.perf_counter() - began
            draft.spend({"forward": item.seconds + waited})
            columns, faults = self._outcome(predicted, frames)
        made = build_rows(
            self._imprint.schema,
            shard=draft.shard,
            start=item.batch.start,
            image_infos=item.batch.image_infos,
            columns=columns,
            error_records=faults,
            run_id=self._imprint.plan_id,
            model_id=self._imprint.model_id,
        )
        draft.writer.add(made)
        if self._post.truth_columns:
            draft.truth.update(self._post.sum_metrics(made.filter(pc.is_null(made.column("error_stage")))))
        draft.spend({"write": record_timing(self._watch, "write", began, made.num_rows)})

    def _outcome(
        self, predicted: Prediction, frames: Sequence[ImageGeometry]
    ) -> tuple[list[pa.Array], list[ErrorRecord | None]]:
        """The task's columns and faults, a row for each image, in the batch's order."""
        order: list[int] = []
        parts: list[list[pa.Array]] = []
        found: list[ErrorRecord | None] = []
        for piece in predicted.outputs:
            order += piece.rows
            parts.append(self._post.columns(piece.tensors, [frames[row] for row in piece.rows]))
            found += self._post.find_errors(piece.tensors)
        if predicted.errors:
            order += predicted.errors
            parts.append([pa.nulls(len(predicted.errors), field.type) for field in self._post.fields])
            found += predicted.errors.values()
        columns = parts[0] if len(parts) == 1 else [pa.concat_arrays(same) for same in zip(*parts, strict=True)]
        if order == sorted(order):
            return columns, found
        back = sorted(range(len(order)), key=order.__getitem__)
        return [column.take(pa.array(back)) for column in columns], [found[index] for index in back]

    def _begin_empty(self, shard: Shard) -> None:
        try:
            self._seal(_PartInProgress(self._spool, shard, self._imprint.schema))
        except Exception as error:  # noqa: BLE001 - likewise
            self._on_result(shard.key, self._fault(error))

    def _seal(self, draft: _PartInProgress) -> None:
        """Finish the part and commit it, beside the next one."""
        self._room.acquire()
        self._committer.submit(partial(self._commit, draft)).add_done_callback(
            partial(self._committed, draft.shard.key)
        )

    def _committed(self, key: ShardKey, future: Future[ShardResult | BatchjobError]) -> None:
        try:
            self._on_result(key, future.result())
        finally:
            self._room.release()

    def _commit(self, draft: _PartInProgress) -> ShardResult | BatchjobError:
        key, began = draft.shard.key, time.perf_counter()
        try:
            with self._step("the end of a part"):
                made = draft.close(self._imprint)
            path, examples = draft.writer.path, draft.writer.examples
            if key.revision:
                done, examples = retry.replace_part(self._store, key, path, made, self._wanted)
            else:
                done = commit.commit_part(self._store, key, path, made, self._wanted)
            return ShardResult(
                key, done.footer, examples if done.committed_here else {}, done.committed_here, done.info.etag
            )
        except Exception as error:  # noqa: BLE001 - ends this attempt
            return self._fault(error)
        finally:
            with suppress(OSError):  # the spool is swept at the end
                draft.writer.path.unlink(missing_ok=True)
            record_timing(self._watch, "commit", began, len(draft.shard.refs))

    def _fault(self, error: Exception) -> BatchjobError:
        return as_disk_full_error(error, self._spool) or as_batchjob_error(error)


class _PartInProgress:
    """A part in the making: one attempt at one shard."""

    def __init__(self, spool: Path, shard: Shard, schema: pa.Schema) -> None:
        self.shard = shard
        self.attempt = secrets.token_hex(8)
        self.writer = PartWriter(spool / f"{shard.key.index}-{self.attempt}.parquet", schema)
        self.truth: Counter[str] = Counter()
        self._began = time.perf_counter()
        self._seconds: Counter[str] = Counter()

    def spend(self, seconds: Mapping[str, float]) -> None:
        """Add to the stage clocks."""
        self._seconds.update(seconds)

    def give_up(self) -> None:
        """Remove what was written."""
        with suppress(OSError):
            self.writer.abandon()
        with suppress(OSError):
            self.writer.path.unlink(missing_ok=True)

    def close(self, imprint: PartMetadata) -> PartFooter:
        """Write the footer; the file is the part, or at a retry the rows that were retried."""
        key, images = self.shard.key, len(self.shard.refs)
        if self.writer.rows != images:
            raise BatchjobError(f"shard {key.index} has {images} images, {self.writer.rows} rows")
        self.spend({"wall": time.perf_counter() - self._began})
        made = PartFooter(
            plan=imprint.plan_id,
            shard=key.id,
            index=key.index,
            attempt=self.attempt,
            revision=key.revision,
            fingerprint=imprint.fingerprint,
            model=imprint.model_digest,
            recipe=imprint.execution_config,
            rows=self.writer.rows,
            failed=self.writer.failed,
            errors=self.writer.errors,
            seconds={stage: round(spent, 4) for stage, spent in self._seconds.items()},
            versions={name: version(name) for name in _RECORDED},
            truth=dict(self.truth),
        )
        self.writer.close(made)
        return made
