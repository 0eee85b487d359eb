"""Run a vision model over every image of a dataset in object storage: one row per image in Parquet, exactly once.

`run(Job(...))` or `run(Job.from_file("job.yaml"))` is all of it; `batchjob --help` is the same from a shell.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

__version__ = "0.1.0"

__all__ = [
    "Job",
    "JobError",
    "RunResult",
    "__version__",
    "discard",
    "make_plan",
    "read_errors",
    "retry",
    "run",
    "status",
    "validate",
]

if TYPE_CHECKING:
    from batchjob.api import discard, make_plan, read_errors, retry, run, status, validate
    from batchjob.errors import JobError
    from batchjob.job.job import Job
    from batchjob.report.run_result import RunResult

# Public name -> module that holds it.
_MODULES = {
    "Job": "batchjob.job.job",
    "JobError": "batchjob.errors",
    "RunResult": "batchjob.report.run_result",
    "discard": "batchjob.api",
    "make_plan": "batchjob.api",
    "read_errors": "batchjob.api",
    "retry": "batchjob.api",
    "run": "batchjob.api",
    "status": "batchjob.api",
    "validate": "batchjob.api",
}
# Name of an earlier version -> public name of today.
_RENAMED = {"Outcome": "RunResult"}


def __getattr__(name: str) -> Any:
    """Import a public name when it is used, so that `import batchjob` stays light."""
    if name in _RENAMED:
        import warnings

        warnings.warn(f"batchjob.{name} is now batchjob.{_RENAMED[name]}", DeprecationWarning, stacklevel=2)
        name = _RENAMED[name]
    if name not in _MODULES:
        raise AttributeError(f"module 'batchjob' has no attribute {name!r}")
    return getattr(import_module(_MODULES[name]), name)


def __dir__() -> list[str]:
    """List the public names, which are imported only when they are used."""
    return __all__
