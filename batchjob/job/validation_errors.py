"""What pydantic found wrong with a job → plain sentences, one a key, each with its place in the job file."""

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

_NAMES_A_KEY = {"missing", "extra_forbidden"}
# What a value must be, by the kind of the error; the sentence is "must be … or …, not …".
_WANTED = {
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
# Kinds whose sentence stands alone.
_SAID = {
    "missing": "is missing",
    "string_too_short": "is empty",
    "string_too_long": "is longer than {max_length} characters",
    "too_long": "has {actual_length} values; {max_length} is the most",
    "too_short": "has {actual_length} values; {min_length} is the least",
}


@dataclass(frozen=True)
class _FieldError:
    """One error of pydantic's: the key to blame, and a whole `sentence`, or what the value was `wanted` to be."""

    path: KeyPath
    sentence: str | None = None
    wanted: str = ""
    value: Any = None
    meant: KeyPath | None = None


def add_validation_errors(error: ValidationError, job_class: type[Settings], source_map: SourceMap) -> None:
    """Adds a problem to `text` for each key that `error` finds fault with."""
    faults: dict[KeyPath, list[_FieldError]] = {}
    for detail in error.errors(include_url=False):
        fault = _fault(detail, job_class, source_map.tree)
        if not any(fault.path[:depth] in source_map.unresolved for depth in range(len(fault.path) + 1)):
            faults.setdefault(fault.path, []).append(fault)
    meant = {fault.meant for found in faults.values() for fault in found}
    for path, found in faults.items():
        # A union complains about the branch that does not fit at all, and about what is wrong inside the one that does.
        inner = any(len(other) > len(path) and other[: len(path)] == path for other in faults)
        misspelt = path in meant and found[0].sentence == _SAID["missing"]
        sentences = [fault.sentence for fault in found if fault.sentence]
        if misspelt or (inner and not sentences):
            continue
        at_key = found[0].meant is not None
        for sentence in dict.fromkeys(sentences or [_wrong_value(found)]):
            source_map.add_problem(path, sentence, at_key)


def _wrong_value(found: Sequence[_FieldError]) -> str:
    value = found[0].value
    choices = list(dict.fromkeys(fault.wanted for fault in found))
    hint = did_you_mean(value, re.findall(r"'([^']+)'", " ".join(choices))) if isinstance(value, str) else ""
    if choices == ["text"] and isinstance(value, bool | int | float):
        hint = "; put it in quotes"
    return f"must be {' or '.join(choices)}, not {_shown(value)}{hint}"


def _fault(detail: ErrorDetails, job: type[Settings], tree: Mapping[str, Any]) -> _FieldError:
    kind, details, path = detail["type"], detail.get("ctx", {}), _path(detail, tree)
    if kind == "extra_forbidden":
        return _unknown_key(path, job, tree)
    if kind in {"union_tag_not_found", "union_tag_invalid"}:
        return _unknown_type(path, details.get("tag"), _tags(path, job))
    if kind == "missing" and path and isinstance(path[-1], int):
        return _FieldError(path[:-1], "has too few values")
    if kind in {"value_error", "assertion_error"}:
        return _FieldError(path, str(details.get("error", detail["msg"])))
    if kind in _SAID:
        return _FieldError(path, _SAID[kind].format(**details))
    if kind in _WANTED:
        return _FieldError(path, wanted=_WANTED[kind].format(**details), value=detail["input"])
    return _FieldError(path, detail["msg"][:1].lower() + detail["msg"][1:])


def _path(detail: ErrorDetails, tree: Mapping[str, Any]) -> KeyPath:
    """The keys of a location, without the names of union branches that pydantic puts between them."""
    location = detail["loc"]
    path: list[str | int] = []
    node: Any = tree
    for index, part in enumerate(location):
        branch = index == 1 and isinstance(node, dict) and part == node.get("type") and location[0] != "params"
        inside = part in node if isinstance(node, dict) else isinstance(node, list) and part in range(len(node))
        if inside and not branch:
            path.append(part)
            node = node[part]
        elif index == len(location) - 1 and detail["type"] in _NAMES_A_KEY:
            path.append(part)
    return tuple(path)


def _unknown_type(path: KeyPath, given: str | None, choices: Sequence[str]) -> _FieldError:
    if given is None:
        return _FieldError((*path, "type"), f"is missing; it is one of {', '.join(choices)}")
    has = f"{str(given)!r} is no {path[-1]} that this version has; it has {', '.join(choices)}"
    return _FieldError((*path, "type"), has + did_you_mean(given, choices))


def _unknown_key(path: KeyPath, job: type[Settings], tree: Mapping[str, Any]) -> _FieldError:
    key, section = str(path[-1]), ".".join(map(str, path[:-1])) or "job"
    section = f"this {section}" if section in {"job", "input", "model", "task", "output"} else section
    fields = _fields_at(path, job, tree)
    near = closest_match(key, fields)
    meant = (*path[:-1], near or key)
    if near is None and len(path) == 1:
        near = next((f"{name}.{key}" for name in job.model_fields if key in _fields_at((name, key), job, tree)), None)
    hint = f"did you mean {near!r}?" if near else f"it has {', '.join(fields)}"
    return _FieldError(path, f"not a field of {section}; {hint}", meant=meant)


def _fields_at(path: KeyPath, job: type[Settings], tree: Mapping[str, Any]) -> list[str]:
    """Names that may stand where the last key of `path` stands."""
    kinds: list[type[Settings]] = [job]
    node: Any = tree
    for part in path[:-1]:
        node = node.get(part) if isinstance(node, dict) else node[part]
        inner = [
            kind
            for outer in kinds
            if part in outer.model_fields
            for kind in _settings_in(outer.model_fields[str(part)].annotation)
        ]
        tag = node.get("type") if isinstance(node, dict) else None
        tagged = [kind for kind in inner if _tag(kind) == tag] if tag is not None else []
        kinds = tagged or inner or kinds
    return list(dict.fromkeys(name for kind in kinds for name in _own_first(kind)))


def _own_first(kind: type[Settings]) -> list[str]:
    """Fields as a person would list them: what the class is about, then what it shares with others."""
    return sorted(kind.model_fields, key=lambda name: name not in kind.__annotations__)


def _settings_in(annotation: Any) -> list[type[Settings]]:
    if isinstance(annotation, type) and issubclass(annotation, Settings):
        return [annotation]
    return [kind for part in get_args(annotation) for kind in _settings_in(part)]


def _tags(path: KeyPath, job: type[Settings]) -> Sequence[str]:
    kinds = _settings_in(job.model_fields[str(path[0])].annotation) if path else []
    return [tag for tag in map(_tag, kinds) if tag is not None]


def _tag(kind: type[Settings]) -> str | None:
    literal: Any = kind.model_fields["type"].annotation if "type" in kind.model_fields else None
    return str(get_args(literal)[0]) if get_args(literal) else None


def _shown(value: Any) -> str:
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
