"""Commands that look at an output or delete it: status, errors, discard."""

# Commands import what they do inside their functions, so that --help and usage errors answer at once.

from __future__ import annotations

import json
import sys
from dataclasses import asdict
from itertools import islice
from typing import Annotated, Any

import typer

from batchjob.cli.command_result import print_text, report_query
from batchjob.cli.options import AsJson, Endpoint, OutputOrJobFile, Overrides, Params, Region, resolve_output
from batchjob.errors import InvalidJob
from batchjob.text import format_count

__all__ = ["discard", "errors", "status"]


def status(
    where: OutputOrJobFile,
    overrides: Overrides = None,
    param: Params = None,
    endpoint: Endpoint = None,
    region: Region = None,
    as_json: AsJson = False,
) -> int:
    """Count planned, committed and failed images of an output."""

    def work() -> tuple[dict[str, Any], list[str]]:
        # Not through the API, which imports the driver: schedulers and people ask for the status again and again.
        from batchjob.report.output_status import read_status
        from batchjob.storage.store import open_store

        found = read_status(open_store(*resolve_output(where, param, overrides, endpoint, region)))
        return asdict(found), found.lines()

    return report_query(work, as_json)


def errors(
    where: OutputOrJobFile,
    overrides: Overrides = None,
    param: Params = None,
    limit: Annotated[int, typer.Option(min=0, help="Error rows to show; 0 shows all.")] = 20,
    endpoint: Endpoint = None,
    region: Region = None,
    as_json: AsJson = False,
) -> int:
    """List the images that failed, and why.

    With --json a line each, and the counts last.
    """
    stdout = sys.stdout

    def work() -> tuple[dict[str, Any], list[str]]:
        from batchjob.report.output_status import count_errors, read_errors
        from batchjob.storage.store import open_store

        store = open_store(*resolve_output(where, param, overrides, endpoint, region))
        for row in islice(read_errors(store), limit or None):
            if as_json:
                print(json.dumps(row, default=str), file=stdout)
            else:
                line = f"{row['uri']}: {row['error_stage']}/{row['error_type']}: {row['error_message']}"
                print_text(line.replace("\n", "\\n"))
        counts = count_errors(store)
        total, by_type = counts.total(), dict(counts.most_common())
        text = format_count(total, "error row")
        kinds = ", ".join(f"{kind} {count:,}" for kind, count in by_type.items())
        answer = {"output": store.uri, "total": total, "by_type": by_type}
        return answer, [f"{text}: {kinds}" if kinds else text]

    return report_query(work, as_json)


def discard(
    where: OutputOrJobFile,
    overrides: Overrides = None,
    param: Params = None,
    yes: Annotated[bool, typer.Option("--yes", help="Really delete.")] = False,
    endpoint: Endpoint = None,
    region: Region = None,
    as_json: AsJson = False,
) -> int:
    """Delete an output's rows, so that another job may write there.

    Its plan is discarded. Needs --yes.
    """

    def work() -> tuple[dict[str, Any], list[str]]:
        uri, options = resolve_output(where, param, overrides, endpoint, region)
        if not yes:
            raise InvalidJob(f"{uri}: discard deletes every row there; add --yes to do so")
        from batchjob import api

        message = api.discard(uri, options)
        return {"status": "discarded", "output": uri, "message": message}, [message]

    return report_query(work, as_json)
