"""Fingerprint of a job: the settings that decide the predictions, and the differences between two fingerprints."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from typing import Any

from batchjob.functions.function_target import FUNCTION_KEY

__all__ = [
    "DECIDING_SECTIONS",
    "complete_defaults",
    "compute_fingerprint",
    "diff_fingerprints",
    "select_deciding_fields",
]

# Sections of a job that decide the predictions.
DECIDING_SECTIONS = ("input", "model", "preprocess", "task", "runtime", "decode")
# Fields of `runtime` that may change a prediction by more than rounding. The other fields of `runtime` do not count.
_RUNTIME_FIELDS = ("precision", "half_weights", "quantize")
# Fields that say when a job may run, or are only checked.
_IGNORED_FIELDS = {"input": ("require",), "model": ("trust", "sha256")}
# Behaviour of versions that did not have a field yet, by section and field, or by section, type and field
# (`task.multilabel`): plans of these versions keep it. Add a field here whenever its default is not what the versions
# before it did.
_DEFAULTS_BEFORE_FIELD: dict[str, dict[str, Any]] = {
    "input": {"hidden": True, "delimiter": ","},
    "preprocess": {"transform_input": "tensor"},
    "task.detection": {"keypoints": "drop"},
    "task.classification": {"activation": "softmax"},
    "task.embedding": {"layer": None},
    "task.multilabel": {"activation": "sigmoid"},
    # Weights were looked for under state_dict, model_state_dict and model, even where the file held averaged ones, too.
    "model": {"checkpoint": {"prefer": "plain"}},
}
_MAX_CHARACTERS = 80  # of a value in a line of differences
_CONTEXT_CHARACTERS = 30  # before the first difference of two long values


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


def complete_defaults(defaults: Mapping[str, Any], types: Mapping[str, str]) -> dict[str, Any]:
    """Add to the defaults of a plan the fields that the version which made the plan did not have.

    Args:
        defaults: Fields by section, from the head of the plan; empty in plans of the oldest versions.
        types: Type by section of the job, such as `{"task": "multilabel"}`.

    Returns:
        Fields by section. A field that came later has the value that stands for what earlier versions did.
    """
    names = dict.fromkeys([*(name.partition(".")[0] for name in _DEFAULTS_BEFORE_FIELD), *defaults])
    return {
        name: _DEFAULTS_BEFORE_FIELD.get(name, {})
        | _DEFAULTS_BEFORE_FIELD.get(f"{name}.{types.get(name)}", {})
        | dict(defaults.get(name) or {})
        for name in names
    }


def diff_fingerprints(there: Mapping[str, Any], here: Mapping[str, Any]) -> list[str]:
    """Compare two fingerprints.

    Args:
        there: Fingerprint of the output's plan.
        here: Fingerprint of the job.

    Returns:
        One line per key that differs, such as `model.weights: V1 there, V2 here`.
    """
    there, here = _name_functions(there, here), _name_functions(here, there)
    a, b = dict(_flatten(there)), dict(_flatten(here))
    return [
        "{}: {} there, {} here".format(key, *_shorten(_format_value(a, key), _format_value(b, key)))
        for key in dict.fromkeys([*a, *b])
        if key not in a or key not in b or a[key] != b[key]
    ]


def _name_functions(document: Mapping[str, Any], other: Mapping[str, Any]) -> dict[str, Any]:
    """Replace functions by value by their names where the other document holds another function, or a name.

    Two that have one name differ in their sources or in captured values, one line for each.
    """

    def name_function(value: Any, other_value: Any) -> Any:
        if not isinstance(value, Mapping):
            return value
        if FUNCTION_KEY not in value:
            others = other_value if isinstance(other_value, Mapping) else {}
            return {key: name_function(item, others.get(key)) for key, item in value.items()}
        is_same = isinstance(other_value, Mapping) and other_value.get(FUNCTION_KEY) == value[FUNCTION_KEY]
        return value if is_same else f"a script's function {value[FUNCTION_KEY]}"

    return {key: name_function(value, other.get(key)) for key, value in document.items()}


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
    return value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)


def _shorten(there: str, here: str) -> Iterator[str]:
    """Cut two texts to `_MAX_CHARACTERS`; where they begin alike, from shortly before their first difference.

    Example: two lists of 1000 labels, of which the last ones differ, give `…"cat", "dog"]` and `…"cat", "cow"]`.
    """
    pairs = enumerate(zip(there, here, strict=False))
    same = next((count for count, (a, b) in pairs if a != b), min(len(there), len(here)))
    start = same - _CONTEXT_CHARACTERS if same >= _MAX_CHARACTERS - 1 else 0
    for text in (there, here):
        shown = f"…{text[start:]}" if start else text
        yield shown if len(shown) <= _MAX_CHARACTERS else f"{shown[: _MAX_CHARACTERS - 1]}…"
