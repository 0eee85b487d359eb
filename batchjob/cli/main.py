"""Command line `batchjob`: the app with its commands; an exception's exit code becomes the process's."""

from __future__ import annotations

import os
import signal
import sys
from collections.abc import Sequence
from contextlib import suppress
from typing import Annotated

import typer

from batchjob import __version__
from batchjob.cli import command_result
from batchjob.cli.command_result import UsageError
from batchjob.cli.info_commands import env, schema
from batchjob.cli.model_commands import bench, convert
from batchjob.cli.output_commands import discard, errors, status
from batchjob.cli.run_commands import plan, retry, run, validate
from batchjob.concurrency import exit_past_daemon_threads, kill_child_processes
from batchjob.errors import DEBUG_VARIABLE
from batchjob.report.run_result import RunResult

__all__ = ["app", "main"]

_DEBUG_OPTION = "--debug"

app = typer.Typer(
    name="batchjob",
    help="Run a vision model over every image of a dataset: one row per image in Parquet, exactly once.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
    context_settings={"help_option_names": ["-h", "--help"]},
)
# The help lists commands in this order.
for command in (run, retry, validate, plan, status, errors, discard, convert, bench, schema, env):
    app.command()(command)


def main(args: Sequence[str] | None = None) -> int:
    """Run one command line.

    Args:
        args: Arguments without the program's name. None: `sys.argv`, in a process that ends with this call.

    Returns:
        The exit code.
    """
    if args is not None:
        return _run_command_line(list(args))
    _open_missing_streams()
    command_result.before_result.append(_ignore_stop_signals)
    code = _run_command_line(sys.argv[1:])
    _drop_unwritable_output()
    if code:  # after success all threads have ended in order
        kill_child_processes()
        exit_past_daemon_threads(code)
    return code


def _run_command_line(arguments: list[str]) -> int:
    # Whoever sees an error types the option behind the command that they have just run.
    if _DEBUG_OPTION in arguments:
        arguments = [_DEBUG_OPTION, *(argument for argument in arguments if argument != _DEBUG_OPTION)]
    before = os.environ.get(DEBUG_VARIABLE)
    try:
        code = app(arguments, prog_name="batchjob", standalone_mode=False)
    except UsageError as error:
        error.show()
        if "--json" in arguments:
            print(RunResult("invalid", exit_code=2, message=error.format_message()).to_json())
        return 2
    finally:
        if before is None:
            os.environ.pop(DEBUG_VARIABLE, None)
    return code if isinstance(code, int) else 0


def _ignore_stop_signals() -> None:
    """Ignore stop signals from now on: the exit code must say what the printed result says."""
    for number in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP):
        signal.signal(number, signal.SIG_IGN)


def _open_missing_streams() -> None:
    """Open the null device for standard streams that this process was started without (`2>&-`).

    Else the next file that is opened gets the number of the stream, and libraries write their messages into it.
    """
    for name, mode in (("stdin", "r"), ("stdout", "w"), ("stderr", "w")):
        if getattr(sys, name) is not None:
            continue
        # The lowest free number is taken: the stream's own, unless a library has opened a file since the start.
        opened = os.open(os.devnull, os.O_RDWR)
        setattr(sys, name, os.fdopen(opened, mode, encoding="utf-8", errors="backslashreplace", closefd=False))


def _drop_unwritable_output() -> None:
    """Drop buffered text that a stream does not take, so that its flush at the exit cannot change the exit code."""
    for stream in (sys.stdout, sys.stderr):
        try:
            stream.flush()
        except (OSError, ValueError):
            with suppress(OSError, ValueError):
                null = os.open(os.devnull, os.O_WRONLY)
                os.dup2(null, stream.fileno())
                os.close(null)


def _print_version(requested: bool) -> None:
    if requested:
        print(f"batchjob {__version__}")
        raise typer.Exit


@app.callback()
def _app_options(
    version: Annotated[  # noqa: ARG001 - its callback prints it
        bool, typer.Option("--version", callback=_print_version, is_eager=True, help="Print the version.")
    ] = False,
    debug: Annotated[
        bool, typer.Option(_DEBUG_OPTION, help="Show tracebacks, also of your own code; may stand anywhere.")
    ] = False,
) -> None:
    if debug:
        # Inherited by loader processes, and by the workers of a Ray that is started here.
        os.environ[DEBUG_VARIABLE] = "1"


if __name__ == "__main__":
    sys.exit(main())
