"""Commands on a job: run, retry, validate, plan."""

# Commands import what they do inside their functions, so that --help and usage errors answer at once.

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict
from typing import TYPE_CHECKING, Annotated, Any

import typer

from batchjob.cli.command_result import report_query, report_run
from batchjob.cli.options import (
    AllowEmpty,
    AsJson,
    JobFile,
    Overrides,
    Params,
    PoolName,
    QuietFlag,
    RayAddress,
    RunPool,
    read_job,
)

if TYPE_CHECKING:
    from batchjob.driver.progress import ProgressReporter
    from batchjob.job.job import Job
    from batchjob.report.run_result import RunResult

__all__ = ["plan", "retry", "run", "validate"]


def run(  # noqa: PLR0913, PLR0917 - typer makes a parameter of each flag
    job: JobFile,
    overrides: Overrides = None,
    param: Params = None,
    pool: RunPool = None,
    address: RayAddress = None,
    allow_empty: AllowEmpty = False,
    repair: Annotated[
        bool, typer.Option("--repair", help="Make parts again that are gone from a finished output.")
    ] = False,
    fresh: Annotated[
        bool,
        typer.Option("--fresh", help="Discard a finished output, or another job's; an unfinished one is resumed."),
    ] = False,
    check_input: Annotated[
        bool, typer.Option("--check-input", help="List a finished output's input again: exit 2 if it has changed.")
    ] = False,
    as_json: AsJson = False,
    quiet: QuietFlag = False,
) -> int:
    """Run a job, or resume it.

    Exit 0 complete, 2 invalid, 3 over budget, 4 incomplete, 75 try again later.
    """

    def work(loaded: Job, progress: ProgressReporter) -> RunResult:
        from batchjob import api

        return api.run(
            loaded,
            address=address,
            allow_empty=allow_empty,
            repair=repair,
            fresh=fresh,
            check_input=check_input,
            progress=progress,
        )

    return report_run(work, lambda: read_job(job, param, _with_pool(overrides, pool)), as_json, quiet)


def retry(
    job: JobFile,
    overrides: Overrides = None,
    param: Params = None,
    pool: RunPool = None,
    address: RayAddress = None,
    as_json: AsJson = False,
    quiet: QuietFlag = False,
) -> int:
    """Read failed images again, and replace their error rows.

    What a run has left undone is done too. Exits as run does.
    """

    def work(loaded: Job, progress: ProgressReporter) -> RunResult:
        from batchjob import api

        return api.retry(loaded, address=address, progress=progress)

    return report_run(work, lambda: read_job(job, param, _with_pool(overrides, pool)), as_json, quiet)


def validate(job: JobFile, overrides: Overrides = None, param: Params = None, as_json: AsJson = False) -> int:
    """Check a job's file, input, model and output; write nothing."""

    def work() -> tuple[dict[str, Any], list[str]]:
        from batchjob import api

        lines = api.validate(read_job(job, param, overrides))
        return {"status": "valid", "lines": lines}, lines

    return report_query(work, as_json)


def plan(
    job: JobFile,
    overrides: Overrides = None,
    param: Params = None,
    allow_empty: AllowEmpty = False,
    as_json: AsJson = False,
    quiet: QuietFlag = False,
) -> int:
    """List the input and freeze its plan; a run then starts from it."""

    def work() -> tuple[dict[str, Any], list[str]]:
        loaded = read_job(job, param, overrides)
        from batchjob import api
        from batchjob.driver.progress import pick_progress

        summary = api.make_plan(loaded, allow_empty=allow_empty, progress=pick_progress(quiet))
        return {"status": "planned", **asdict(summary)}, summary.lines()

    return report_query(work, as_json)


def _with_pool(overrides: Sequence[str] | None, pool: PoolName | None) -> list[str]:
    return [*(overrides or ()), *([f"runtime.pool={pool.value}"] if pool else ())]
