"""Result of a command: text for people on stderr, one JSON object on the last line of stdout, and the exit code."""

from __future__ import annotations

import json
import os
import sys
import time
import traceback
from collections.abc import Callable, Iterable, Mapping
from contextlib import redirect_stdout, suppress
from typing import TYPE_CHECKING, Any

import typer

from batchjob.errors import DEBUG_VARIABLE, BatchjobError, Temporary
from batchjob.report.run_result import RunResult
from batchjob.text import sanitize

if TYPE_CHECKING:
    from batchjob.driver.progress import ProgressReporter
    from batchjob.job.job import Job

__all__ = ["UsageError", "before_result", "print_text", "report_query", "report_run"]

# What click raises for a wrong command line. Newer typers carry their own click and do not export this class.
UsageError: type[Any] = typer.BadParameter.__base__ or typer.BadParameter
# Called before the result of a run is printed. A process that ends with the command ignores stop signals from there on.
before_result: list[Callable[[], None]] = []


def report_run(
    work: Callable[[Job, ProgressReporter], RunResult], read_job: Callable[[], Job], as_json: bool, quiet: bool
) -> int:
    """Run a job and print its result.

    Args:
        work: Runs the job.
        read_job: Reads the job.
        as_json: True prints the result as JSON on stdout too.
        quiet: True shows no progress.

    Returns:
        The exit code.
    """
    from batchjob.driver.progress import pick_progress

    started, output = time.monotonic(), None
    try:
        job = read_job()
        output = job.output.uri
        with redirect_stdout(sys.stderr):  # what the user's code prints is no part of the result
            result = work(job, pick_progress(quiet))
    except UsageError:
        raise
    except (Exception, KeyboardInterrupt) as error:  # noqa: BLE001  # explained, and turned into an exit code
        _call_before_result()
        with _unwritable_ignored():
            _print_error(error)
        result = RunResult.from_error(error, output, time.monotonic() - started)
    else:
        _call_before_result()
        with _unwritable_ignored():
            print_text(result.to_text())
    if as_json:
        # The exit code says how the run ended, whether its result is read or not.
        _print_answer(result.to_json())
    return result.exit_code


def report_query(work: Callable[[], tuple[Mapping[str, Any], Iterable[str]]], as_json: bool) -> int:
    """Do `work` and print its answer.

    Args:
        work: Returns the answer as a JSON object and as lines of text.
        as_json: True prints the object on stdout, False the lines on stderr.

    Returns:
        The exit code; 75 if the answer cannot be written.
    """
    try:
        with redirect_stdout(sys.stderr):
            answer, lines = work()
    except (UsageError, BrokenPipeError):
        raise
    except (Exception, KeyboardInterrupt) as error:  # noqa: BLE001  # explained, and turned into an exit code
        if isinstance(error, KeyboardInterrupt):
            error = Temporary("interrupted; nothing is lost, the same command begins again")
        with _unwritable_ignored():
            _print_error(error)
        result = RunResult.from_error(error)
        if as_json:
            failure = {"status": result.status, "exit_code": result.exit_code, "message": result.message}
            _print_answer(json.dumps(failure))
        return result.exit_code
    if as_json:
        is_written = _print_answer(json.dumps({**answer, "exit_code": 0}, default=str))
        return 0 if is_written else Temporary.exit_code
    try:
        for line in lines:
            print_text(line)
    except (OSError, ValueError):
        return Temporary.exit_code
    return 0


def print_text(text: str) -> None:
    """Print text for people on stderr, without secrets and terminal controls; nothing where it is empty."""
    if text:
        print(sanitize(text), file=sys.stderr, flush=True)


def _print_answer(document: str) -> bool:
    """Print a JSON object on stdout; if it cannot be written, say so on stderr and return False."""
    try:
        print(document, flush=True)
    except (OSError, ValueError) as error:
        reason = (error.strerror if isinstance(error, OSError) else "") or str(error)
        with _unwritable_ignored():
            print_text(f"the JSON object could not be written to stdout: {reason}")
        return False
    return True


def _unwritable_ignored() -> suppress:
    """Return a context in which a stream may fail: the exit code says how the run ended, read or not."""
    return suppress(OSError, ValueError)


def _call_before_result() -> None:
    for call in before_result:
        call()


def _print_error(error: BaseException) -> None:
    if isinstance(error, BatchjobError | KeyboardInterrupt):
        print_text(RunResult.from_error(error).message)
        notes = getattr(error, "__notes__", ())  # a worker's traceback
        if os.environ.get(DEBUG_VARIABLE) and not notes:
            notes = ["".join(traceback.format_exception(error)).rstrip()]
        print_text("\n".join(notes))
    else:
        print_text("".join(traceback.format_exception(error)).rstrip())
