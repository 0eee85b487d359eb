"""The composition root of control: plan or resume, hand out shards, account, finish."""

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
    raise_nothing_to_retry,
)
from batchjob.driver.finalize import RunSummary, finalize_run
from batchjob.driver.plan_prefetcher import PlanPrefetcher
from batchjob.driver.planner import Planner
from batchjob.driver.progress import ProgressReporter
from batchjob.driver.run_state import RunState
from batchjob.errors import BatchjobError
from batchjob.job.job import Job
from batchjob.output import commit
from batchjob.output.success import delete_success, read_success
from batchjob.plan import reader
from batchjob.plan.head import PlanHead, read_current_head
from batchjob.report.plan_summary import PlanSummary
from batchjob.report.run_result import RunResult
from batchjob.sources.listing import DEFAULT_IMAGE_BYTES, SMALL_INPUT_IMAGES, InputPreview
from batchjob.storage.objects import ObjectInfo
from batchjob.storage.options import OptionsByPrefix
from batchjob.storage.store import Store, open_store
from batchjob.text import format_count
from batchjob.worker.messages import WorkerSetup

__all__ = ["discard", "make_plan", "run"]

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
    """Run a job to its end, or up to where it can go; what is committed already is not done again.

    Args:
        job: what to run.
        make_pool: makes its workers, if any are needed.
        allow_empty: an input without images is no error.
        progress: who is told how it goes.
        repair: what is gone from a finished output is made again.
        retry: images whose rows hold an error are read again, and their parts replaced.

    Raises:
        JobError: every planned ending but success; its class says which, and it carries the counts.
    """
    began = time.monotonic()
    store = open_store(job.output.uri, job.storage)
    if (outcome := find_finished_result(store, job, repair, retry)) is not None:
        return outcome
    with _in_control(store, progress, job.errors.outage_seconds) as turns:
        session = _Driver(job, _patient(job), turns, make_pool, progress, retry)
        try:
            head = session.work(allow_empty, repair)
            return session.finish(head, began)
        except BatchjobError as error:
            error.counts = session.counts
            raise


def make_plan(job: Job, *, allow_empty: bool, progress: ProgressReporter) -> PlanSummary:
    """Freeze a job's plan without running it.

    Raises:
        JobError: see `run`.
    """
    began = time.monotonic()
    store = open_store(job.output.uri, job.storage)
    with _in_control(store, progress, job.errors.outage_seconds) as turns:
        store = _patient(job)
        number, head = turns.run_blocking(lambda: read_current_head(store))
        planning = Planner(apply_plan_defaults(job, store, head), store, turns, progress.note)
        progress.start(None)
        try:
            if head is None:
                seen = planning.extend_preview(planning.preview_input(allow_empty), 0)
                RunState(store, turns.heartbeat).delete_stale_parts(turns.heartbeat)
                head = planning.freeze(number, seen, 0, 0, partial(delete_stale_parts, store))
            images, shards = _write(planning, head, turns, progress)
        finally:
            progress.stop()
            planning.close()
    return PlanSummary(head.plan, images, shards, head.shard_size, store.uri, time.monotonic() - began)


def discard(uri: str, options: OptionsByPrefix | None = None, progress: ProgressReporter | None = None) -> str:
    """Bury the plan in force and delete its parts; the next run plans anew. Returns a sentence saying what went.

    Raises:
        Temporary: a driver is at work there, or a signal came; the same command finishes what it began.
        InvalidJob: there is no plan.
    """
    store = open_store(uri, options)
    find_plan_to_discard(store)  # before the lease leaves a trace in a folder that is not ours
    with _in_control(store, progress) as turns:
        _, head = turns.run_blocking(lambda: find_plan_to_discard(store))
        turns.confirm_lease()  # who was stopped for long would bury what another driver has finished since
        turns.run_blocking(lambda: discard_current_plan(store, head))
        leftovers = turns.run_blocking(lambda: list_stale_parts(store))
        deleted = commit.delete_objects(store, leftovers, turns.heartbeat)
    name = f"plan {head.plan} (number {head.number})" if head else "an earlier plan's leftovers"
    return f"{store.uri}: discarded {name}, deleted {format_count(deleted, 'part')}"


@contextmanager
def _in_control(store: Store, progress: ProgressReporter | None, outage: float = 0.0) -> Iterator[ControlLoop]:
    """The lease on an output, and signals as requests to stop. Raises Temporary where another driver is at work."""
    with StopSignals() as drain:  # around the lease, which nobody is to leave behind
        lease = acquire_lease(store, drain, progress.note if progress else lambda text: None)
        turns = ControlLoop(lease, drain, store.uri, outage)
        try:
            yield turns
        finally:
            turns.release_lease()


def _patient(job: Job) -> Store:
    """The output once it is known to be there: an outage is waited for."""
    return open_store(job.output.uri, job.storage, outage=job.errors.outage_seconds)


def _write(planning: Planner, head: PlanHead, turns: ControlLoop, progress: ProgressReporter) -> tuple[int, int]:
    """Write a plan to its end; its images and shards."""
    images = shards = 0
    feeder = PlanPrefetcher(planning.iter_chunks(head))
    try:
        while not feeder.finished:
            turns.heartbeat()
            if (chunk := feeder.next_chunk(TICK_SECONDS)) is not None:
                images, shards = chunk.end_cursor.rows, shards + len(chunk.shards)
                progress.set_planned(images, chunk.is_last)
    finally:
        feeder.close()
    return images, shards


class _Driver:
    """One driver's work on one job, under the lease."""

    def __init__(
        self, job: Job, store: Store, turns: ControlLoop, make_pool: MakePool, progress: ProgressReporter, retry: bool
    ) -> None:
        self._books = RunState(
            store, turns.heartbeat, retry
        )  # before the look at the plan: what it finds is of no later one
        self._number, self._resumed = turns.run_blocking(lambda: read_current_head(store))
        self._job = apply_plan_defaults(job, store, self._resumed)
        self._store, self._turns, self._progress = store, turns, progress
        self._planning = Planner(self._job, store, turns, progress.note)
        self._dispatch = Dispatcher(job.errors.attempts, make_pool, progress, self._books.record_commit)
        self._dispatch.on_starting = turns.install_signal_handlers
        turns.collect_events, turns.on_stop = (
            self._dispatch.collect_events,
            lambda: self._dispatch.drain(turns.heartbeat),
        )
        self._stopped_early = False
        self._retry = retry
        self._success: ObjectInfo | None = None  # as a retry or a repair has found it

    @property
    def counts(self) -> tuple[int, int, int]:
        """Images planned so far, rows predicted, rows failed."""
        return self._books.counts

    def work(self, allow_empty: bool, repair: bool) -> PlanHead:
        """Plan or resume, and do every shard that is left; the plan's head."""
        self._progress.start(None)
        try:
            head = self._resumed or (
                raise_nothing_to_retry(self._store) if self._retry else self._new_plan(allow_empty)
            )
            if self._resumed:
                self._look_back(head, repair)
            feeder = PlanPrefetcher(self._planning.iter_chunks(head))
            try:
                self._loop(feeder, head)
            finally:
                feeder.close()
            return head
        finally:
            self._progress.stop()
            self._planning.close()
            self._dispatch.close()

    def finish(self, head: PlanHead, began: float) -> RunResult:
        """Verify what lies there against the plan, write the report, and `_SUCCESS` when the budget holds."""
        books = self._books
        ran = RunSummary(
            books.expected_rows,
            books.new_parts,
            tuple(self._dispatch.scheduler.given_up),
            tuple(self._dispatch.workers),
            time.monotonic() - began,
            books.existing_parts,
            books.plan_complete,
            self._stopped_early,
        )
        job, beat = self._job, self._turns.heartbeat
        self._turns.confirm_lease()  # who has slept through another driver's work is not the one to say how it ended
        return finalize_run(
            self._store, head, ran, budget=job.errors, summarize=job.task.compute_metrics, heartbeat=beat
        )

    def _new_plan(self, allow_empty: bool) -> PlanHead:
        """Freeze a plan, but only once the input is known to be there and the model to stand on its device."""
        few = self._planning.preview_input(allow_empty)
        self._start_workers(few)
        seen = self._planning.extend_preview(few, self._dispatch.pool_size)
        while not (workers := self._dispatch.workers):
            self._turns.tick()
        seen = self._planning.extend_preview(
            seen, self._dispatch.pool_size
        )  # how many they are may have shown only now
        self._planning.check_columns(name for loaded in workers for name in loaded.columns)
        self._books.delete_stale_parts(self._turns.heartbeat)
        row_bytes = max(loaded.row_bytes for loaded in workers)
        clear = partial(delete_stale_parts, self._store)  # what a worker of a discarded plan has put there since
        return self._planning.freeze(self._number, seen, self._dispatch.pool_size, row_bytes, clear)

    def _look_back(self, head: PlanHead, repair: bool) -> None:
        self._progress.note(f"resuming plan {head.plan}: {format_count(self._books.part_count, 'part')} committed")
        if (repair or self._retry) and (found := self._turns.run_blocking(lambda: read_success(self._store))):
            _, self._success = found
        if repair:
            self._withdraw_success()
        self._books.read_existing_parts(head, self._turns.heartbeat)
        if self._retry:
            self._progress.note(f"to be retried: {format_count(self._books.rows_to_retry, 'error row')}")
        if self._books.failed:
            self._progress.advance(0, self._books.failed)  # of images that are counted as the plan is read

    def _loop(self, feeder: PlanPrefetcher, head: PlanHead) -> None:
        """Hand out shards until all are done or given up, or too much has failed."""
        schedule = self._dispatch.scheduler
        while not (feeder.finished and schedule.idle):
            self._absorb(feeder)
            if self._job.errors.abort_early and self._books.find_exceeded_limit(self._job.errors):
                self._stopped_early = True
                self._dispatch.drain(self._turns.heartbeat)
                return
            if schedule.waiting:
                self._hand_out(head)
            elif feeder.finished and self._dispatch.started:
                self._dispatch.speculate(head.number)
            self._turns.tick() if self._dispatch.started else self._turns.heartbeat()

    def _absorb(self, feeder: PlanPrefetcher) -> None:
        """Take in confirmed chunks as long as few shards wait; look for foreign parts once all are known."""
        schedule, all_known_before = self._dispatch.scheduler, feeder.finished
        patience = 0.0 if self._dispatch.started else TICK_SECONDS
        while schedule.waiting < _MAX_WAITING_SHARDS and (chunk := feeder.next_chunk(patience)) is not None:
            done, left = self._books.add_chunk(chunk)
            schedule.add(left)
            self._progress.set_planned(chunk.end_cursor.rows, chunk.is_last)
            self._progress.add_resumed(done)
            self._turns.heartbeat()
        if feeder.finished and not all_known_before:
            self._books.delete_stale_parts(self._turns.heartbeat)

    def _hand_out(self, head: PlanHead) -> None:
        if not self._dispatch.started:
            first = self._turns.run_blocking(
                lambda: reader.PlanReader(self._store, head).read_first_refs(SMALL_INPUT_IMAGES + 1)
            )
            sample = tuple(ref.location for ref in first[:SMALL_INPUT_IMAGES])
            size = sum(DEFAULT_IMAGE_BYTES if ref.size is None else ref.size for ref in first)
            self._start_workers(InputPreview(len(first), len(first) <= SMALL_INPUT_IMAGES, sample, image_bytes=size))
        if self._dispatch.workers:
            self._withdraw_success()
            self._dispatch.dispatch(head.number)

    def _withdraw_success(self) -> None:
        """Before the first part is replaced or made anew; at a retry not before somebody stands ready to do it."""
        if self._success is not None:
            version, self._success = self._success.version or "", None
            self._turns.confirm_lease()  # so that what was read before is no later driver's
            self._turns.run_blocking(lambda: delete_success(self._store, version))

    def _start_workers(self, seen: InputPreview) -> None:
        job, few_bytes = self._job, seen.image_bytes if seen.complete else None
        self._dispatch.start(
            WorkerSetup(job.serialize(), str(job.folder), self._turns.visibility_check, seen.sample, few_bytes)
        )
