"""Driver of a run: plan or resume, dispatch shards to workers, account for commits, finish; also plan and discard."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from functools import partial

from batchjob.concurrency import run_in_background
from batchjob.driver.control_loop import TICK_SECONDS, ControlLoop, StopSignals, acquire_lease
from batchjob.driver.dispatcher import MakePool
from batchjob.driver.existing_output import (
    apply_plan_defaults,
    check_fingerprint,
    delete_stale_parts,
    discard_current_plan,
    find_finished_result,
    find_plan_to_discard,
    list_stale_parts,
)
from batchjob.driver.input_check import compare_input
from batchjob.driver.job_run import JobRun, RunOptions
from batchjob.driver.plan_prefetcher import PlanPrefetcher
from batchjob.driver.planner import Planner
from batchjob.driver.progress import NoProgress, ProgressReporter
from batchjob.driver.run_state import RunState
from batchjob.errors import BatchjobError, InvalidJob
from batchjob.job.job import Job
from batchjob.output.commit import delete_objects
from batchjob.plan.chunks import read_chunks
from batchjob.plan.head import PlanHead, read_current_head
from batchjob.plan.reader import PlanReader
from batchjob.report.plan_summary import PlanSummary
from batchjob.report.run_result import RunResult
from batchjob.sources.listing import SourceListing
from batchjob.storage.options import OptionsByPrefix
from batchjob.storage.reader import Reader
from batchjob.storage.store import Store, open_store
from batchjob.text import format_count
from batchjob.types import Cursor

__all__ = ["discard", "make_plan", "run"]


def run(
    job: Job,
    make_pool: MakePool,
    *,
    allow_empty: bool,
    progress: ProgressReporter,
    repair: bool = False,
    retry: bool = False,
    fresh: bool = False,
    check_input: bool = False,
) -> RunResult:
    """Run a job to its end, or as far as it can go. What is committed already is not done again.

    Args:
        job: The job.
        make_pool: Makes the worker pool; called only if there is work for it.
        allow_empty: Accept an input without images.
        progress: Gets counts and lines for the user.
        repair: Make parts again that are missing from a finished output.
        retry: Read the images of error rows again, and replace their parts.
        fresh: Discard a finished output, or another job's; an unfinished plan of this very job is resumed.
        check_input: List the input of a plan that was made before again, once its rows are there, and compare.

    Raises:
        BatchjobError: Every planned ending but success. Its class gives the exit code, and it carries the counts.
    """
    started = time.monotonic()
    options = RunOptions(allow_empty, repair, retry, fresh)
    if fresh and (repair or retry or check_input):
        raise InvalidJob(
            "--fresh makes every row anew; --repair, --check-input and `retry` keep what is there: give one of them"
        )
    store = open_store(job.output.uri, job.storage)
    result, is_resumed = None if fresh else find_finished_result(store, job, repair, retry), True
    if result is None:
        with _hold_lease(store, progress, job.errors.outage_seconds) as control_loop:
            driver = JobRun(job, _open_outage_tolerant_store(job), control_loop, make_pool, progress, options)
            try:
                head = driver.run_shards()
                result, is_resumed = driver.finalize(head, started), driver.is_resumed
            except BatchjobError as error:
                error.counts = driver.counts
                raise
    # A plan that was made just now lists what is there now.
    if check_input and is_resumed and result.exit_code == 0:
        return _check_input(store, job, result, progress)
    return result


def _check_input(store: Store, job: Job, result: RunResult, progress: ProgressReporter) -> RunResult:
    """List the input again and compare it with the plan; raise InvalidJob if it has changed."""
    _, head = read_current_head(store)
    assert head is not None
    progress.note(f"listing {job.input.uri} again, to compare it with plan {head.plan}")
    # A plan of an earlier version was listed by that version's rules.
    planned_job = apply_plan_defaults(job, store, head)
    listing = SourceListing(planned_job.input, Reader(planned_job.storage), planned_job.output.uri)
    reader = PlanReader(store, head)
    with StopSignals() as signals:
        difference = run_in_background(
            lambda: compare_input(reader.iterate_chunks, lambda: listing.refs(Cursor())),
            lambda: signals.raise_if_stopping(store.uri),
        )
    if not difference:
        text = "the input was listed again, and has the images of the plan and no others"
        return replace(result, message=f"{result.describe_counts()}; {text}")
    error = InvalidJob(
        f"{store.uri} is complete, but input.uri {job.input.uri} has changed since its plan was made "
        f"({head.created}): {difference.describe()}; `batchjob run --fresh` makes all rows anew, or choose another "
        "output.uri"
    )
    error.counts = result.planned, result.predicted, result.failed
    raise error


def make_plan(job: Job, *, allow_empty: bool, progress: ProgressReporter) -> PlanSummary:
    """Write the plan of a job without running it; finish a plan that is there, and write nothing if it is complete.

    Args:
        job: The job.
        allow_empty: Accept an input without images.
        progress: Gets counts and lines for the user.

    Raises:
        BatchjobError: See `run`.
    """
    started = time.monotonic()
    store = open_store(job.output.uri, job.storage)
    if (summary := _find_complete_plan(store, job, started)) is not None:
        return summary
    with _hold_lease(store, progress, job.errors.outage_seconds) as control_loop:
        store = _open_outage_tolerant_store(job)
        number, head = control_loop.run_blocking(lambda: read_current_head(store))
        planner = Planner(apply_plan_defaults(job, store, head), store, control_loop, progress.note)
        progress.start(None)
        try:
            if head is None:
                preview = planner.extend_preview(planner.preview_input(allow_empty), 0)
                RunState(store, control_loop.heartbeat).delete_stale_parts(control_loop.heartbeat)
                head = planner.freeze(number, preview, 0, partial(delete_stale_parts, store))
            images, shards = _write_chunks(planner, head, control_loop, progress)
        finally:
            progress.stop()
            planner.close()
    return PlanSummary(head.plan, images, shards, head.shard_size, store.uri, time.monotonic() - started, head.created)


def discard(uri: str, options: OptionsByPrefix | None = None) -> str:
    """Discard the plan in force and delete its parts; the next run makes a new plan.

    Args:
        uri: URI of the output.
        options: Storage options by URI prefix.

    Returns:
        A sentence that tells what was deleted.

    Raises:
        InvalidJob: There is no plan.
        Temporary: A driver is at work there, or a stop signal came; the same command finishes the discard.
    """
    store = open_store(uri, options)
    # Checked before the lease, which would leave a trace in a folder that is not ours.
    find_plan_to_discard(store)
    with _hold_lease(store, NoProgress()) as control_loop:
        head = control_loop.run_blocking(lambda: find_plan_to_discard(store))
        # A driver that was suspended may have lost its lease, and would discard what another one has finished since.
        control_loop.confirm_lease()
        control_loop.run_blocking(lambda: discard_current_plan(store, head))
        stale_parts = control_loop.run_blocking(lambda: list_stale_parts(store))
        deleted = delete_objects(store, stale_parts, control_loop.heartbeat)
    name = f"plan {head.plan} (number {head.number})" if head else "an earlier plan's leftovers"
    return f"{store.uri}: discarded {name}, deleted {format_count(deleted, 'part')}"


def _find_complete_plan(store: Store, job: Job, started: float) -> PlanSummary | None:
    """Return the summary of a plan that needs no work, without taking the lease; None if there is no such plan."""
    _, head = read_current_head(store)
    if head is None:
        return None
    check_fingerprint(store, job, head)
    images = shards = 0
    is_complete = False
    for chunk in read_chunks(store, head):
        images, shards, is_complete = chunk.end_cursor.rows, shards + len(chunk.shards), chunk.is_last
    if not is_complete:
        return None
    seconds = time.monotonic() - started
    return PlanSummary(head.plan, images, shards, head.shard_size, store.uri, seconds, head.created, written=False)


@contextmanager
def _hold_lease(store: Store, progress: ProgressReporter, outage_seconds: float = 0.0) -> Iterator[ControlLoop]:
    """Hold the lease on an output and catch stop signals; raise Temporary if another driver is at work."""
    # The signals are caught first, so that none can leave a lease behind.
    with StopSignals() as signals:
        lease = acquire_lease(store, signals, progress.note)
        control_loop = ControlLoop(lease, signals, store.uri, outage_seconds, progress.note)
        try:
            yield control_loop
        finally:
            # A job that was refused before its plan leaves the output as it was.
            control_loop.release_lease(lambda: read_current_head(store) == (0, None))


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
