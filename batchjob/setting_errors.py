"""Sentences in place of pydantic's errors: one fault per key, for a job file and for settings built in Python."""

from __future__ import annotations

import os
import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, get_args

from pydantic import BaseModel

from batchjob.errors import InvalidJob
from batchjob.text import closest_match, did_you_mean, find_held_secret, with_article

if TYPE_CHECKING:
    from pydantic import ValidationError
    from pydantic_core import ErrorDetails

__all__ = [
    "FieldFault",
    "KeyPath",
    "find_held_secrets",
    "invalid_settings_error",
    "join_faults",
    "list_field_faults",
]

KeyPath = tuple[str | int, ...]
"""Keys and list indices from the root to a value: `("input", "passthrough", 0)`."""

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
class FieldFault:
    """Fault of one key.

    Attributes:
        path: Key path at fault; empty for the whole job.
        message: Rest of the sentence: `must be at most 1, not 7`.
        at_key: True if the key itself is at fault, False if its value is.
    """

    path: KeyPath
    message: str
    at_key: bool = False


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


def list_field_faults(
    error: ValidationError,
    settings_class: type[BaseModel],
    tree: Mapping[str, Any],
    is_ignored: Callable[[KeyPath], bool] = lambda path: False,
) -> list[FieldFault]:
    """Convert pydantic's errors to one fault for each key.

    Args:
        error: Pydantic's exception.
        settings_class: Class that was validated.
        tree: Plain values that were given.
        is_ignored: Returns True for a path whose faults are not to be reported.
    """
    errors: dict[KeyPath, list[_FieldError]] = {}
    for detail in error.errors(include_url=False):
        field_error = _convert_error(detail, settings_class, tree)
        if not is_ignored(field_error.path):
            errors.setdefault(field_error.path, []).append(field_error)
    intended = {field_error.intended for same_path in errors.values() for field_error in same_path}
    faults = []
    for path, same_path in errors.items():
        # A union reports the branch that does not fit at all, and the faults inside the branch that does.
        has_inner = any(len(other) > len(path) and other[: len(path)] == path for other in errors)
        is_misspelt = path in intended and same_path[0].sentence == _SENTENCES["missing"]
        sentences = [field_error.sentence for field_error in same_path if field_error.sentence]
        if is_misspelt or (has_inner and not sentences):
            continue
        at_key = same_path[0].intended is not None
        messages = dict.fromkeys(sentences or [_describe_wrong_value(same_path)])
        faults += [FieldFault(path, message, at_key) for message in messages]
    return faults


def invalid_settings_error(
    settings_class: type[BaseModel], values: Mapping[str, Any], error: ValidationError
) -> InvalidJob:
    """Make the exception for settings that were built in Python from wrong values.

    Example: `TorchvisionModel.nmae: not a field of TorchvisionModel; did you mean 'name'?`, one line a fault.
    """
    faults = list_field_faults(error, settings_class, {name: _as_tree(value) for name, value in values.items()})
    return InvalidJob(join_faults(settings_class.__name__, faults))


def find_held_secrets(tree: Any, path: KeyPath = ()) -> Iterator[FieldFault]:
    """Yield a fault for each text that holds a secret of the environment: a job's text goes into its plan.

    Args:
        tree: Plain values of a job.
        path: Key path of the values.
    """
    if isinstance(tree, dict | list | tuple):
        for key, item in tree.items() if isinstance(tree, dict) else enumerate(tree):
            yield from find_held_secrets(item, (*path, key))
    elif isinstance(tree, str) and (name := find_held_secret(tree)):
        message = f"holds the value of the environment variable {name}; a job never holds credentials: leave it there"
        yield FieldFault(path, message)


def join_faults(name: str, faults: Iterable[FieldFault]) -> str:
    """Return the message on settings built in Python, such as `Job.model.seed: must be …`, one line a fault."""
    return "\n".join(f"{'.'.join(map(str, (name, *fault.path)))}: {fault.message}" for fault in faults)


def _as_tree(value: Any) -> Any:
    """Return settings as a dictionary of their fields, at any depth."""
    match value:
        case BaseModel() | Mapping():
            return {name: _as_tree(item) for name, item in dict(value).items()}
        case list() | tuple():
            return [_as_tree(item) for item in value]
    return value


def _describe_wrong_value(errors: Sequence[_FieldError]) -> str:
    value = errors[0].value
    choices = list(dict.fromkeys(error.expected for error in errors))
    hint = did_you_mean(value, re.findall(r"'([^']+)'", " ".join(choices))) if isinstance(value, str) else ""
    if choices == ["text"] and isinstance(value, bool | int | float):
        hint = "; put it in quotes"
    elif isinstance(value, os.PathLike):
        hint = "; write str(path)"
    return f"must be {' or '.join(choices)}, not {_format_value(value)}{hint}"


def _convert_error(detail: ErrorDetails, settings_class: type[BaseModel], tree: Mapping[str, Any]) -> _FieldError:
    kind, context, path = detail["type"], detail.get("ctx", {}), _find_path(detail, tree)
    if kind == "extra_forbidden":
        return _unknown_key_error(path, settings_class, tree)
    if kind in {"union_tag_not_found", "union_tag_invalid"}:
        return _unknown_type_error(path, context.get("tag"), _list_tags(path, settings_class))
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


def _unknown_key_error(path: KeyPath, settings_class: type[BaseModel], tree: Mapping[str, Any]) -> _FieldError:
    whole = "job" if settings_class.__name__ == "Job" else settings_class.__name__
    key, section = str(path[-1]), ".".join(map(str, path[:-1])) or whole
    section = f"this {section}" if section in {"job", "input", "model", "task", "output"} else section
    fields = _list_fields(path, settings_class, tree)
    match = closest_match(key, fields)
    intended = (*path[:-1], match or key)
    if match is None and len(path) == 1:
        names = settings_class.model_fields
        sections = (name for name in names if key in _list_fields((name, key), settings_class, tree))
        match = next((f"{name}.{key}" for name in sections), None)
    hint = f"did you mean {match!r}?" if match else f"it has {', '.join(fields)}"
    return _FieldError(path, f"not a field of {section}; {hint}", intended=intended)


def _list_fields(path: KeyPath, settings_class: type[BaseModel], tree: Mapping[str, Any]) -> list[str]:
    """List the field names that are allowed in place of the last key of `path`."""
    classes: list[type[BaseModel]] = [settings_class]
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


def _sort_fields(settings_class: type[BaseModel]) -> list[str]:
    """Sort fields as a person would list them: the class's own first, then the inherited ones."""
    return sorted(settings_class.model_fields, key=lambda name: name not in settings_class.__annotations__)


def _find_settings_classes(annotation: Any) -> list[type[BaseModel]]:
    """Return the settings classes that a type is made of, without those of their fields."""
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        return [annotation]
    return [found for argument in get_args(annotation) for found in _find_settings_classes(argument)]


def _list_tags(path: KeyPath, settings_class: type[BaseModel]) -> Sequence[str]:
    classes = _find_settings_classes(settings_class.model_fields[str(path[0])].annotation) if path else []
    return [tag for tag in map(_get_tag, classes) if tag is not None]


def _get_tag(settings_class: type[BaseModel]) -> str | None:
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
        case int() | float():
            return str(value)
    return with_article(type(value).__name__)
