"""Names and types of the columns that a job defines itself."""

from __future__ import annotations

import re
from collections.abc import Iterable
from typing import Annotated

from pydantic import AfterValidator

from batchjob.arrow_types import parse_type

__all__ = [
    "ColumnName",
    "TypeName",
    "check_column_name",
    "check_distinct_names",
]

_NAME = re.compile(r"[^\W\d]\w{0,127}")
_RESERVED_NAMES = {"position", "id", "uri", "etag", "width", "height", "run_id", "model_id"}
_RESERVED_NAMES |= {f"error_{name}" for name in ("stage", "type", "message")}


def check_column_name(name: str) -> str:
    """Return the name if a column of a task may have it, else raise ValueError."""
    if not _NAME.fullmatch(name):
        raise ValueError(f"{name!r} is no name for a column: letters, digits and '_', and no digit first")
    if name.casefold() in _RESERVED_NAMES:
        raise ValueError(f"{name!r} is what batchjob calls a column of its own; take another name")
    return name


def check_distinct_names(names: Iterable[str]) -> None:
    """Raise ValueError if two names differ in case only: many Parquet readers ignore the case."""
    seen: dict[str, str] = {}
    for name in names:
        first = seen.setdefault(name.casefold(), name)
        if first is not name:
            raise ValueError(f"{first!r} and {name!r} would be one column to many readers; rename one")


def _check_type_name(name: str) -> str:
    parse_type(name)
    return name


ColumnName = Annotated[str, AfterValidator(check_column_name)]
"""Name of a column that a job defines; none of the names that every output has."""
TypeName = Annotated[str, AfterValidator(_check_type_name)]
"""Text that `parse_type` reads."""
