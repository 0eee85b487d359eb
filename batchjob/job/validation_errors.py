"""Adds the faults that pydantic finds in a job file to its source map, each with its location in the text."""

from __future__ import annotations

from typing import TYPE_CHECKING

from batchjob.job.source_map import SourceMap
from batchjob.setting_errors import KeyPath, list_field_faults
from batchjob.settings import Settings

if TYPE_CHECKING:
    from pydantic import ValidationError

__all__ = ["add_validation_errors"]


def add_validation_errors(error: ValidationError, job_class: type[Settings], source_map: SourceMap) -> None:
    """Add one problem to the source map for each key at fault.

    Args:
        error: Pydantic's exception.
        job_class: Class of the job.
        source_map: The job as it was written.
    """

    def is_unresolved(path: KeyPath) -> bool:
        return any(path[:depth] in source_map.unresolved for depth in range(len(path) + 1))

    for fault in list_field_faults(error, job_class, source_map.tree, is_unresolved):
        source_map.add_problem(fault.path, fault.message, fault.at_key)
