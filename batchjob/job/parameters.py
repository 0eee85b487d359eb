"""Parameters of a job: declared in it, given as `-p name=value`, substituted for `${name}` in any text."""

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

# `$${name}` stands for the text `${name}`.
_REFERENCE = re.compile(r"\$(\$\{[^}]*\})|\$\{([^}]*)\}")
_TYPE_NAMES = {
    "str": "text",
    "int": "a whole number",
    "float": "a number",
    "bool": "true or false",
    "date": "a date such as 2026-11-19",
}
_PLACEHOLDERS = {"str": "TEXT", "int": "NUMBER", "float": "NUMBER", "bool": "true", "date": "YYYY-MM-DD"}


class Param(Settings):
    """A value given at run time with `-p name=value`, which replaces `${name}`.

    Attributes:
        type: Type of the value; a date reads YYYY-MM-DD.
        default: Value where none is given; null requires one.
    """

    type: Literal["str", "int", "float", "bool", "date"] = "str"
    default: str | int | float | bool | None = None


def substitute_parameters(source_map: SourceMap, given: Mapping[str, str]) -> None:
    """Replace `${name}` in every text of a job. Faults of a parameter are reported once, at its declaration or value.

    Args:
        source_map: The job; its tree is changed.
        given: Values by name, as typed.
    """
    declared = _read_declarations(source_map)
    values = _convert_given(source_map, declared, given)
    for name, param in declared.items():
        if name in values:
            continue
        if param.default is None:
            message = f"needs a value: add -p {name}={_PLACEHOLDERS[param.type]}"
            source_map.add_problem(("params", name), message, at_key=True)
            values[name] = f"${{{name}}}"
            continue
        text = str(param.default)
        default = _convert(text.lower() if isinstance(param.default, bool) else text, param)
        if default is None:
            source_map.add_problem(("params", name, "default"), f"must be {_TYPE_NAMES[param.type]}")
        values[name] = default if default is not None else ""
    substitution = _ParameterSubstitution(source_map, values, declared)
    for key in source_map.tree:
        if key != "params":
            source_map.tree[key] = substitution.apply(source_map.tree[key], (key,))


def _read_declarations(source_map: SourceMap) -> dict[str, Param]:
    """Return the declared parameters. Faults in a declaration are reported later, when `Job` is validated."""
    section = source_map.tree.get("params")
    declared: dict[str, Param] = {}
    for name, value in (section if isinstance(section, dict) else {}).items():
        try:
            declared[name] = Param.model_validate(value)
        except ValidationError:
            declared[name] = Param(default="")
    return declared


def _convert_given(source_map: SourceMap, declared: Mapping[str, Param], given: Mapping[str, str]) -> dict[str, str]:
    values: dict[str, str] = {}
    for number, (name, text) in enumerate(given.items()):
        location = TextLocation(f"-p {redact_assignment(name, text)}", (2, number, 0), ())
        if name not in declared:
            known = f"it has {', '.join(declared)}" if declared else "it declares none; add it under params"
            message = f"is no parameter of this job{did_you_mean(name, list(declared)) or '; ' + known}"
            source_map.problems.append(Problem(location, (), message))
            continue
        converted = _convert(text, declared[name])
        if converted is None:
            source_map.problems.append(Problem(location, (), f"must be {_TYPE_NAMES[declared[name].type]}"))
        values[name] = text if converted is None else converted
    return values


def _convert(text: str, param: Param) -> str | None:
    """Normalize a value, so that `07` and `7` name one output.

    Returns:
        Its only spelling; None if it is not of the parameter's type.
    """
    try:
        match param.type:
            case "int":
                return str(int(text))
            case "float":
                return repr(float(text))
            case "bool":
                return text.lower() if text.lower() in {"true", "false"} else None
            case "date":
                # fromisoformat also accepts other forms, such as 20261119.
                well_formed = re.fullmatch(r"\d{4}-\d\d-\d\d", text, re.ASCII)
                return datetime.date.fromisoformat(text).isoformat() if well_formed else None
            case "str":
                return text
    except ValueError:
        return None


class _ParameterSubstitution:
    """Substitution of parameters in a tree of values.

    Args:
        source_map: The job; faults are added to it.
        values: Value of each parameter; `${name}` itself for one without a value.
        declared: Declared parameters, for suggestions.
    """

    def __init__(self, source_map: SourceMap, values: Mapping[str, str], declared: Mapping[str, Param]) -> None:
        self._source_map, self._values, self._declared = source_map, values, declared

    def apply(self, value: Any, path: KeyPath) -> Any:
        """Return the value with parameters substituted in all its texts."""
        if isinstance(value, dict):
            return {key: self.apply(item, (*path, key)) for key, item in value.items()}
        if isinstance(value, list):
            return [self.apply(item, (*path, index)) for index, item in enumerate(value)]
        if isinstance(value, str) and "${" in value:
            # A text typed on the command line keeps its class.
            return type(value)(_REFERENCE.sub(lambda match: self._resolve(match, path), value))
        return value

    def _resolve(self, match: re.Match[str], path: KeyPath) -> str:
        escaped, name = match.groups()
        if escaped is not None:
            return str(escaped)
        if name == "HOME" and name not in self._values and re.fullmatch(r"\$\{HOME\}(/(?s:.*))?", match.string):
            return match.group()  # A path may begin with the home folder; `Uri` expands it.
        if name not in self._values:
            advice = f"; declare it under params, or write $${{{name}}} for itself"
            hint = did_you_mean(name, list(self._declared)) or advice
            self._source_map.add_problem(path, f"${{{name}}} is no parameter of this job{hint}")
            self._source_map.unresolved.add(path)
            return match.group()
        if self._values[name] == match.group():
            self._source_map.unresolved.add(path)
        return self._values[name]
