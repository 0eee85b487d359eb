"""Fingerprint of a job: the settings that decide the predictions, and the differences between two fingerprints."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from typing import Any

__all__ = ["DECIDING_SECTIONS", "compute_fingerprint", "diff_fingerprints", "select_deciding_fields"]

# Sections of a job that decide the predictions.
DECIDING_SECTIONS = ("input", "model", "preprocess", "task", "runtime", "decode")
# Fields of `runtime` that may change a prediction by more than rounding. The other fields of `runtime` do not count.
_RUNTIME_FIELDS = ("precision", "half_weights", "quantize")
# Fields that say when a job may run, or are only checked.
_IGNORED_FIELDS = {"input": ("require",), "model": ("trust", "sha256")}


def compute_fingerprint(document: Mapping[str, Any]) -> dict[str, Any]:
    """Select the fields of a serialized job that decide the predictions.

    Args:
        document: Sections with their explicitly set fields, from `Job.serialize`.

    Returns:
        Sections that are not empty, with these fields.
    """
    selected = {name: select_deciding_fields(name, document.get(name) or {}) for name in DECIDING_SECTIONS}
    return {name: fields for name, fields in selected.items() if fields}


def select_deciding_fields(section: str, fields: Mapping[str, Any]) -> dict[str, Any]:
    """Select the fields of one section that decide the predictions."""
    if section == "runtime":
        return {name: value for name, value in fields.items() if name in _RUNTIME_FIELDS}
    return {name: value for name, value in fields.items() if name not in _IGNORED_FIELDS.get(section, ())}


def diff_fingerprints(there: Mapping[str, Any], here: Mapping[str, Any]) -> list[str]:
    """Compare two fingerprints.

    Args:
        there: Fingerprint of the output's plan.
        here: Fingerprint of the job.

    Returns:
        One line per key that differs, such as `model.weights: V1 there, V2 here`.
    """
    a, b = dict(_flatten(there)), dict(_flatten(here))
    return [
        f"{key}: {_format_value(a, key)} there, {_format_value(b, key)} here"
        for key in dict.fromkeys([*a, *b])
        if key not in a or key not in b or a[key] != b[key]
    ]


def _flatten(document: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    """Yield dotted keys with their values: `{"model": {"name": "x"}}` gives `("model.name", "x")`."""
    for key, value in document.items():
        if isinstance(value, Mapping) and value:
            yield from _flatten(value, f"{prefix}{key}.")
        else:
            yield f"{prefix}{key}", value


def _format_value(values: Mapping[str, Any], key: str) -> str:
    if key not in values:
        return "not set"
    value = values[key]
    text = value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)
    return text if len(text) <= 80 else f"{text[:79]}…"
