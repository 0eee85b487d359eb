"""Run a vision model over every image of a dataset in object storage: one row per image in Parquet, exactly once.

`run(Job(...))` or `run(Job.from_file("job.yaml"))` is all of it; `batchjob --help` is the same from a shell.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

__version__ = "0.1.0"

__all__ = ["Job", "JobError", "RunResult", "__version__", "retry", "run", "validate"]

if TYPE_CHECKING:
    from batchjob.api import retry, run, validate
    from batchjob.errors import JobError
    from batchjob.job.job import Job
    from batchjob.report.run_result import RunResult

_HOMES = {
    "Job": "job.job",
    "JobError": "errors",
    "RunResult": "report.run_result",
    "retry": "api",
    "run": "api",
    "validate": "api",
}


def __getattr__(name: str) -> Any:
    """Names are looked up when they are used: `import batchjob` stays light."""
    if name == "Outcome":
        import warnings

        warnings.warn("batchjob.Outcome is now batchjob.RunResult", DeprecationWarning, stacklevel=2)
        name = "RunResult"
    if name not in _HOMES:
        raise AttributeError(f"module 'batchjob' has no attribute {name!r}")
    from importlib import import_module

    return getattr(import_module(f"batchjob.{_HOMES[name]}"), name)
