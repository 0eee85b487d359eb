"""The door for Python and for the command line: picks the pool, calls the driver."""

from __future__ import annotations

import os

import pyarrow as pa

from batchjob import driver, environment
from batchjob.cluster import RayPool
from batchjob.feeder import Input, peek
from batchjob.job import Job
from batchjob.loader import FEW_IMAGES
from batchjob.local import LocalPool
from batchjob.pool import Pool, Setup
from batchjob.progress import Progress, Quiet
from batchjob.report import Outcome, PlanSummary
from batchjob.sink import row_schema
from batchjob.storage import Reader
from batchjob.worker import Worker

__all__ = ["make_pool", "plan", "run", "validate"]


def run(
    job: Job, *, address: str | None = None, allow_empty: bool = False, progress: Progress | None = None
) -> Outcome:
    """Run a job to its end, resuming what was begun; a finished job is left as it is.

    Args:
        job: what to run, and whether on Ray or in this process (`runtime.pool`).
        address: of a Ray cluster; else `RAY_ADDRESS`; else a Ray is started here for the time of the run.
        allow_empty: an input without images makes one part of no rows, and is no error.
        progress: who is told how it goes; nobody by default.

    Raises:
        JobError: whatever ends the job before its sums; its class says which, and carries the exit code.
    """
    where = address or os.environ.get("RAY_ADDRESS") or None
    return driver.run(job, lambda: make_pool(job, where), allow_empty=allow_empty, progress=progress or Quiet())


def plan(job: Job, *, allow_empty: bool = False, progress: Progress | None = None) -> PlanSummary:
    """Freeze a job's plan without running it; `run` then starts from it. Needs neither torch nor Ray.

    Raises:
        JobError: see `run`.
    """
    return driver.plan_only(job, allow_empty=allow_empty, progress=progress or Quiet())


def validate(job: Job) -> list[str]:
    """Check a job as far as it goes without writing anything: input, model, labels, device. Lines for a person.

    Raises:
        JobError: the first thing that does not hold.
    """
    source = Input(job, Reader(job.storage))
    seen = peek(source, FEW_IMAGES)
    setup = Setup(job.portable(), str(job.base), None, seen.sample, few=True)
    worker = Worker(job, setup, _cores(job))
    try:
        loaded = worker.load()
    finally:
        worker.close()
    task = [pa.field(name, pa.string()) for name in loaded.columns]
    row_schema(source.fields, task, job.input.has_id, job.output.uri)
    return [
        f"input     {job.input.uri}: {'' if seen.whole else 'more than '}{seen.rows:,} images",
        f"model     {loaded.model} on {loaded.device}, {loaded.precision}, in {loaded.seconds:.1f} s",
        f"columns   {', '.join(loaded.columns)}",
        f"output    {job.output.uri}",
    ]


def make_pool(job: Job, address: str | None) -> Pool:
    """The pool that `runtime.pool` asks for."""
    if job.runtime.pool == "local":
        return LocalPool(_cores(job))
    return RayPool(job, None if address == "local" else address)


def _cores(job: Job) -> int:
    asked = job.runtime.cpus_per_worker
    return environment.cores() if asked == "auto" else max(1, int(asked))
