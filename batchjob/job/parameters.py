"""Parameters of a job: declared in it, given as `-p name=value`, put in place of `${name}` in any text."""

from __future__ import annotations

import datetime
import re
from collections.abc import Mapping
from typing import Any, Literal

from pydantic import ValidationError

from batchjob.job.source_map import KeyPath, Problem, SourceMap, TextLocation
from batchjob.settings import Settings
from batchjob.text import did_you_mean, redact_assignment

__all__ = ["Param", "substitute_parameters"]

_REFERENCE = re.compile(r"\$(\$\{[^}]*\})|\$\{([^}]*)\}")


class Param(Settings):
    """A value given at run time with `-p name=value`, and put in place of `${name}`.

    Attributes:
        type: what the value must be; a date reads YYYY-MM-DD.
        default: what it is when it is not given; without one it must be given.
    """

    type: Literal["str", "int", "float", "bool", "date"] = "str"
    default: str | int | float | bool | None = None


def substitute_parameters(source_map: SourceMap, given: Mapping[str, str]) -> None:
    """Replaces `${name}` in every string of the tree; what is wrong with a parameter is said once, where it belongs."""
    declared = _declared(source_map)
    values: dict[str, str] = {}
    for number, (name, raw) in enumerate(given.items()):
        place = TextLocation(f"-p {redact_assignment(name, raw)}", (2, number, 0), ())
        if name not in declared:
            known = f"it has {', '.join(declared)}" if declared else "it declares none; add it under params"
            sentence = f"is no parameter of this job{did_you_mean(name, list(declared)) or '; ' + known}"
            source_map.problems.append(Problem(place, (), sentence))
            continue
        converted = _convert(raw, declared[name])
        if converted is None:
            source_map.problems.append(Problem(place, (), f"must be {_KINDS[declared[name].type]}"))
            values[name] = raw
            continue
        values[name] = converted
    for name, param in declared.items():
        if name in values:
            continue
        if param.default is None:
            source_map.add_problem(
                ("params", name), f"needs a value: add -p {name}={_EXAMPLES[param.type]}", at_key=True
            )
            values[name] = f"${{{name}}}"
            continue
        default = _convert(_spelled(param.default), param)
        if default is None:
            source_map.add_problem(("params", name, "default"), f"must be {_KINDS[param.type]}")
        values[name] = default if default is not None else ""
    for key in source_map.tree:
        if key != "params":
            source_map.tree[key] = _ParameterSubstitution(source_map, values, declared).value(
                source_map.tree[key], (key,)
            )


def _declared(text: SourceMap) -> dict[str, Param]:
    """The parameters as far as they are well-formed; `Job` itself says what is wrong with the others."""
    declared = text.tree.get("params")
    found: dict[str, Param] = {}
    for name, raw in (declared if isinstance(declared, dict) else {}).items():
        try:
            found[name] = Param.model_validate(raw)
        except ValidationError:
            found[name] = Param(default="")
    return found


_KINDS = {
    "str": "text",
    "int": "a whole number",
    "float": "a number",
    "bool": "true or false",
    "date": "a date such as 2026-11-19",
}
_EXAMPLES = {"str": "TEXT", "int": "NUMBER", "float": "NUMBER", "bool": "true", "date": "YYYY-MM-DD"}


def _spelled(value: str | float) -> str:
    return str(value).lower() if isinstance(value, bool) else str(value)


def _convert(raw: str, param: Param) -> str | None:
    """The one spelling of a value, so that `07` and `7` name one output; None where it is not of the type."""
    try:
        match param.type:
            case "int":
                return str(int(raw))
            case "float":
                return repr(float(raw))
            case "bool":
                return raw.lower() if raw.lower() in {"true", "false"} else None
            case "date":
                well_formed = re.fullmatch(r"\d{4}-\d\d-\d\d", raw, re.ASCII)
                return datetime.date.fromisoformat(raw).isoformat() if well_formed else None
            case "str":
                return raw
    except ValueError:
        return None


class _ParameterSubstitution:
    """One walk over the tree that puts parameters in."""

    def __init__(self, text: SourceMap, values: Mapping[str, str], declared: Mapping[str, Param]) -> None:
        self.text, self.values, self.declared = text, values, declared

    def value(self, value: Any, path: KeyPath) -> Any:
        if isinstance(value, dict):
            return {key: self.value(item, (*path, key)) for key, item in value.items()}
        if isinstance(value, list):
            return [self.value(item, (*path, index)) for index, item in enumerate(value)]
        if isinstance(value, str) and "${" in value:
            return type(value)(_REFERENCE.sub(lambda match: self.one(match, path), value))
        return value

    def one(self, match: re.Match[str], path: KeyPath) -> str:
        escaped, name = match.groups()
        if escaped is not None:
            return str(escaped)
        if name not in self.values:
            advice = f"; declare it under params, or write $${{{name}}} for itself"
            hint = did_you_mean(name, list(self.declared)) or advice
            self.text.add_problem(path, f"${{{name}}} is no parameter of this job{hint}")
            self.text.unresolved.add(path)
            return match.group()
        if self.values[name] == match.group():
            self.text.unresolved.add(path)
        return self.values[name]
