"""The door for Python and for the command line: picks the pool, calls the driver."""

from __future__ import annotations

import os
from typing import TYPE_CHECKING

from batchjob import system
from batchjob.driver import driver
from batchjob.driver.dispatcher import MakePool
from batchjob.driver.existing_output import check_fingerprint
from batchjob.driver.planner import check_columns, choose_shard_size, no_images_error
from batchjob.driver.progress import NoProgress, ProgressReporter
from batchjob.job.job import Job
from batchjob.output import commit
from batchjob.plan.head import PlanHead, read_current_head
from batchjob.pool.pool import Pool
from batchjob.report.run_result import PlanSummary, RunResult
from batchjob.sources.listing import SMALL_INPUT_IMAGES, InputPreview, SourceListing, preview_listing
from batchjob.storage.reader import Reader
from batchjob.storage.store import Store, open_store
from batchjob.text import format_count
from batchjob.worker.messages import WorkerInfo, WorkerSetup

if TYPE_CHECKING:
    from batchjob.inference.convert import ConversionOptions, ConversionResult

__all__ = ["convert", "make_plan", "make_pool", "retry", "run", "validate"]


def run(
    job: Job,
    *,
    address: str | None = None,
    allow_empty: bool = False,
    repair: bool = False,
    progress: ProgressReporter | None = None,
) -> RunResult:
    """Run a job to its end, resuming what was begun; a finished job is left as it is.

    Args:
        job: what to run, and whether on Ray or in this process (`runtime.pool`).
        address: of a Ray cluster; else `RAY_ADDRESS`; else a Ray is started here for the time of the run.
        allow_empty: an input without images makes one part of no rows, and is no error.
        repair: parts that are gone from a finished output are made again, which else is an error.
        progress: who is told how it goes; nobody by default.

    Raises:
        JobError: whatever ends the job before its sums; its class says which, and carries the exit code.
    """
    told = progress or NoProgress()
    return driver.run(job, _pools(job, address), allow_empty=allow_empty, progress=told, repair=repair)


def retry(job: Job, *, address: str | None = None, progress: ProgressReporter | None = None) -> RunResult:
    """Read the images again whose rows hold an error, as they are by now, and replace their rows; do what is missing.

    `_SUCCESS` is gone from the first replaced part on until the last one. Rows that worked stay as they are. A retry
    that was stopped goes on when it is called again, or is brought to its end by `run`, which retries no further row.

    Args:
        job: as it was run.
        address: see `run`.
        progress: see `run`.

    Raises:
        InvalidJob: nothing has been run there yet.
        JobError: see `run`.
    """
    return driver.run(job, _pools(job, address), allow_empty=True, progress=progress or NoProgress(), retry=True)


def make_plan(job: Job, *, allow_empty: bool = False, progress: ProgressReporter | None = None) -> PlanSummary:
    """Freeze a job's plan without running it; `run` then starts from it. Needs neither torch nor Ray.

    Raises:
        JobError: see `run`.
    """
    return driver.plan_only(job, allow_empty=allow_empty, progress=progress or NoProgress())


def validate(job: Job) -> list[str]:
    """Check a job as far as it goes without writing anything: input, model, labels, device, output. Lines for a person.

    Raises:
        JobError: the first thing that does not hold; Temporary where the input is not there yet (`input.require`).
    """
    store = open_store(job.output.uri, job.storage)
    _, head = read_current_head(store)
    if head is not None:
        check_fingerprint(store, job, head)
        job = job.with_defaults(head.defaults)
    source = SourceListing(job.input, Reader(job.storage), job.output.uri)
    source.check_requirements()
    check_columns(job, source)
    seen = preview_listing(source, SMALL_INPUT_IMAGES)
    if head is None and not seen.rows:
        raise no_images_error(job)
    loaded = _load(job, seen)
    check_columns(job, source, loaded.columns)
    if head is None:
        choose_shard_size(job, seen, 0, loaded.row_bytes)
    return [
        f"input     {job.input.uri}: {'' if seen.complete else 'more than '}{format_count(seen.rows, 'image')}",
        f"model     {loaded.model} on {loaded.device}, {loaded.precision}, in {loaded.seconds:.1f} s",
        f"columns   {', '.join(loaded.columns)}",
        f"output    {store.uri}: {_stand(store, head)}",
    ]


def convert(job: Job, options: ConversionOptions) -> ConversionResult:
    """Write a job's model as another format, compared with the original on the job's first images.

    Raises:
        InvalidJob: The model cannot be converted, a package is missing, or the file's folder does not exist.
        CheckFailed: The outputs differ by more than the tolerance; no file is left.
        Unavailable: A store cannot be reached.
    """
    from batchjob.inference.convert import convert_model

    listing = SourceListing(job.input, Reader(job.storage), job.output.uri)
    return convert_model(job, options, preview_listing(listing, options.images).sample)


def _load(job: Job, seen: InputPreview) -> WorkerInfo:
    from batchjob.worker.worker import Worker

    worker = Worker(
        job, WorkerSetup(job.serialize(), str(job.folder), None, seen.sample, small_input_bytes=0), _cores(job)
    )
    try:
        return worker.load()
    finally:
        worker.close()


def _stand(store: Store, head: PlanHead | None) -> str:
    """What a run would find there."""
    parts = len(commit.list_parts(store))
    if head is not None:
        return f"plan {head.plan} of this job, {format_count(parts, 'part')} committed"
    return "to be planned" if not parts else f"to be planned, {format_count(parts, 'part')} of no plan in the way"


def _pools(job: Job, address: str | None) -> MakePool:
    """What makes the job's workers, on that cluster or where the environment says."""
    where = address or os.environ.get("RAY_ADDRESS") or None
    return lambda: make_pool(job, where)


def make_pool(job: Job, address: str | None) -> Pool:
    """The pool that `runtime.pool` asks for."""
    if job.runtime.pool == "local":
        from batchjob.pool.local_pool import LocalPool

        return LocalPool(_cores(job))
    from batchjob.pool.ray_pool import RayPool

    return RayPool(job, None if address == "local" else address)


def _cores(job: Job) -> int:
    asked = job.runtime.cpus_per_worker
    return system.available_cores() if asked == "auto" else max(1, int(asked))
