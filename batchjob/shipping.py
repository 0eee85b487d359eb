"""What of a job's folder goes to a cluster, and where it lies there."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

from batchjob.job import Job

__all__ = ["landing", "shipment"]

_UNSHIPPED = (".git", ".venv", "__pycache__", "*.pyc")


def shipment(job: Job) -> dict[str, Any] | None:
    """Ray's `runtime_env` with the job's folder; None where Ray has it already (`ray job submit --working-dir`)."""
    if _submitted():
        return None
    data = (Path(uri) for uri in (job.input.uri, job.output.uri))
    inside = [f"/{path.relative_to(job.base)}" for path in data if path.is_relative_to(job.base)]
    return {"working_dir": str(job.base), "excludes": [*_UNSHIPPED, *inside]}


def landing(job: Job) -> str:
    """The job's folder on the cluster, relative to a worker's working directory."""
    return os.path.relpath(job.base, Path.cwd()) if _submitted() else "."


def _submitted() -> bool:
    """Whether this driver is the entrypoint of a submitted Ray job."""
    return "RAY_JOB_CONFIG_JSON_ENV_VAR" in os.environ
