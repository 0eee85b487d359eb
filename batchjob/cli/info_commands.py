"""Commands that need no job: schema, env."""

# Commands import what they do inside their functions, so that --help and usage errors answer at once.

from __future__ import annotations

import json
from typing import Any

from batchjob.cli.command_result import report_query
from batchjob.cli.options import AsJson

__all__ = ["env", "schema"]


def schema() -> int:
    """Print the JSON schema of job files, for editors.

    batchjob schema > batchjob.schema.json
    """
    from batchjob.job.json_schema import job_json_schema

    print(json.dumps(job_json_schema(), indent=2))
    return 0


def env(as_json: AsJson = False) -> int:
    """Print versions, devices, cores and memory, for a bug report."""

    def work() -> tuple[dict[str, Any], list[str]]:
        from batchjob.system import collect_environment, format_environment

        environment = collect_environment()
        return environment, format_environment(environment)

    return report_query(work, as_json)
