"""Command line `batchjob`: the app with its commands; an exception's exit code becomes the process's."""

from __future__ import annotations

import signal
import sys
from collections.abc import Sequence
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
from batchjob.report.run_result import RunResult

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
    command_result.before_result.append(_ignore_stop_signals)
    code = _run_command_line(sys.argv[1:])
    if code:  # after success all threads have ended in order
        kill_child_processes()
        exit_past_daemon_threads(code)
    return code


def _run_command_line(arguments: list[str]) -> int:
    try:
        code = app(arguments, prog_name="batchjob", standalone_mode=False)
    except UsageError as error:
        error.show()
        if "--json" in arguments:
            print(RunResult("invalid", exit_code=2, message=error.format_message()).to_json())
        return 2
    return code if isinstance(code, int) else 0


def _ignore_stop_signals() -> None:
    """Ignore SIGTERM and SIGINT from now on: the exit code must say what the printed result says."""
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, signal.SIG_IGN)


def _print_version(requested: bool) -> None:
    if requested:
        print(f"batchjob {__version__}")
        raise typer.Exit


@app.callback()
def _app_options(
    version: Annotated[
        bool, typer.Option("--version", callback=_print_version, is_eager=True, help="Print the version.")
    ] = False,
) -> None:
    pass


if __name__ == "__main__":
    sys.exit(main())
