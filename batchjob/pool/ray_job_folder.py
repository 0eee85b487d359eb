"""Job's folder on a Ray cluster: shipped by the run, or with the job that was submitted."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

from batchjob.errors import InvalidJob
from batchjob.job.job import Job
from batchjob.uris import is_local, local_path

__all__ = ["build_runtime_env", "check_submission", "folder_too_large_error", "remote_job_dir"]

_NOT_SHIPPED = (".git", ".venv", "__pycache__", "*.pyc")
_SUBMITTED = "RAY_JOB_CONFIG_JSON_ENV_VAR"  # set by Ray for the entrypoint of a submitted job
_FILES_SHOWN = 3


def check_submission(job: Job) -> None:
    """Check that the output of a submitted job outlives it: Ray deletes the job's working directory at its end.

    Raises:
        InvalidJob: The output lies in the working directory.
    """
    if not _has_shipped_working_dir() or not is_local(job.output.uri):
        return
    if not local_path(job.output.uri).resolve().is_relative_to(Path.cwd().resolve()):
        return
    raise InvalidJob(
        f"output.uri: {job.output.uri} lies in the working directory of the submitted job, which Ray deletes at its "
        "end; give a bucket or a folder that all nodes share: output.uri=s3://BUCKET/OUT or output.uri=/SHARED/OUT"
    )


def remote_job_dir(job: Job) -> str:
    """Return the job's folder on the cluster, relative to the working directory of a worker."""
    return os.path.relpath(job.folder, Path.cwd()) if _is_submitted() else "."


def build_runtime_env(job: Job) -> dict[str, Any] | None:
    """Return Ray's `runtime_env` with the job's folder; None if Ray has it (`ray job submit --working-dir`)."""
    if _is_submitted():
        return None
    return {"working_dir": str(job.folder), "excludes": _excludes(job)}


def _excludes(job: Job) -> list[str]:
    """Return patterns of what is not shipped with the job's folder, in the form of a .gitignore."""
    data = (Path(uri) for uri in (job.input.uri, job.output.uri))
    data_inside = [f"/{path.relative_to(job.folder)}" for path in data if path.is_relative_to(job.folder)]
    return [*_NOT_SHIPPED, *data_inside]


def _is_submitted() -> bool:
    """Return True if this driver is the entrypoint of a submitted Ray job."""
    return _SUBMITTED in os.environ


def _has_shipped_working_dir() -> bool:
    """Return True if this driver runs in a copy of a working directory that was submitted with it."""
    try:
        config = json.loads(os.environ.get(_SUBMITTED, "{}"))
    except ValueError:
        return False
    return bool((config.get("runtime_env") or {}).get("working_dir"))


def folder_too_large_error(job: Job) -> InvalidJob:
    """Make the error of a job's folder that is over Ray's limit; it names the largest files that were shipped."""
    from ray._private.runtime_env.packaging import GCS_STORAGE_MAX_SIZE, _dir_travel, _get_excludes

    sizes: dict[str, int] = {}

    def add(path: Path) -> None:
        if path.is_file():
            sizes[str(path.relative_to(job.folder))] = path.stat().st_size

    _dir_travel(job.folder, [_get_excludes(job.folder, _excludes(job))], add, include_gitignore=True)
    largest = sorted(sizes.items(), key=lambda entry: -entry[1])[:_FILES_SHOWN]
    listed = ", ".join(f"{name} ({size / (1 << 20):,.0f} MiB)" for name, size in largest)
    return InvalidJob(
        f"{job.folder}: the job's folder is shipped to the cluster, and packed it is over Ray's limit of "
        f"{GCS_STORAGE_MAX_SIZE >> 20:,} MiB; largest: {listed}; name what the workers do not need in a file "
        ".rayignore beside the job file, one pattern a line as in .gitignore, or move it to the store"
    )
