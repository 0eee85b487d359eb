"""Builds and commits parts in threads of its own, so that the model waits for neither Arrow nor the store."""

from __future__ import annotations

import queue
import secrets
import threading
import time
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Future
from contextlib import suppress
from dataclasses import dataclass, replace
from functools import partial
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, ClassVar, Protocol

import pyarrow as pa
import pyarrow.compute as pc

from batchjob.concurrency import DaemonThreadPool
from batchjob.errors import BatchjobError, as_batchjob_error
from batchjob.output.commit import commit_part
from batchjob.output.part_writer import PartWriter, build_rows
from batchjob.output.provenance import PartFooter, ShardResult
from batchjob.output.retry import replace_part
from batchjob.output.scratch import as_disk_full_error
from batchjob.preprocessing.geometry import ImageGeometry
from batchjob.storage.store import Store
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

if TYPE_CHECKING:
    import torch

__all__ = ["ColumnBuilder", "GetGeometry", "OnResult", "PartBuilder", "PartMetadata"]

_MAX_QUEUED_BATCHES = 2
_MAX_PENDING_COMMITS = 2
_RECORDED_PACKAGES = ("batchjob", "torch", "torchvision", "pyarrow", "pillow")

GetGeometry = Callable[[ImageInfo], ImageGeometry]
"""Returns the position of the model's input in an image."""
OnResult = Callable[[ShardKey, ShardResult | BatchjobError], None]
"""Called with the committed shard, or with the error that ended the attempt."""


class ColumnBuilder(Protocol):
    """The task's side of a part: it turns model outputs on the host into columns, error records and metric sums.

    Attributes:
        fields: Arrow fields of the task's columns.
        truth_columns: Passthrough columns with the ground truth; empty where the job names none.
        names_images: True if it needs URI and passthrough columns of each image.
    """

    names_images: ClassVar[bool]

    @property
    def fields(self) -> list[pa.Field]: ...

    @property
    def truth_columns(self) -> tuple[str, ...]: ...

    def columns(self, tensors: dict[str, torch.Tensor], geometries: Sequence[ImageGeometry], /) -> list[pa.Array]:
        """Build the columns, with one entry per image."""

    def find_errors(self, tensors: dict[str, torch.Tensor], /) -> list[ErrorRecord | None]:
        """Return an error record for each image whose output is not usable, and None for the others."""

    def sum_metrics(self, rows: pa.RecordBatch, /) -> dict[str, float]:
        """Compare rows without errors with their ground truth; the sums add up over batches."""


@dataclass(frozen=True)
class PartMetadata:
    """Values that all rows and footers of a worker share.

    Attributes:
        plan_id: Id of the plan; the rows' `run_id`.
        fingerprint: SHA-256 of the job's fingerprint.
        model_digest: Digest of weights and model code.
        model_id: Name and digest of the model, as the rows show it.
        execution_config: Execution config of the model, as text.
        schema: Schema of all parts.
    """

    plan_id: str
    fingerprint: str
    model_digest: str
    model_id: str
    execution_config: str
    schema: pa.Schema


@dataclass(frozen=True)
class _QueuedBatch:
    """One predicted batch, not yet in its part; see `PartBuilder.add`."""

    shard: Shard
    batch: Batch
    prediction: Prediction | None
    forward_seconds: float
    is_last: bool


class PartBuilder:
    """Builder of parts: takes batches in the order they were predicted, and commits each finished part.

    One thread makes rows of batches, another commits finished parts.

    Args:
        store: Store of the output.
        scratch_folder: Local folder for parts in progress.
        metadata: Values that all rows and footers share.
        postprocess: The task.
        get_geometry: Returns the position of the model's input in an image.
        raise_if_discarded: Raises if the plan has been discarded; called before each commit.
        on_result: Called once per attempt, from any thread, with its result.
        timing_sink: Gets the time of each batch and each commit; none by default.
        step: Wraps the work on each batch and part, so that one that hangs is noticed.
    """

    def __init__(  # noqa: PLR0913 - all by keyword, from one place
        self,
        *,
        store: Store,
        scratch_folder: Path,
        metadata: PartMetadata,
        postprocess: ColumnBuilder,
        get_geometry: GetGeometry,
        raise_if_discarded: Callable[[], None],
        on_result: OnResult,
        timing_sink: TimingSink = lambda timing: None,
        step: StepMonitor = no_monitor,
    ) -> None:
        self._store, self._scratch_folder, self._metadata = store, scratch_folder, metadata
        self._postprocess, self._get_geometry = postprocess, get_geometry
        self._raise_if_discarded, self._on_result = raise_if_discarded, on_result
        self._timing_sink, self._step = timing_sink, step
        self._parts: dict[int, _PartInProgress] = {}
        self._failed_attempts: set[int] = set()
        self._queue: queue.Queue[_QueuedBatch | Callable[[], None] | None] = queue.Queue(_MAX_QUEUED_BATCHES)
        self._commit_slots = threading.Semaphore(_MAX_PENDING_COMMITS)
        self._committer = DaemonThreadPool(1, "commit")
        self._thread = threading.Thread(target=self._work, name="part-builder", daemon=True)
        self._thread.start()

    def add(
        self, shard: Shard, batch: Batch, prediction: Prediction | None, *, forward_seconds: float, is_last: bool
    ) -> None:
        """Add the next batch of a shard. Blocks while the queue is full.

        Args:
            shard: Shard of the batch.
            batch: The batch as loaded.
            prediction: Output of the model; None if no image of the batch was loaded.
            forward_seconds: Seconds that the prediction took so far.
            is_last: True for the last batch of the shard.
        """
        self._queue.put(_QueuedBatch(shard, batch, prediction, forward_seconds, is_last))

    def add_empty_shard(self, shard: Shard) -> None:
        """Add a shard without images."""
        self._queue.put(lambda: self._build_empty_part(shard))

    def fail_attempt(self, shard: Shard, error: BatchjobError) -> None:
        """End an attempt with an error. The first result of an attempt counts; a second one is ignored."""
        self._queue.put(lambda: self._fail(shard, error))

    def has_failed(self, attempt: int) -> bool:
        """Return True if the attempt with this number is known to have failed."""
        return attempt in self._failed_attempts

    def close(self) -> None:
        """Finish everything that was added, commits included."""
        self._queue.put(None)
        self._thread.join()
        for _ in range(_MAX_PENDING_COMMITS):
            self._commit_slots.acquire()
        self._committer.shutdown()

    # -- in the builder's thread -------------------------------------------------------------------------------

    def _work(self) -> None:
        while (item := self._queue.get()) is not None:
            if isinstance(item, _QueuedBatch):
                self._process(item)
            else:
                item()
        for part in self._parts.values():
            part.delete()

    def _process(self, item: _QueuedBatch) -> None:
        """Write one batch, and hand over its part after the last one. Batches of failed attempts are skipped."""
        attempt = item.shard.attempt_number
        if attempt in self._failed_attempts:
            return
        try:
            with self._step("results", model=True):
                if attempt not in self._parts:
                    self._parts[attempt] = self._start_part(item.shard)
                self._write_batch(self._parts[attempt], item)
        except Exception as error:  # noqa: BLE001 - ends this attempt; the driver decides what else it affects
            self._fail(item.shard, self._convert_error(error))
            return
        if item.is_last:
            self._submit_commit(self._parts.pop(attempt))

    def _start_part(self, shard: Shard) -> _PartInProgress:
        return _PartInProgress(self._scratch_folder, shard, self._metadata.schema)

    def _fail(self, shard: Shard, error: BatchjobError) -> None:
        if shard.attempt_number in self._failed_attempts:
            return
        self._failed_attempts.add(shard.attempt_number)
        if (part := self._parts.pop(shard.attempt_number, None)) is not None:
            part.delete()
        self._on_result(shard.key, error)

    def _write_batch(self, part: _PartInProgress, item: _QueuedBatch) -> None:
        batch = item.batch
        part.add_seconds(batch.stage_seconds)
        columns: list[pa.Array] = []
        errors: list[ErrorRecord | None] = []
        started = time.perf_counter()
        if item.prediction is not None:
            prediction = item.prediction.wait()
            geometries = self._get_geometries(batch, part.shard)
            started, waited = time.perf_counter(), time.perf_counter() - started
            part.add_seconds({"forward": item.forward_seconds + waited})
            columns, errors = self._build_columns(prediction, geometries)
        rows = build_rows(
            self._metadata.schema,
            shard=part.shard,
            start=batch.start,
            image_infos=batch.image_infos,
            columns=columns,
            error_records=errors,
            run_id=self._metadata.plan_id,
            model_id=self._metadata.model_id,
        )
        part.writer.add(rows)
        if self._postprocess.truth_columns:
            good_rows = rows.filter(pc.is_null(rows.column("error_stage")))
            part.truth.update(self._postprocess.sum_metrics(good_rows))
        part.add_seconds({"write": record_timing(self._timing_sink, "write", started, rows.num_rows)})

    def _get_geometries(self, batch: Batch, shard: Shard) -> list[ImageGeometry]:
        """Return the geometries of the images without error, with their names if the task asks for these."""
        good = [index for index, info in enumerate(batch.image_infos) if info.error is None]
        geometries = [self._get_geometry(batch.image_infos[index]) for index in good]
        if not self._postprocess.names_images:
            return geometries
        columns = shard.passthrough.slice(batch.start, len(batch.image_infos)).to_pylist()
        return [
            replace(geometry, uri=shard.refs[batch.start + index].uri, passthrough=columns[index] if columns else {})
            for index, geometry in zip(good, geometries, strict=True)
        ]

    def _build_columns(
        self, prediction: Prediction, geometries: Sequence[ImageGeometry]
    ) -> tuple[list[pa.Array], list[ErrorRecord | None]]:
        """Build the task's columns and error records, with one entry per predicted image in the order of the batch.

        An example: a batch of four whose first image did not fit into memory, predicted in two calls:

            outputs  rows (2, 3), rows (1,)       errors  {0: out of memory}
            order    [2, 3, 1, 0]                 concatenated columns have their entries in this order
            inverse  [3, 2, 0, 1]                 entry 3 belongs to image 0, entry 2 to image 1, …
        """
        order: list[int] = []
        pieces: list[list[pa.Array]] = []
        errors: list[ErrorRecord | None] = []
        for output in prediction.outputs:
            order += output.rows
            pieces.append(self._postprocess.columns(output.tensors, [geometries[row] for row in output.rows]))
            errors += self._postprocess.find_errors(output.tensors)
        if prediction.errors:
            order += prediction.errors
            pieces.append([pa.nulls(len(prediction.errors), field.type) for field in self._postprocess.fields])
            errors += prediction.errors.values()
        columns = pieces[0] if len(pieces) == 1 else [pa.concat_arrays(same) for same in zip(*pieces, strict=True)]
        if order == sorted(order):
            return columns, errors
        inverse = sorted(range(len(order)), key=order.__getitem__)
        return [column.take(pa.array(inverse)) for column in columns], [errors[index] for index in inverse]

    def _build_empty_part(self, shard: Shard) -> None:
        try:
            self._submit_commit(self._start_part(shard))
        except Exception as error:  # noqa: BLE001 - ends this attempt; the driver decides what else it affects
            self._on_result(shard.key, self._convert_error(error))

    def _submit_commit(self, part: _PartInProgress) -> None:
        """Commit a part while the next one is built. Blocks while too many commits are pending."""
        self._commit_slots.acquire()
        done = partial(self._report_commit, part.shard.key)
        self._committer.submit(partial(self._commit, part)).add_done_callback(done)

    # -- in the thread that commits ----------------------------------------------------------------------------

    def _report_commit(self, key: ShardKey, future: Future[ShardResult | BatchjobError]) -> None:
        try:
            self._on_result(key, future.result())
        finally:
            self._commit_slots.release()

    def _commit(self, part: _PartInProgress) -> ShardResult | BatchjobError:
        key, path, started = part.shard.key, part.writer.path, time.perf_counter()
        try:
            with self._step("the end of a part"):
                footer = part.close(self._metadata)
            examples = part.writer.examples
            if key.revision:
                result, examples = replace_part(self._store, key, path, footer, self._raise_if_discarded)
            else:
                result = commit_part(self._store, key, path, footer, self._raise_if_discarded)
            examples = examples if result.committed_here else {}
            return ShardResult(key, result.footer, examples, result.committed_here, result.info.etag)
        except Exception as error:  # noqa: BLE001 - ends this attempt
            return self._convert_error(error)
        finally:
            with suppress(OSError):  # the scratch folder is deleted at the end
                path.unlink(missing_ok=True)
            record_timing(self._timing_sink, "commit", started, len(part.shard.refs))

    def _convert_error(self, error: Exception) -> BatchjobError:
        return as_disk_full_error(error, self._scratch_folder) or as_batchjob_error(error)


class _PartInProgress:
    """A part that is being written: one attempt at one shard."""

    def __init__(self, scratch_folder: Path, shard: Shard, schema: pa.Schema) -> None:
        self.shard = shard
        self.attempt_id = secrets.token_hex(8)
        self.writer = PartWriter(scratch_folder / f"{shard.key.index}-{self.attempt_id}.parquet", schema)
        self.truth: Counter[str] = Counter()
        self._started = time.perf_counter()
        self._seconds: Counter[str] = Counter()

    def add_seconds(self, seconds: Mapping[str, float]) -> None:
        """Add to the seconds by stage."""
        self._seconds.update(seconds)

    def delete(self) -> None:
        """Stop writing and delete the file."""
        with suppress(OSError):
            self.writer.abandon()
        with suppress(OSError):
            self.writer.path.unlink(missing_ok=True)

    def close(self, metadata: PartMetadata) -> PartFooter:
        """Write the footer. The file is then the part, or at a retry the retried rows."""
        key, images = self.shard.key, len(self.shard.refs)
        if self.writer.rows != images:
            raise BatchjobError(f"shard {key.index} has {images} images, {self.writer.rows} rows")
        self.add_seconds({"wall": time.perf_counter() - self._started})
        footer = PartFooter(
            plan=metadata.plan_id,
            shard=key.id,
            index=key.index,
            attempt=self.attempt_id,
            revision=key.revision,
            fingerprint=metadata.fingerprint,
            model=metadata.model_digest,
            recipe=metadata.execution_config,
            rows=self.writer.rows,
            failed=self.writer.failed,
            errors=self.writer.errors,
            seconds={stage: round(seconds, 4) for stage, seconds in self._seconds.items()},
            versions={name: version(name) for name in _RECORDED_PACKAGES},
            truth=dict(self.truth),
        )
        self.writer.close(footer)
        return footer
