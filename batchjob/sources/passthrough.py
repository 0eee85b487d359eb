"""Columns of a manifest that a job copies to its output: their names, new names and types."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Annotated, Any, Literal

import pyarrow as pa
from pydantic import AfterValidator, Field

from batchjob.arrow_types import parse_flat_type

__all__ = ["ColumnName", "Passthrough", "PassthroughColumn", "parse_passthrough"]

# Names that the manifest's own keys give to columns.
_RESERVED_NAMES = {"uri", "location", "size", "etag", "id"}


@dataclass(frozen=True)
class PassthroughColumn:
    """A column that is copied.

    Attributes:
        column: Name in the manifest.
        name: Name in the output.
        type: Type in the output; None keeps that of the manifest.
    """

    column: str
    name: str
    type: pa.DataType | None


def parse_passthrough(setting: Sequence[str] | Mapping[str, Any]) -> tuple[PassthroughColumn, ...]:
    """Return the columns of a setting: `[sku]`, `{sku: int64}` or `{label: {as: label_true, type: int64}}`."""
    if not isinstance(setting, Mapping):
        return tuple(PassthroughColumn(name, name, None) for name in setting)
    columns = []
    for column, rule in setting.items():
        rules = {"type": rule} if isinstance(rule, str) else rule
        column_type = parse_flat_type(rules["type"]) if "type" in rules else None
        columns.append(PassthroughColumn(column, rules.get("as", column), column_type))
    return tuple(columns)


def _check_type(name: str) -> str:
    parse_flat_type(name)
    return name


def _check_rule(rule: dict[str, str]) -> dict[str, str]:
    if "type" in rule:
        parse_flat_type(rule["type"])
    return rule


def _check_names(setting: Sequence[str] | Mapping[str, Any]) -> Any:
    names = [column.name for column in parse_passthrough(setting)]
    if duplicates := sorted({name for name in names if names.count(name) > 1}):
        raise ValueError(f"names {', '.join(map(repr, duplicates))} twice")
    if reserved := sorted(_RESERVED_NAMES.intersection(names)):
        raise ValueError(
            f"{', '.join(map(repr, reserved))} is what batchjob calls a column of its own; rename it, as in "
            f"passthrough: {{{reserved[0]}: {{as: my_{reserved[0]}}}}}, or leave it out (uri, size, etag and id have "
            f"keys of their own here)"
        )
    return setting


ColumnName = Annotated[str, Field(min_length=1)]
_Rule = Annotated[dict[Literal["as", "type"], ColumnName], AfterValidator(_check_rule)]
_ColumnRules = dict[ColumnName, Annotated[str, AfterValidator(_check_type)] | _Rule]
Passthrough = Annotated[tuple[ColumnName, ...] | _ColumnRules, AfterValidator(_check_names)]
"""Columns by name; or each with its type, or with a new name and a type."""
