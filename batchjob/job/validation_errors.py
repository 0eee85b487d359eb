"""Turns pydantic's errors into plain sentences: one problem per key, each with its location in the job file."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, get_args

from batchjob.job.source_map import KeyPath, SourceMap
from batchjob.settings import Settings
from batchjob.text import closest_match, did_you_mean

if TYPE_CHECKING:
    from pydantic import ValidationError
    from pydantic_core import ErrorDetails

__all__ = ["add_validation_errors"]

# Error types whose location ends with a key that is not in the tree.
_ERRORS_AT_KEY = {"missing", "extra_forbidden"}
# Error type -> the value that was expected; the sentence is "must be … or …, not …".
_EXPECTED = {
    "bool_parsing": "true or false",
    "bool_type": "true or false",
    "dict_type": "a section",
    "finite_number": "a finite number",
    "float_parsing": "a number",
    "float_type": "a number",
    "greater_than": "more than {gt:g}",
    "greater_than_equal": "at least {ge:g}",
    "int_from_float": "a whole number",
    "int_parsing": "a whole number",
    "int_parsing_size": "a smaller whole number",
    "int_type": "a whole number",
    "less_than": "less than {lt:g}",
    "less_than_equal": "at most {le:g}",
    "list_type": "a list",
    "literal_error": "{expected}",
    "mapping_type": "a section",
    "model_attributes_type": "a section",
    "model_type": "a section",
    "none_required": "null",
    "string_type": "text",
    "tuple_type": "a list",
}
# Error type -> the whole sentence.
_SENTENCES = {
    "missing": "is missing",
    "string_too_short": "is empty",
    "string_too_long": "is longer than {max_length} characters",
    "too_long": "has {actual_length} values; {max_length} is the most",
    "too_short": "has {actual_length} values; {min_length} is the least",
}


@dataclass(frozen=True)
class _FieldError:
    """One of pydantic's errors.

    Attributes:
        path: Key path at fault.
        sentence: The whole message; None where `expected` and `value` make it.
        expected: The value that was expected: `a whole number`.
        value: The value that was given.
        intended: Key path that was probably meant, for a key that is not a field.
    """

    path: KeyPath
    sentence: str | None = None
    expected: str = ""
    value: Any = None
    intended: KeyPath | None = None


def add_validation_errors(error: ValidationError, job_class: type[Settings], source_map: SourceMap) -> None:
    """Add one problem to the source map for each key at fault.

    Args:
        error: Pydantic's exception.
        job_class: Class of the job.
        source_map: The job as it was written.
    """
    errors: dict[KeyPath, list[_FieldError]] = {}
    for detail in error.errors(include_url=False):
        field_error = _convert_error(detail, job_class, source_map.tree)
        path = field_error.path
        if not any(path[:depth] in source_map.unresolved for depth in range(len(path) + 1)):
            errors.setdefault(path, []).append(field_error)
    intended = {field_error.intended for same_path in errors.values() for field_error in same_path}
    for path, same_path in errors.items():
        # A union reports the branch that does not fit at all, and the faults inside the branch that does.
        has_inner = any(len(other) > len(path) and other[: len(path)] == path for other in errors)
        is_misspelt = path in intended and same_path[0].sentence == _SENTENCES["missing"]
        sentences = [field_error.sentence for field_error in same_path if field_error.sentence]
        if is_misspelt or (has_inner and not sentences):
            continue
        at_key = same_path[0].intended is not None
        for sentence in dict.fromkeys(sentences or [_describe_wrong_value(same_path)]):
            source_map.add_problem(path, sentence, at_key)


def _describe_wrong_value(errors: Sequence[_FieldError]) -> str:
    value = errors[0].value
    choices = list(dict.fromkeys(error.expected for error in errors))
    hint = did_you_mean(value, re.findall(r"'([^']+)'", " ".join(choices))) if isinstance(value, str) else ""
    if choices == ["text"] and isinstance(value, bool | int | float):
        hint = "; put it in quotes"
    return f"must be {' or '.join(choices)}, not {_format_value(value)}{hint}"


def _convert_error(detail: ErrorDetails, job_class: type[Settings], tree: Mapping[str, Any]) -> _FieldError:
    kind, context, path = detail["type"], detail.get("ctx", {}), _find_path(detail, tree)
    if kind == "extra_forbidden":
        return _unknown_key_error(path, job_class, tree)
    if kind in {"union_tag_not_found", "union_tag_invalid"}:
        return _unknown_type_error(path, context.get("tag"), _list_tags(path, job_class))
    if kind == "missing" and path and isinstance(path[-1], int):
        return _FieldError(path[:-1], "has too few values")
    if kind in {"value_error", "assertion_error"}:
        return _FieldError(path, str(context.get("error", detail["msg"])))
    if kind in _SENTENCES:
        return _FieldError(path, _SENTENCES[kind].format(**context))
    if kind in _EXPECTED:
        return _FieldError(path, expected=_EXPECTED[kind].format(**context), value=detail["input"])
    return _FieldError(path, detail["msg"][:1].lower() + detail["msg"][1:])


def _find_path(detail: ErrorDetails, tree: Mapping[str, Any]) -> KeyPath:
    """Return the key path of an error, without the names of union branches that pydantic puts between the keys.

    An example: pydantic reports `("model", "torchvision", "name")` for the key `model.name`.
    """
    location = detail["loc"]
    path: list[str | int] = []
    node: Any = tree
    for index, part in enumerate(location):
        is_branch = index == 1 and isinstance(node, dict) and part == node.get("type") and location[0] != "params"
        is_inside = part in node if isinstance(node, dict) else isinstance(node, list) and part in range(len(node))
        if is_inside and not is_branch:
            path.append(part)
            node = node[part]
        elif index == len(location) - 1 and detail["type"] in _ERRORS_AT_KEY:
            path.append(part)
    return tuple(path)


def _unknown_type_error(path: KeyPath, tag: str | None, choices: Sequence[str]) -> _FieldError:
    if tag is None:
        return _FieldError((*path, "type"), f"is missing; it is one of {', '.join(choices)}")
    sentence = f"{str(tag)!r} is no {path[-1]} that this version has; it has {', '.join(choices)}"
    return _FieldError((*path, "type"), sentence + did_you_mean(tag, choices))


def _unknown_key_error(path: KeyPath, job_class: type[Settings], tree: Mapping[str, Any]) -> _FieldError:
    key, section = str(path[-1]), ".".join(map(str, path[:-1])) or "job"
    section = f"this {section}" if section in {"job", "input", "model", "task", "output"} else section
    fields = _list_fields(path, job_class, tree)
    match = closest_match(key, fields)
    intended = (*path[:-1], match or key)
    if match is None and len(path) == 1:
        sections = (name for name in job_class.model_fields if key in _list_fields((name, key), job_class, tree))
        match = next((f"{name}.{key}" for name in sections), None)
    hint = f"did you mean {match!r}?" if match else f"it has {', '.join(fields)}"
    return _FieldError(path, f"not a field of {section}; {hint}", intended=intended)


def _list_fields(path: KeyPath, job_class: type[Settings], tree: Mapping[str, Any]) -> list[str]:
    """List the field names that are allowed in place of the last key of `path`."""
    classes: list[type[Settings]] = [job_class]
    node: Any = tree
    for part in path[:-1]:
        node = node.get(part) if isinstance(node, dict) else node[part]
        inner = [
            found
            for outer in classes
            if part in outer.model_fields
            for found in _find_settings_classes(outer.model_fields[str(part)].annotation)
        ]
        tag = node.get("type") if isinstance(node, dict) else None
        tagged = [found for found in inner if _get_tag(found) == tag] if tag is not None else []
        classes = tagged or inner or classes
    return list(dict.fromkeys(name for found in classes for name in _sort_fields(found)))


def _sort_fields(settings_class: type[Settings]) -> list[str]:
    """Sort fields as a person would list them: the class's own first, then the inherited ones."""
    return sorted(settings_class.model_fields, key=lambda name: name not in settings_class.__annotations__)


def _find_settings_classes(annotation: Any) -> list[type[Settings]]:
    """Return the settings classes that a type is made of, without those of their fields."""
    if isinstance(annotation, type) and issubclass(annotation, Settings):
        return [annotation]
    return [found for argument in get_args(annotation) for found in _find_settings_classes(argument)]


def _list_tags(path: KeyPath, job_class: type[Settings]) -> Sequence[str]:
    classes = _find_settings_classes(job_class.model_fields[str(path[0])].annotation) if path else []
    return [tag for tag in map(_get_tag, classes) if tag is not None]


def _get_tag(settings_class: type[Settings]) -> str | None:
    """Return the value of `type` that names a settings class; None if it has no such field."""
    fields = settings_class.model_fields
    literal: Any = fields["type"].annotation if "type" in fields else None
    return str(get_args(literal)[0]) if get_args(literal) else None


def _format_value(value: Any) -> str:
    match value:
        case None:
            return "null"
        case bool():
            return str(value).lower()
        case Mapping():
            return "a section"
        case list() | tuple():
            return "a list"
        case str():
            return repr(str(value) if len(value) <= 60 else value[:59] + "…")
    return str(value)
