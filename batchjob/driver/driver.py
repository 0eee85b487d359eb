"""Driver of a run: plan or resume, dispatch shards to workers, account for commits, finish; also plan and discard."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial

from batchjob.driver.control_loop import TICK_SECONDS, ControlLoop, StopSignals, acquire_lease
from batchjob.driver.dispatcher import Dispatcher, MakePool
from batchjob.driver.existing_output import (
    apply_plan_defaults,
    delete_stale_parts,
    discard_current_plan,
    find_finished_result,
    find_plan_to_discard,
    list_stale_parts,
    no_plan_to_retry_error,
)
from batchjob.driver.finalize import RunSummary, finalize_run
from batchjob.driver.plan_prefetcher import PlanPrefetcher
from batchjob.driver.planner import Planner
from batchjob.driver.progress import ProgressReporter
from batchjob.driver.run_state import RunState
from batchjob.errors import BatchjobError
from batchjob.job.job import Job
from batchjob.output.commit import delete_objects
from batchjob.output.success import delete_success, read_success
from batchjob.plan.head import PlanHead, read_current_head
from batchjob.plan.reader import PlanReader
from batchjob.report.plan_summary import PlanSummary
from batchjob.report.run_result import RunResult
from batchjob.sources.listing import DEFAULT_IMAGE_BYTES, SMALL_INPUT_IMAGES, InputPreview
from batchjob.storage.options import OptionsByPrefix
from batchjob.storage.store import Store, open_store
from batchjob.text import format_count
from batchjob.worker.messages import WorkerSetup

__all__ = ["discard", "make_plan", "run"]

# While this many shards wait, no further chunk of the plan is taken in: the driver's memory stays bounded.
_MAX_WAITING_SHARDS = 10_000


def run(
    job: Job,
    make_pool: MakePool,
    *,
    allow_empty: bool,
    progress: ProgressReporter,
    repair: bool = False,
    retry: bool = False,
) -> RunResult:
    """Run a job to its end, or as far as it can go. What is committed already is not done again.

    Args:
        job: The job.
        make_pool: Makes the worker pool; called only if there is work for it.
        allow_empty: Accept an input without images.
        progress: Gets counts and lines for the user.
        repair: Make parts again that are missing from a finished output.
        retry: Read the images of error rows again, and replace their parts.

    Raises:
        BatchjobError: Every planned ending but success. Its class gives the exit code, and it carries the counts.
    """
    started = time.monotonic()
    store = open_store(job.output.uri, job.storage)
    if (result := find_finished_result(store, job, repair, retry)) is not None:
        return result
    with _hold_lease(store, progress, job.errors.outage_seconds) as control_loop:
        driver = _Driver(job, _open_outage_tolerant_store(job), control_loop, make_pool, progress, retry)
        try:
            head = driver.run_shards(allow_empty, repair)
            return driver.finalize(head, started)
        except BatchjobError as error:
            error.counts = driver.counts
            raise


def make_plan(job: Job, *, allow_empty: bool, progress: ProgressReporter) -> PlanSummary:
    """Write the plan of a job without running it; finish the plan if it is there.

    Args:
        job: The job.
        allow_empty: Accept an input without images.
        progress: Gets counts and lines for the user.

    Raises:
        BatchjobError: See `run`.
    """
    started = time.monotonic()
    store = open_store(job.output.uri, job.storage)
    with _hold_lease(store, progress, job.errors.outage_seconds) as control_loop:
        store = _open_outage_tolerant_store(job)
        number, head = control_loop.run_blocking(lambda: read_current_head(store))
        planner = Planner(apply_plan_defaults(job, store, head), store, control_loop, progress.note)
        progress.start(None)
        try:
            if head is None:
                preview = planner.extend_preview(planner.preview_input(allow_empty), 0)
                RunState(store, control_loop.heartbeat).delete_stale_parts(control_loop.heartbeat)
                head = planner.freeze(number, preview, 0, 0, partial(delete_stale_parts, store))
            images, shards = _write_chunks(planner, head, control_loop, progress)
        finally:
            progress.stop()
            planner.close()
    return PlanSummary(head.plan, images, shards, head.shard_size, store.uri, time.monotonic() - started)


def discard(uri: str, options: OptionsByPrefix | None = None, progress: ProgressReporter | None = None) -> str:
    """Discard the plan in force and delete its parts; the next run makes a new plan.

    Args:
        uri: URI of the output.
        options: Storage options by URI prefix.
        progress: Gets lines for the user; None for no output.

    Returns:
        A sentence that tells what was deleted.

    Raises:
        InvalidJob: There is no plan.
        Temporary: A driver is at work there, or a stop signal came; the same command finishes the discard.
    """
    store = open_store(uri, options)
    # Checked before the lease, which would leave a trace in a folder that is not ours.
    find_plan_to_discard(store)
    with _hold_lease(store, progress) as control_loop:
        head = control_loop.run_blocking(lambda: find_plan_to_discard(store))
        # A driver that was suspended may have lost its lease, and would discard what another one has finished since.
        control_loop.confirm_lease()
        control_loop.run_blocking(lambda: discard_current_plan(store, head))
        stale_parts = control_loop.run_blocking(lambda: list_stale_parts(store))
        deleted = delete_objects(store, stale_parts, control_loop.heartbeat)
    name = f"plan {head.plan} (number {head.number})" if head else "an earlier plan's leftovers"
    return f"{store.uri}: discarded {name}, deleted {format_count(deleted, 'part')}"


@contextmanager
def _hold_lease(store: Store, progress: ProgressReporter | None, outage_seconds: float = 0.0) -> Iterator[ControlLoop]:
    """Hold the lease on an output and catch stop signals; raise Temporary if another driver is at work."""
    # The signals are caught first, so that none can leave a lease behind.
    with StopSignals() as signals:
        note = progress.note if progress else lambda text: None
        control_loop = ControlLoop(acquire_lease(store, signals, note), signals, store.uri, outage_seconds, note)
        try:
            yield control_loop
        finally:
            control_loop.release_lease()


def _open_outage_tolerant_store(job: Job) -> Store:
    """Open the output so that outages are waited out, now that it is known to be there."""
    return open_store(job.output.uri, job.storage, outage=job.errors.outage_seconds)


def _write_chunks(
    planner: Planner, head: PlanHead, control_loop: ControlLoop, progress: ProgressReporter
) -> tuple[int, int]:
    """Write the rest of a plan; return its images and shards."""
    images = shards = 0
    prefetcher = PlanPrefetcher(planner.iter_chunks(head))
    try:
        while not prefetcher.finished:
            control_loop.heartbeat()
            if (chunk := prefetcher.next_chunk(TICK_SECONDS)) is not None:
                images, shards = chunk.end_cursor.rows, shards + len(chunk.shards)
                progress.set_planned(images, chunk.is_last)
    finally:
        prefetcher.close()
    return images, shards


class _Driver:
    """Work of one driver on one job while it holds the lease."""

    def __init__(
        self,
        job: Job,
        store: Store,
        control_loop: ControlLoop,
        make_pool: MakePool,
        progress: ProgressReporter,
        retry: bool,
    ) -> None:
        # The parts are listed before the plan is read, so that none of them can be of a later plan.
        self._state = RunState(store, control_loop.heartbeat, retry)
        self._plan_number, self._resumed_head = control_loop.run_blocking(lambda: read_current_head(store))
        self._job = apply_plan_defaults(job, store, self._resumed_head)
        self._store, self._control_loop, self._progress = store, control_loop, progress
        self._planner = Planner(self._job, store, control_loop, progress.note)
        self._dispatcher = Dispatcher(job.errors.attempts, make_pool, progress, self._state.record_commit)
        self._dispatcher.on_starting = control_loop.install_signal_handlers
        control_loop.collect_events = self._dispatcher.collect_events
        control_loop.on_stop = lambda: self._dispatcher.drain(control_loop.heartbeat)
        self._stopped_early = False
        self._retry = retry
        self._success_version: str | None = None  # of the `_SUCCESS` that a retry or a repair has found

    @property
    def counts(self) -> tuple[int, int, int]:
        """Images planned so far, rows predicted, error rows."""
        return self._state.counts

    def run_shards(self, allow_empty: bool, repair: bool) -> PlanHead:
        """Make or resume the plan and do every shard that is left; return the head of the plan."""
        self._progress.start(None)
        try:
            if self._resumed_head is not None:
                head = self._resumed_head
                self._resume(head, repair)
            elif self._retry:
                raise no_plan_to_retry_error(self._store)
            else:
                head = self._make_plan(allow_empty)
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
        )
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

    def _make_plan(self, allow_empty: bool) -> PlanHead:
        """Freeze a plan, but only once the input is known to be there and a worker has loaded the model."""
        preview = self._planner.preview_input(allow_empty)
        self._start_workers(preview)
        preview = self._planner.extend_preview(preview, self._dispatcher.pool_size)
        while not (workers := self._dispatcher.workers):
            self._control_loop.tick()
        # The number of workers may be known only now.
        preview = self._planner.extend_preview(preview, self._dispatcher.pool_size)
        self._planner.check_columns(name for worker in workers for name in worker.columns)
        self._state.delete_stale_parts(self._control_loop.heartbeat)
        row_bytes = max(worker.row_bytes for worker in workers)
        # A worker of a discarded plan may commit a part even now.
        delete_stale = partial(delete_stale_parts, self._store)
        return self._planner.freeze(self._plan_number, preview, self._dispatcher.pool_size, row_bytes, delete_stale)

    def _resume(self, head: PlanHead, repair: bool) -> None:
        self._progress.note(f"resuming plan {head.plan}: {format_count(self._state.part_count, 'part')} committed")
        if (repair or self._retry) and (found := self._control_loop.run_blocking(lambda: read_success(self._store))):
            _, info = found
            self._success_version = info.version or ""
        if repair:
            self._delete_success()
        self._state.read_existing_parts(head, self._control_loop.heartbeat)
        if self._retry:
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

    def _delete_success(self) -> None:
        """Delete `_SUCCESS` before the first part is replaced or made again; a retry does so once a worker is ready."""
        if self._success_version is not None:
            version, self._success_version = self._success_version, None
            # The lease shows that the `_SUCCESS` read before is no later driver's.
            self._control_loop.confirm_lease()
            self._control_loop.run_blocking(lambda: delete_success(self._store, version))

    def _start_workers(self, preview: InputPreview) -> None:
        self._dispatcher.start(
            WorkerSetup(
                job=self._job.serialize(),
                job_folder=str(self._job.folder),
                visibility_check=self._control_loop.visibility_check,
                sample=preview.sample,
                small_input_bytes=preview.image_bytes if preview.complete else None,
            )
        )
