"""Arguments in, exit code out. People are spoken to on stderr; with `--json` the last line of stdout is one object."""

from __future__ import annotations

import json
import sys
import time
import traceback
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from batchjob import __version__, api
from batchjob.cli.options import (
    AllowEmpty,
    AsJson,
    ConversionFormat,
    Endpoint,
    JobFile,
    OutputOrJobFile,
    Overrides,
    Params,
    PoolName,
    QuietFlag,
    RayAddress,
    Region,
    RunPool,
    read_job,
    resolve_output,
)
from batchjob.concurrency import exit_past_daemon_threads, kill_child_processes
from batchjob.driver import driver
from batchjob.driver.control_loop import ignore_stop_signals
from batchjob.errors import BatchjobError, Temporary
from batchjob.report import output_status
from batchjob.report.run_result import RunResult
from batchjob.text import format_count, sanitize

if TYPE_CHECKING:
    from batchjob.driver.progress import ProgressReporter
    from batchjob.job.job import Job

__all__ = ["app", "main"]

app = typer.Typer(
    name="batchjob",
    help="Run a vision model over every image of a dataset: one row per image in Parquet, exactly once.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
    context_settings={"help_option_names": ["-h", "--help"]},
)
# What click raises for a wrong command line; newer typers carry their own click and do not export it.
_UsageError: type[Any] = typer.BadParameter.__base__ or typer.BadParameter
# Called before the last words: in a process that is nobody else's, no signal is to gainsay them.
_at_the_end: list[Callable[[], None]] = []


def main(args: Sequence[str] | None = None) -> int:
    """Runs one command line (`sys.argv` by default) and returns its exit code."""
    if args is not None:
        return _obeyed(list(args))
    _at_the_end.append(ignore_stop_signals)
    code = _obeyed(sys.argv[1:])
    if code:  # after success all threads have ended in order
        kill_child_processes()
        exit_past_daemon_threads(code)
    return code


def _obeyed(given: list[str]) -> int:
    try:
        code = app(given, prog_name="batchjob", standalone_mode=False)
    except _UsageError as error:
        error.show()
        if "--json" in given:
            print(RunResult("invalid", exit_code=2, message=error.format_message()).to_json())
        return 2
    return code if isinstance(code, int) else 0


def _version(wanted: bool) -> None:
    if wanted:
        print(f"batchjob {__version__}")
        raise typer.Exit


@app.callback()
def _batchjob(
    version: Annotated[
        bool, typer.Option("--version", callback=_version, is_eager=True, help="Print the version.")
    ] = False,
) -> None:
    pass


@app.command()
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
    as_json: AsJson = False,
    quiet: QuietFlag = False,
) -> int:
    """Run a job, or resume it. Exit 0 complete, 2 invalid, 3 over budget, 4 incomplete, 75 try again later."""

    def work(loaded: Job, progress: ProgressReporter) -> RunResult:

        return api.run(loaded, address=address, allow_empty=allow_empty, repair=repair, progress=progress)

    return _carried_out(work, lambda: read_job(job, param, _pooled(overrides, pool)), as_json, quiet)


@app.command()
def retry(
    job: JobFile,
    overrides: Overrides = None,
    param: Params = None,
    pool: RunPool = None,
    address: RayAddress = None,
    as_json: AsJson = False,
    quiet: QuietFlag = False,
) -> int:
    """Read the images again that failed, and replace their rows; do what a run has left undone. Exits as run does."""

    def work(loaded: Job, progress: ProgressReporter) -> RunResult:

        return api.retry(loaded, address=address, progress=progress)

    return _carried_out(work, lambda: read_job(job, param, _pooled(overrides, pool)), as_json, quiet)


@app.command()
def validate(job: JobFile, overrides: Overrides = None, param: Params = None, as_json: AsJson = False) -> int:
    """Check a job without running it: its file, its input, its model, its output."""

    def work() -> tuple[dict[str, Any], list[str]]:

        lines = api.validate(read_job(job, param, overrides))
        return {"status": "valid", "lines": lines}, lines

    return _answer(work, as_json)


@app.command()
def plan(
    job: JobFile,
    overrides: Overrides = None,
    param: Params = None,
    allow_empty: AllowEmpty = False,
    as_json: AsJson = False,
    quiet: QuietFlag = False,
) -> int:
    """List the input, cut it into shards and freeze that plan in the output; a run then starts from it."""

    def work() -> tuple[dict[str, Any], list[str]]:
        loaded = read_job(job, param, overrides)
        from batchjob.driver.progress import pick_progress

        summary = api.make_plan(loaded, allow_empty=allow_empty, progress=pick_progress(quiet))
        return {"status": "planned", **asdict(summary)}, summary.lines()

    return _answer(work, as_json)


@app.command()
def status(
    where: OutputOrJobFile,
    overrides: Overrides = None,
    param: Params = None,
    endpoint: Endpoint = None,
    region: Region = None,
    as_json: AsJson = False,
) -> int:
    """Say what an output holds: planned, committed and failed images, and whether it is complete."""

    def work() -> tuple[dict[str, Any], list[str]]:
        from batchjob.storage.store import open_store

        found = output_status.read_status(open_store(*resolve_output(where, param, overrides, endpoint, region)))
        return asdict(found), found.lines()

    return _answer(work, as_json)


@app.command()
def errors(
    where: OutputOrJobFile,
    overrides: Overrides = None,
    param: Params = None,
    limit: Annotated[int, typer.Option(min=0, help="Error rows to show; 0 shows all.")] = 20,
    endpoint: Endpoint = None,
    region: Region = None,
    as_json: AsJson = False,
) -> int:
    """List the images that failed, and why. With --json a line each, and the counts last."""

    def work() -> tuple[dict[str, Any], list[str]]:
        from batchjob.storage.store import open_store

        store = open_store(*resolve_output(where, param, overrides, endpoint, region))
        for row in islice(output_status.read_errors(store), limit or None):
            if as_json:
                print(json.dumps(row, default=str))
            else:
                said = f"{row['uri']}: {row['error_stage']}/{row['error_type']}: {row['error_message']}"
                _say(said.replace("\n", "\\n"))
        counts = output_status.count_errors(store)
        sums = ", ".join(f"{kind} {count:,}" for kind, count in counts.by_type.items())
        said = format_count(counts.total, "error row")
        return {"output": store.uri, **asdict(counts)}, [f"{said}: {sums}" if sums else said]

    return _answer(work, as_json)


@app.command()
def discard(
    where: OutputOrJobFile,
    overrides: Overrides = None,
    param: Params = None,
    yes: Annotated[bool, typer.Option("--yes", help="Really delete.")] = False,
    endpoint: Endpoint = None,
    region: Region = None,
    as_json: AsJson = False,
) -> int:
    """Delete an output's rows and bury its plan, so that another job may write there. Needs --yes."""

    def work() -> tuple[dict[str, Any], list[str]]:

        uri, options = resolve_output(where, param, overrides, endpoint, region)
        if not yes:
            raise typer.BadParameter(f"this deletes every row in {uri}; add --yes to do so")
        said = driver.discard(uri, options)
        return {"status": "discarded", "output": uri, "message": said}, [said]

    return _answer(work, as_json)


@app.command()
def convert(  # noqa: PLR0913, PLR0917 - typer makes a parameter of each flag
    job: JobFile,
    overrides: Overrides = None,
    param: Params = None,
    to: Annotated[ConversionFormat, typer.Option("--to", help="The format to write.")] = ConversionFormat.exported,
    file: Annotated[Path, typer.Option("--output", "-o", metavar="FILE", help="Where to.")] = Path("model.pt2"),
    images: Annotated[int, typer.Option(min=2, help="Images of the job to calibrate on and to compare.")] = 32,
    tolerance: Annotated[float | None, typer.Option(min=0, help="Largest deviation, of the largest output.")] = None,
    amount: Annotated[float, typer.Option(min=0, max=1, help="For pruned: share of the weights.")] = 0.5,
    structured: Annotated[bool, typer.Option("--structured", help="For pruned: whole channels.")] = False,
    force: Annotated[bool, typer.Option("--force", help="Replace a file that is there.")] = False,
    as_json: AsJson = False,
) -> int:
    """Write a job's model as another format, held against the original on the job's own images."""

    def work() -> tuple[dict[str, Any], list[str]]:
        loaded = read_job(job, param, overrides)
        from batchjob.inference.convert import ConversionOptions

        wanted = ConversionOptions(to.value, file.absolute(), images, tolerance, amount, structured, force)
        done = api.convert(loaded, wanted)
        return {"status": "converted", **done.to_dict()}, done.lines()

    return _answer(work, as_json)


@app.command()
def bench(
    job: JobFile,
    overrides: Overrides = None,
    param: Params = None,
    images: Annotated[int, typer.Option(min=1, help="Images in a run; where there are fewer they come again.")] = 1000,
    profile: Annotated[
        Path | None, typer.Option(metavar="DIR", help="Write torch's table and a Chrome trace of a few batches there.")
    ] = None,
    as_json: AsJson = False,
) -> int:
    """Measure each stage of a job alone, and the whole; say what holds it back. Its output is not touched."""

    def work() -> tuple[dict[str, Any], list[str]]:
        loaded = read_job(job, param, overrides)
        from batchjob.bench.bench import BenchOptions, bench
        from batchjob.bench.text_report import format_report

        found = bench(loaded, BenchOptions(images, None if profile is None else profile.absolute()))
        return {"status": "measured", **found.to_json_dict()}, format_report(found)

    return _answer(work, as_json)


@app.command()
def schema() -> int:
    """Print the JSON schema of job files, for editors: batchjob schema > batchjob.schema.json"""
    from batchjob.job.json_schema import job_json_schema

    print(json.dumps(job_json_schema(), indent=2))
    return 0


@app.command()
def env(as_json: AsJson = False) -> int:
    """Say what a bug report needs: versions, devices, cores, memory, shared memory, Ray."""

    def work() -> tuple[dict[str, Any], list[str]]:
        from batchjob.system import collect_environment, format_environment

        found = collect_environment()
        return found, format_environment(found)

    return _answer(work, as_json)


def _pooled(overrides: Sequence[str] | None, pool: PoolName | None) -> list[str]:
    return [*(overrides or ()), *([f"runtime.pool={pool.value}"] if pool else ())]


def _carried_out(
    work: Callable[[Job, ProgressReporter], RunResult], read: Callable[[], Job], as_json: bool, quiet: bool
) -> int:
    """Reads the job, does `work` and says how it ended."""
    from batchjob.driver.progress import pick_progress

    began, output = time.monotonic(), None
    try:
        loaded = read()
        output = loaded.output.uri
        outcome = work(loaded, pick_progress(quiet))
    except _UsageError:
        raise
    except (Exception, KeyboardInterrupt) as error:  # noqa: BLE001  # explained, and turned into an exit code
        _last_words()
        _explain(error)
        outcome = RunResult.from_error(error, output, time.monotonic() - began)
    else:
        _last_words()
        _say(outcome.to_text())
    if as_json:
        print(outcome.to_json(), flush=True)
    return outcome.exit_code


def _last_words() -> None:
    for make_ready in _at_the_end:
        make_ready()


def _answer(work: Callable[[], tuple[Mapping[str, Any], Iterable[str]]], as_json: bool) -> int:
    """Does `work` and says what it found: lines to a person, or the object to a machine."""
    try:
        found, lines = work()
    except (_UsageError, BrokenPipeError):
        raise
    except (Exception, KeyboardInterrupt) as error:  # noqa: BLE001  # explained, and turned into an exit code
        if isinstance(error, KeyboardInterrupt):
            error = Temporary("interrupted; nothing is lost, the same command begins again")
        _explain(error)
        outcome = RunResult.from_error(error)
        if as_json:
            said = {"status": outcome.status, "exit_code": outcome.exit_code, "message": outcome.message}
            print(json.dumps(said), flush=True)
        return outcome.exit_code
    if as_json:
        print(json.dumps({**found, "exit_code": 0}, default=str), flush=True)
    else:
        for line in lines:
            _say(line)
    return 0


def _say(text: str) -> None:
    if text:
        print(sanitize(text), file=sys.stderr, flush=True)


def _explain(error: BaseException) -> None:
    if isinstance(error, BatchjobError | KeyboardInterrupt):
        _say(RunResult.from_error(error).message)
        _say("\n".join(getattr(error, "__notes__", ())))  # a crashed worker's traceback
    else:
        _say("".join(traceback.format_exception(error)).rstrip())


if __name__ == "__main__":
    sys.exit(main())
