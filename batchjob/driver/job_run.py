"""Run of a job by the driver that holds the lease: plan or resume, dispatch shards, account for commits, finish."""

from __future__ import annotations

import time
from collections.abc import Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any

from batchjob.driver.control_loop import TICK_SECONDS, ControlLoop
from batchjob.driver.dispatcher import Dispatcher, MakePool
from batchjob.driver.existing_output import (
    apply_plan_defaults,
    delete_stale_parts,
    discard_current_plan,
    is_to_be_replaced,
    no_plan_to_retry_error,
)
from batchjob.driver.finalize import RunSummary, finalize_run
from batchjob.driver.job_files import FileRecorder, JobFiles, check_files, has_record
from batchjob.driver.plan_prefetcher import PlanPrefetcher
from batchjob.driver.planner import Planner
from batchjob.driver.progress import ProgressReporter
from batchjob.driver.run_state import RunState
from batchjob.job.job import Job
from batchjob.output.success import delete_success, read_accepted_failures, read_success, record_acceptance
from batchjob.plan.contract import read_contract
from batchjob.plan.head import PlanHead, read_current_head
from batchjob.plan.reader import PlanReader
from batchjob.report.run_result import RunResult
from batchjob.sources.listing import DEFAULT_IMAGE_BYTES, SMALL_INPUT_IMAGES, InputPreview
from batchjob.storage.store import Store
from batchjob.text import format_count
from batchjob.worker.messages import WorkerSetup

__all__ = ["JobRun", "RunOptions"]

# While this many shards wait, no further chunk of the plan is taken in: the driver's memory stays bounded.
_MAX_WAITING_SHARDS = 10_000


@dataclass(frozen=True)
class RunOptions:
    """Options of one run, which are no part of the job.

    Attributes:
        allow_empty: Accept an input without images.
        repair: Make parts again that are missing from a finished output.
        retry: Read the images of error rows again, and replace their parts.
        fresh: Discard a finished output, or another job's; an unfinished plan of this very job is resumed.
    """

    allow_empty: bool
    repair: bool = False
    retry: bool = False
    fresh: bool = False


class JobRun:
    """Work of one driver on one job while it holds the lease."""

    def __init__(
        self,
        job: Job,
        store: Store,
        control_loop: ControlLoop,
        make_pool: MakePool,
        progress: ProgressReporter,
        options: RunOptions,
    ) -> None:
        # The parts are listed before the plan is read, so that none of them can be of a later plan.
        self._state = RunState(store, control_loop.heartbeat, options.retry)
        self._plan_number, head = control_loop.run_blocking(lambda: read_current_head(store))
        self._replaced_head: PlanHead | None = None  # of the plan that a fresh run discards
        if head is not None and options.fresh:
            is_replaced = control_loop.run_blocking(partial(is_to_be_replaced, store, job, head))
            if is_replaced:
                self._replaced_head, head, self._plan_number = head, None, self._plan_number + 1
        self._resumed_head = head
        self._job = apply_plan_defaults(job, store, head)
        self._store, self._control_loop, self._progress = store, control_loop, progress
        self._planner = Planner(self._job, store, control_loop, progress.note)
        self._dispatcher = Dispatcher(job.errors.attempts, make_pool, progress, self._state.record_commit)
        self._dispatcher.on_starting = control_loop.signals.install  # again, since Ray replaces the handlers
        control_loop.collect_events = self._dispatcher.collect_events
        control_loop.on_stop = lambda: self._dispatcher.drain(control_loop.heartbeat)
        self._stopped_early = False
        self._files = JobFiles(self._job)
        self._file_recorder = FileRecorder(self._files)
        self._options = options
        # The `_SUCCESS` that a retry or a repair has found, and its version.
        self._success: tuple[Mapping[str, Any], str] | None = None

    @property
    def counts(self) -> tuple[int, int, int]:
        """Images planned so far, rows predicted, error rows."""
        return self._state.counts

    @property
    def is_resumed(self) -> bool:
        """True if the plan was there before this run."""
        return self._resumed_head is not None

    def run_shards(self) -> PlanHead:
        """Make or resume the plan and do every shard that is left; return the head of the plan."""
        self._progress.start(None)
        try:
            if self._resumed_head is not None:
                head = self._resumed_head
                self._resume(head)
            elif self._options.retry:
                raise no_plan_to_retry_error(self._store, self._plan_number)
            else:
                head = self._make_plan()
            prefetcher = PlanPrefetcher(self._planner.iter_chunks(head))
            try:
                self._process_chunks(prefetcher, head)
            finally:
                prefetcher.close()
            return head
        finally:
            self._progress.stop()
            self._planner.close()
            self._dispatcher.close()

    def finalize(self, head: PlanHead, started: float) -> RunResult:
        """Check the output against the plan and write the report; write `_SUCCESS` if the budget holds.

        Args:
            head: Head of the plan.
            started: Time at which the run started, by `time.monotonic`.
        """
        state = self._state
        summary = RunSummary(
            expected_rows=state.expected_rows,
            new_parts=state.new_parts,
            given_up=tuple(self._dispatcher.scheduler.given_up),
            workers=tuple(self._dispatcher.workers),
            seconds=time.monotonic() - started,
            existing_parts=state.existing_parts,
            plan_complete=state.plan_complete,
            stopped_early=self._stopped_early,
            accepted_failures=state.accepted_failures,
        )
        self._file_recorder.put(self._store, head, self._control_loop.heartbeat)
        # A driver that was suspended may have lost its lease, and must not write the result then.
        self._control_loop.confirm_lease()
        return finalize_run(
            self._store,
            head,
            summary,
            budget=self._job.errors,
            summarize=self._job.task.compute_metrics,
            heartbeat=self._control_loop.heartbeat,
        )

    def _make_plan(self) -> PlanHead:
        """Freeze a plan, but only once the input is known to be there and a worker has loaded the model."""
        preview = self._planner.preview_input(self._options.allow_empty)
        # Foreign parts are told before a model is loaded, and before a plan that is replaced is discarded.
        self._state.check_parts(self._replaced_head, self._control_loop.heartbeat)
        self._start_workers(preview)
        preview = self._planner.extend_preview(preview, self._dispatcher.pool_size)
        while not (workers := self._dispatcher.workers):
            self._control_loop.tick()
        # The number of workers may be known only now.
        preview = self._planner.extend_preview(preview, self._dispatcher.pool_size)
        self._planner.check_columns(name for worker in workers for name in worker.columns)
        self._discard_replaced_plan()
        self._state.delete_stale_parts(self._control_loop.heartbeat)
        # A worker of a discarded plan may commit a part even now.
        delete_stale = partial(delete_stale_parts, self._store)
        return self._planner.freeze(self._plan_number, preview, self._dispatcher.pool_size, delete_stale)

    def _discard_replaced_plan(self) -> None:
        """Discard the plan that a fresh run replaces, now that nothing but a kill can keep the new one from being made.

        kill before the tombstone    the old output is as it was; the same command begins again
        kill after the tombstone     there is no plan; any run deletes the parts left over and makes the next plan
        kill after the new head      the plan is this job's and unfinished; the same command resumes it
        """
        if (head := self._replaced_head) is not None:
            # A driver that was suspended may have lost its lease, and would discard what another one has finished.
            self._control_loop.confirm_lease()
            self._control_loop.run_blocking(lambda: discard_current_plan(self._store, head))
            self._progress.note(f"discarded plan {head.plan} (number {head.number}), to begin anew")

    def _resume(self, head: PlanHead) -> None:
        self._control_loop.run_blocking(lambda: check_files(self._store, head, self._files, with_input=False))
        if self._control_loop.run_blocking(lambda: has_record(self._store, head)):
            self._file_recorder.skip()
        self._progress.note(f"resuming plan {head.plan}: {format_count(self._state.part_count, 'part')} committed")
        self._state.accepted_failures = self._control_loop.run_blocking(lambda: self._read_acceptance(head))
        self._state.read_existing_parts(head, self._control_loop.heartbeat)
        if self._options.repair:
            self._delete_success()
        if self._options.retry:
            self._progress.note(f"to be retried: {format_count(self._state.rows_to_retry, 'error row')}")
        if self._state.failed:
            # Their images are counted when the plan is read.
            self._progress.advance(0, self._state.failed)

    def _process_chunks(self, prefetcher: PlanPrefetcher, head: PlanHead) -> None:
        """Dispatch shards until all are done or abandoned, or the error budget is exceeded."""
        dispatcher, scheduler = self._dispatcher, self._dispatcher.scheduler
        while not (prefetcher.finished and scheduler.idle):
            self._take_chunks(prefetcher)
            if self._job.errors.abort_early and self._state.find_exceeded_limit(self._job.errors):
                self._stopped_early = True
                dispatcher.drain(self._control_loop.heartbeat)
                return
            # A part that is there was made by a worker that has put the contract.
            if self._state.new_parts and self._file_recorder.is_ready:
                self._file_recorder.put(self._store, head, self._control_loop.heartbeat)
            if scheduler.waiting:
                self._dispatch_shards(head)
            elif prefetcher.finished:
                dispatcher.speculate(head.number)
            # Before the workers are started, taking chunks is what the driver waits for.
            self._control_loop.tick() if dispatcher.started else self._control_loop.heartbeat()

    def _take_chunks(self, prefetcher: PlanPrefetcher) -> None:
        """Take in the chunks that are ready while few shards wait; look for stale parts once all are known."""
        scheduler, was_finished = self._dispatcher.scheduler, prefetcher.finished
        timeout = 0.0 if self._dispatcher.started else TICK_SECONDS
        while scheduler.waiting < _MAX_WAITING_SHARDS and (chunk := prefetcher.next_chunk(timeout)) is not None:
            images_done, shards = self._state.add_chunk(chunk)
            scheduler.add(shards)
            self._progress.set_planned(chunk.end_cursor.rows, chunk.is_last)
            self._progress.add_resumed(images_done)
            self._control_loop.heartbeat()
        if prefetcher.finished and not was_finished:
            self._state.delete_stale_parts(self._control_loop.heartbeat)

    def _dispatch_shards(self, head: PlanHead) -> None:
        if not self._dispatcher.started:
            self._start_workers(self._preview_plan(head))
        if self._dispatcher.workers:
            self._delete_success()
            self._dispatcher.dispatch(head.number)

    def _preview_plan(self, head: PlanHead) -> InputPreview:
        """Preview the input from the plan that is resumed, without listing it again."""
        reader = PlanReader(self._store, head)
        refs = self._control_loop.run_blocking(lambda: reader.read_first_refs(SMALL_INPUT_IMAGES + 1))
        return InputPreview(
            rows=len(refs),
            complete=len(refs) <= SMALL_INPUT_IMAGES,
            sample=tuple(ref.location for ref in refs[:SMALL_INPUT_IMAGES]),
            image_bytes=sum(DEFAULT_IMAGE_BYTES if ref.size is None else ref.size for ref in refs),
        )

    def _read_acceptance(self, head: PlanHead) -> int | None:
        """Return the error rows with which the output was complete; keep the `_SUCCESS` that is to be deleted."""
        if (self._options.repair or self._options.retry) and (found := read_success(self._store)):
            summary, info = found
            self._success = summary, info.version or ""
            if summary.get("plan") == head.plan:
                failed: int = summary["counts"]["failed"]
                return failed
        return read_accepted_failures(self._store, head.plan)

    def _delete_success(self) -> None:
        """Delete `_SUCCESS` before the first part is replaced or made again; a retry does so once a worker is ready."""
        if self._success is not None:
            (summary, version), self._success = self._success, None
            # The lease shows that the `_SUCCESS` read before is no later driver's.
            self._control_loop.confirm_lease()
            if self._state.accepted_failures is not None and "counts" in summary:
                self._control_loop.run_blocking(lambda: record_acceptance(self._store, summary))
            self._control_loop.run_blocking(lambda: delete_success(self._store, version))

    def _read_decisions(self) -> Mapping[str, str]:
        contract = None if self._resumed_head is None else read_contract(self._store, self._resumed_head)
        return {} if contract is None else contract.decisions

    def _start_workers(self, preview: InputPreview) -> None:
        files_id = self._control_loop.run_blocking(lambda: self._files.id)
        # A plan that is resumed, or small, is counted by the workers themselves.
        known_images = 0 if self.is_resumed or preview.complete else self._planner.count_images()
        is_small = preview.complete and preview.rows <= SMALL_INPUT_IMAGES
        self._file_recorder.start()
        self._dispatcher.start(
            WorkerSetup(
                job=self._job.serialize(),
                job_folder=str(self._job.folder),
                visibility_check=self._control_loop.lease.visibility_check,
                sample=preview.sample,
                small_input_bytes=preview.image_bytes if is_small else None,
                known_images=known_images,
                files_id=files_id,
                decisions=self._control_loop.run_blocking(self._read_decisions),
            )
        )
