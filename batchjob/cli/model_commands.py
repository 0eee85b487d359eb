"""Commands that work on a job's model: convert, bench."""

# Commands import what they do inside their functions, so that --help and usage errors answer at once.

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from batchjob.cli.command_result import report_query
from batchjob.cli.options import AsJson, JobFile, Overrides, Params, TargetFormat, read_job

__all__ = ["bench", "convert"]


def convert(  # noqa: PLR0913, PLR0917 - typer makes a parameter of each flag
    job: JobFile,
    overrides: Overrides = None,
    param: Params = None,
    to: Annotated[TargetFormat, typer.Option("--to", help="The format to write.")] = TargetFormat.exported,
    file: Annotated[Path, typer.Option("--output", "-o", metavar="FILE", help="Where to.")] = Path("model.pt2"),
    images: Annotated[int, typer.Option(min=2, help="Images of the job to compare; int8 learns on others.")] = 32,
    tolerance: Annotated[float | None, typer.Option(min=0, help="Largest deviation, of the largest output.")] = None,
    amount: Annotated[float, typer.Option(min=0, max=1, help="For pruned: share of the weights.")] = 0.5,
    structured: Annotated[bool, typer.Option("--structured", help="For pruned: whole channels.")] = False,
    force: Annotated[bool, typer.Option("--force", help="Replace a file that is there.")] = False,
    as_json: AsJson = False,
) -> int:
    """Write a job's model in another format, and compare the two.

    They are compared on the job's own images.
    """

    def work() -> tuple[dict[str, Any], list[str]]:
        loaded = read_job(job, param, overrides)
        from batchjob import api
        from batchjob.inference.conversion_options import ConversionOptions

        options = ConversionOptions(to.value, file.absolute(), images, tolerance, amount, structured, force)
        result = api.convert(loaded, options)
        return {"status": "converted", **result.to_dict()}, result.lines()

    return report_query(work, as_json)


def bench(
    job: JobFile,
    overrides: Overrides = None,
    param: Params = None,
    images: Annotated[
        int | None,
        typer.Option(min=1, help="Images in a run, 1,000 or four batches; where there are fewer they come again."),
    ] = None,
    profile: Annotated[
        Path | None, typer.Option(metavar="DIR", help="Write torch's table and a Chrome trace of a few batches there.")
    ] = None,
    as_json: AsJson = False,
) -> int:
    """Measure each stage of a job, and find what limits the whole.

    The job's output is not touched.
    """

    def work() -> tuple[dict[str, Any], list[str]]:
        loaded = read_job(job, param, overrides)
        from batchjob.bench.bench import BenchOptions
        from batchjob.bench.bench import bench as run_bench
        from batchjob.bench.report import format_report, to_json_dict

        result = run_bench(loaded, BenchOptions(images, None if profile is None else profile.absolute()))
        return {"status": "measured", **to_json_dict(result)}, format_report(result)

    return report_query(work, as_json)
