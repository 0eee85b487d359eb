"""Python API: pick the pool, call the driver. The command line calls the same functions."""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import closing
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from batchjob import system
from batchjob.driver import driver
from batchjob.driver.existing_output import check_fingerprint
from batchjob.driver.job_files import JobFiles, check_files
from batchjob.driver.planner import check_columns, choose_shard_size, no_images_error
from batchjob.driver.progress import ProgressReporter, pick_progress
from batchjob.errors import InvalidJob
from batchjob.functions.loading import find_loading_module
from batchjob.inference.conversion_options import ConversionOptions
from batchjob.job.job import Job
from batchjob.output.commit import list_parts
from batchjob.plan.contract import read_contract
from batchjob.plan.head import PlanHead, read_current_head
from batchjob.pool.pool import Pool
from batchjob.pool.ray_address import check_address
from batchjob.pool.ray_job_folder import check_submission
from batchjob.report import output_status
from batchjob.report.output_status import OutputStatus
from batchjob.report.plan_summary import PlanSummary
from batchjob.report.run_result import RunResult
from batchjob.sources.listing import SMALL_INPUT_IMAGES, InputPreview, SourceListing, draw_locations, preview_listing
from batchjob.storage.options import OptionsByPrefix
from batchjob.storage.reader import Reader
from batchjob.storage.store import Store, open_store
from batchjob.text import format_count
from batchjob.worker.loader_forkserver import start_loader_forkserver
from batchjob.worker.messages import WorkerInfo, WorkerSetup

if TYPE_CHECKING:
    from batchjob.inference.convert import ConversionResult

__all__ = ["convert", "discard", "make_plan", "make_pool", "read_errors", "retry", "run", "status", "validate"]

# An output is named by its path or URI, or by the job that writes it.
OutputLocation = str | os.PathLike[str] | Job


def run(
    job: Job,
    *,
    address: str | None = None,
    allow_empty: bool = False,
    repair: bool = False,
    fresh: bool = False,
    check_input: bool = False,
    progress: ProgressReporter | bool | None = None,
) -> RunResult:
    """Run a job to its end. Committed shards are not computed again; a finished job is left as it is.

    Args:
        job: The job; `runtime.pool` says whether it runs on Ray or in this process.
        address: Address of a Ray cluster. None: `RAY_ADDRESS`, else a Ray that is started here and ends with the run.
        allow_empty: Accept an input without images and write one part without rows. False: InvalidJob.
        repair: Make parts again that are gone from a finished output. False: CheckFailed.
        fresh: Discard a finished output, or another job's, and make every row anew; an unfinished plan of this very
            job is resumed, so that the same call may be repeated until it succeeds. False: nothing is ever discarded.
        check_input: List the input of an output that was planned before again, and raise InvalidJob if images were
            added, are gone or have changed. False: a finished output's input is not listed.
        progress: True shows the progress on stderr as the command line does: a bar on a terminal, else a line from
            time to time. A ProgressReporter gets it. None and False show nothing.

    Returns:
        Counts, status and exit code of the run.

    Raises:
        JobError: The run could not go on. The class says why, and holds the exit code.

    Example:
        ```
        result = batchjob.run(job, progress=True).raise_for_status()
        print(result.predicted, "rows in", result.output)
        ```
    """
    _check_not_loading("run")
    result = driver.run(
        job,
        _choose_pool(job, address),
        allow_empty=allow_empty,
        progress=_choose_progress(progress),
        repair=repair,
        fresh=fresh,
        check_input=check_input,
    )
    return replace(result, storage=job.storage)


def retry(job: Job, *, address: str | None = None, progress: ProgressReporter | bool | None = None) -> RunResult:
    """Read images with error rows again, and replace these rows; then do what a run has left undone.

    `_SUCCESS` is absent from the first replaced part to the last. Rows without an error stay as they are. A retry that
    was stopped continues when it is called again; `run` finishes it too, but retries no further row.

    Args:
        job: The job, as it was run.
        address: Address of a Ray cluster; see `run`.
        progress: See `run`.

    Returns:
        Counts, status and exit code of the run.

    Raises:
        InvalidJob: Nothing has been run there yet.
        JobError: See `run`.

    Example:
        `batchjob.retry(job).failed` is the number of images that fail still.
    """
    _check_not_loading("retry")
    reporter = _choose_progress(progress)
    result = driver.run(job, _choose_pool(job, address), allow_empty=True, progress=reporter, retry=True)
    return replace(result, storage=job.storage)


def make_plan(job: Job, *, allow_empty: bool = False, progress: ProgressReporter | bool | None = None) -> PlanSummary:
    """Freeze a job's plan without running it; `run` then starts from that plan. Loads neither torch nor Ray.

    Args:
        job: The job.
        allow_empty: Accept an input without images. False: InvalidJob.
        progress: See `run`.

    Returns:
        The plan: its id, images and shards.

    Raises:
        JobError: See `run`.

    Example:
        `batchjob.make_plan(job).images` is the number of images that a run would read.
    """
    _check_not_loading("make_plan")
    check_submission(job)
    return driver.make_plan(job, allow_empty=allow_empty, progress=_choose_progress(progress))


def validate(job: Job) -> list[str]:
    """Check a job without writing anything: input, model, labels, device, output.

    Args:
        job: The job; its model is loaded, and tried on the first images.

    Returns:
        Lines of text for a person.

    Raises:
        Temporary: The input is not there yet (`input.require`).
        JobError: The first check that fails.

    Example:
        `print(*batchjob.validate(job), sep="\\n")`
    """
    _check_not_loading("validate")
    store = open_store(job.output.uri, job.storage)
    _, head = read_current_head(store)
    if head is not None:
        check_fingerprint(store, job, head)
        job = job.with_defaults(head.defaults)
        check_files(store, head, JobFiles(job), with_input=False)
    listing = SourceListing(job.input, Reader(job.storage), job.output.uri)
    listing.check_requirements()
    check_columns(job, listing)
    preview = preview_listing(listing, SMALL_INPUT_IMAGES)
    if head is None and not preview.rows:
        raise no_images_error(job, preview)
    contract = None if head is None else read_contract(store, head)
    worker, notes = _load_worker(job, preview, {} if contract is None else contract.decisions)
    check_columns(job, listing, worker.columns)
    if head is None:
        choose_shard_size(job, preview, 0)
    return [
        f"input     {job.input.uri}: {preview.describe()}",
        *(f"          {line}" for line in preview.skipped),
        f"model     {worker.model} on {worker.device}, {worker.precision}, in {worker.seconds:.1f} s",
        *(f"decided   {line}" for line in worker.decision_lines),
        *(f"          {sentence}" for sentence in worker.notes),
        f"columns   {', '.join(worker.columns)}",
        *(f"images    {note}" for note in notes),
        f"output    {store.uri}: {_describe_output(store, head)}",
    ]


def convert(job: Job, options: ConversionOptions) -> ConversionResult:
    """Write a job's model as another format, and compare it with the original on images drawn from the whole input.

    Args:
        job: The job; its model is converted.
        options: The format, the file, and the images to compare on.

    Returns:
        The file, how close its outputs are to the original's, and the throughput of both.

    Raises:
        InvalidJob: The model cannot be converted, a package is missing, or the file's folder does not exist.
        CheckFailed: The outputs differ by more than the tolerance; no file is left.
        Unavailable: A store cannot be reached.
    """
    _check_not_loading("convert")
    options.check_file()
    from batchjob.inference.convert import convert_model

    listing = SourceListing(job.input, Reader(job.storage), job.output.uri)
    return convert_model(job, options, draw_locations(listing, options.images_to_draw))


def status(output: OutputLocation, storage: OptionsByPrefix | None = None) -> OutputStatus:
    """Look at an output: planned, committed and failed images. Loads neither torch nor Ray.

    Args:
        output: Path or URI of the output, or its job.
        storage: Storage options by URI prefix, as in a job; those of the job, or none, by default.

    Returns:
        Counts and state of the output.

    Raises:
        InvalidJob: There is no plan, or one in a format that this version does not know.

    Example:
        `batchjob.status("s3://bucket/predictions/").failed`
    """
    return output_status.read_status(open_store(*_locate(output, storage)))


def read_errors(output: OutputLocation, storage: OptionsByPrefix | None = None) -> Iterator[dict[str, Any]]:
    """Read the error rows of an output, in plan order. Loads neither torch nor Ray.

    Args:
        output: Path or URI of the output, or its job.
        storage: Storage options by URI prefix, as in a job; those of the job, or none, by default.

    Returns:
        Rows with `position`, `uri`, `error_stage`, `error_type` and `error_message`.

    Raises:
        InvalidJob: See `status`.

    Example:
        `[row["uri"] for row in batchjob.read_errors(job) if row["error_type"] == "not_found"]`
    """
    return output_status.read_errors(open_store(*_locate(output, storage)))


def discard(output: OutputLocation, storage: OptionsByPrefix | None = None) -> str:
    """Discard the plan of an output and delete its parts, so that another job may write there.

    Args:
        output: Path or URI of the output, or its job.
        storage: Storage options by URI prefix, as in a job; those of the job, or none, by default.

    Returns:
        One sentence that names what was deleted.

    Raises:
        InvalidJob: There is no plan.
        Temporary: A driver is at work there, or a stop signal came; call it again to finish.

    Example:
        `batchjob.discard("out")`
    """
    return driver.discard(*_locate(output, storage))


def _check_not_loading(function: str) -> None:
    """Raise InvalidJob if a module that a worker imports for its functions calls this API at import."""
    if (path := find_loading_module()) is not None:
        raise InvalidJob(
            f"{path}: calls batchjob.{function} when it is imported, and a worker imports it, because the job names it "
            "as the module of its own code; put the call below `if __name__ == '__main__':`, or give the function "
            "itself in place of its name (target=build)"
        )


def _choose_progress(progress: ProgressReporter | bool | None) -> ProgressReporter:
    if progress is None or isinstance(progress, bool):
        return pick_progress(quiet=not progress)
    return progress


def _choose_pool(job: Job, address: str | None) -> Callable[[], Pool]:
    """Return a function that makes the job's pool, on that Ray cluster or the one that the environment names.

    Raises:
        InvalidJob: The address is malformed, or the output would be gone at the end of a submitted job.
    """
    address = address or os.environ.get("RAY_ADDRESS") or None
    check_submission(job)
    if address is not None and job.runtime.pool == "ray":
        check_address(address)
    return lambda: make_pool(job, address)


def make_pool(job: Job, address: str | None) -> Pool:
    """Make the pool that `runtime.pool` names.

    Args:
        job: The job.
        address: Address of a Ray cluster; `local` or None starts a Ray here.
    """
    # A pool brings torch or Ray. The driver makes it once it holds the lease and knows that there is work to do.
    if job.runtime.pool == "local":
        from batchjob.pool.local_pool import LocalPool

        return LocalPool(_count_cores(job))
    from batchjob.pool.ray_pool import RayPool

    return RayPool(job, None if address == "local" else address)


def _locate(output: OutputLocation, storage: OptionsByPrefix | None) -> tuple[str, OptionsByPrefix | None]:
    """Return the URI of an output and the storage options to reach it."""
    if isinstance(output, Job):
        return output.output.uri, output.storage if storage is None else storage
    return os.fspath(output), storage


def _count_cores(job: Job) -> int:
    cores = job.runtime.cpus_per_worker
    return system.available_cores() if cores == "auto" else max(1, int(cores))


def _load_worker(job: Job, preview: InputPreview, decisions: Mapping[str, str]) -> tuple[WorkerInfo, list[str]]:
    """Load a worker as a run does, and try the preprocessing on the first images; return lines about these."""
    started = time.monotonic()
    # The fork server and this process import torch at the same time.
    start_loader_forkserver(job)
    from batchjob.worker.setup import load

    setup = WorkerSetup(
        job.serialize(), str(job.folder), None, preview.sample, small_input_bytes=0, decisions=decisions
    )
    with closing(load(job, setup, _count_cores(job), started)) as loaded:
        return loaded.info, loaded.engine.check_images(preview.sample)


def _describe_output(store: Store, head: PlanHead | None) -> str:
    parts = len(list_parts(store))
    if head is not None:
        return f"plan {head.plan} of this job, {format_count(parts, 'part')} committed"
    return "to be planned" if not parts else f"to be planned, {format_count(parts, 'part')} of no plan in the way"
