"""Job file, overrides and parameters: reads the YAML and collects every fault of its text.

The meaning of keys is checked later, by the settings classes. All faults are reported together.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import yaml

from batchjob.errors import InvalidJob
from batchjob.job.parameters import substitute_parameters
from batchjob.job.source_map import KeyPath, Problem, SourceMap, TextLocation
from batchjob.setting_errors import find_held_secrets
from batchjob.settings import CommandLineText
from batchjob.text import redact_assignment, redact_queries

__all__ = ["read_job_file"]

_MAX_FILE_BYTES = 1 << 20
_MAX_VALUES = 200_000
_MAX_DEPTH = 50


def read_job_file(path: Path, params: Mapping[str, str], overrides: Sequence[str]) -> SourceMap:
    """Read a job file, apply overrides, then substitute parameters.

    Args:
        path: Path of the YAML file.
        params: Values of parameters, as typed.
        overrides: `section.key=value`, as typed.

    Returns:
        The job as it was written; faults are in its `problems`.

    Raises:
        InvalidJob: There is no such file, it is not YAML, or it is too large.
    """
    source_map = SourceMap(str(path))
    root = _parse_yaml(_read_text(path), source_map.file)
    if root is not None:
        tree = _TreeReader(source_map).read(root)
        if isinstance(tree, dict):
            source_map.tree = tree
        else:
            source_map.add_problem((), "must be a mapping of sections: input, model, task, output")
    for number, override in enumerate(overrides):
        _apply_override(source_map, override, number)
    substitute_parameters(source_map, params)
    for fault in find_held_secrets(source_map.tree):
        source_map.add_problem(fault.path, fault.message)
    return source_map


# ---------------------------------------------------------------------------------------------------------------- YAML


class _Yaml12Loader(yaml.SafeLoader):
    """YAML loader with the plain scalars of YAML 1.2's core schema: `no` is text, a date is text, `010` is ten."""

    yaml_implicit_resolvers: dict[str, Any] = {}  # noqa: RUF012  # declared so by yaml


_Yaml12Loader.add_implicit_resolver(
    "tag:yaml.org,2002:null", re.compile(r"^(?:~|null|Null|NULL|)$"), ["~", "n", "N", ""]
)
_Yaml12Loader.add_implicit_resolver(
    "tag:yaml.org,2002:bool", re.compile(r"^(?:true|True|TRUE|false|False|FALSE)$"), [*"tTfF"]
)
_Yaml12Loader.add_implicit_resolver("tag:yaml.org,2002:int", re.compile(r"^[-+]?[0-9]+$"), [*"-+0123456789"])
_Yaml12Loader.add_implicit_resolver(
    "tag:yaml.org,2002:float",
    re.compile(
        r"^(?:[-+]?(?:\.[0-9]+|[0-9]+(?:\.[0-9]*)?)(?:[eE][-+]?[0-9]+)?|[-+]?\.(?:inf|Inf|INF)|\.(?:nan|NaN|NAN))$"
    ),
    [*"-+.0123456789"],
)


def _read_text(path: Path) -> str:
    try:
        with path.open("rb") as stream:
            data = stream.read(_MAX_FILE_BYTES + 1)
    except FileNotFoundError:
        raise InvalidJob(f"{path}: no such file; give the path of a job file") from None
    except IsADirectoryError:
        raise InvalidJob(f"{path}: is a folder; give the path of a job file") from None
    except OSError as error:
        raise InvalidJob(f"{path}: cannot be read: {error.strerror}") from None
    if len(data) > _MAX_FILE_BYTES:
        raise InvalidJob(f"{path}: is larger than 1 MiB; long lists, such as labels, go into a file of their own")
    try:
        return data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise InvalidJob(f"{path}: is not UTF-8 text (byte {error.start}); save it as UTF-8") from None


def _parse_yaml(text: str, file: str) -> yaml.Node | None:
    try:
        return yaml.compose(text, Loader=_Yaml12Loader)
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark or error.context_mark
        position = f":{mark.line + 1}:{mark.column + 1}" if mark else ""
        raise InvalidJob(f"{file}{position}: is not YAML: {error.problem or error.context}") from None
    except yaml.YAMLError as error:
        raise InvalidJob(f"{file}: is not YAML: {str(error).splitlines()[0]}") from None
    except RecursionError:
        raise InvalidJob(f"{file}: is nested too deeply; a job needs no more than {_MAX_DEPTH} levels") from None


class _TreeReader:
    """Reader of YAML nodes: plain values into a tree, locations and problems into the source map.

    Aliases are followed. The number of values and their depth are limited, because a few lines can mean billions of
    values (`a: &a [x, x]`, `b: &b [*a, *a]`, …).
    """

    def __init__(self, source_map: SourceMap) -> None:
        self._source_map = source_map
        self._counts: dict[yaml.Node, float] = {}

    def read(self, root: yaml.Node) -> Any:
        """Read a whole document.

        Raises:
            InvalidJob: It is too large or too deep; raised before any alias is followed.
        """
        self._count_values(root)
        return self._read_value(root, ())

    def _count_values(self, node: yaml.Node) -> float:
        """Count the values in a node once its aliases are followed; each node is visited once."""
        if node not in self._counts:
            self._counts[node] = math.inf  # stays so in a node that contains itself
            entries = node.value if isinstance(node, yaml.CollectionNode) else ()
            children = (child for entry in entries for child in (entry if isinstance(entry, tuple) else (entry,)))
            self._counts[node] = 1 + sum(map(self._count_values, children))
            if self._counts[node] > _MAX_VALUES:
                raise self._too_large_error(node)
        return self._counts[node]

    def _too_large_error(self, node: yaml.Node) -> InvalidJob:
        return InvalidJob(f"{self._label(node)}: is too large or too deep once its aliases are followed; write it out")

    def _read_value(self, node: yaml.Node, path: KeyPath) -> Any:
        if len(path) > _MAX_DEPTH:
            raise self._too_large_error(node)
        self._source_map.value_locations[path] = self._locate(node)
        if isinstance(node, yaml.MappingNode):
            return self._read_mapping(node, path)
        if isinstance(node, yaml.SequenceNode):
            return [self._read_value(item, (*path, index)) for index, item in enumerate(node.value)]
        return self._read_scalar(node, path)

    def _read_mapping(self, node: yaml.MappingNode, path: KeyPath) -> dict[str, Any]:
        mapping: dict[str, Any] = {}
        for key_node, value_node in node.value:
            if not isinstance(key_node, yaml.ScalarNode):
                self._add_problem(key_node, path, "has a key that is not text")
                continue
            key: str = key_node.value
            key_path = (*path, key)
            if key in mapping:
                first_line = self._source_map.key_locations[key_path].sort_key[1]
                self._add_problem(key_node, key_path, f"is given twice, first in line {first_line}; keep one")
                continue
            self._source_map.key_locations[key_path] = self._locate(key_node)
            mapping[key] = self._read_value(value_node, key_path)
        return mapping

    def _read_scalar(self, node: yaml.Node, path: KeyPath) -> Any:
        text: str = node.value
        match node.tag.removeprefix("tag:yaml.org,2002:"):
            case "str":
                return text
            case "null":
                return None
            case "bool":
                return text.lower() == "true"
            case "int" | "float" as kind:
                return self._read_number(node, path, kind)
        self._add_problem(node, path, f"has the tag {node.tag}, which a job does not know; leave it out")
        return text

    def _read_number(self, node: yaml.Node, path: KeyPath, kind: str) -> float | str:
        text: str = node.value
        try:
            # Python reads inf and nan without YAML's dot.
            return int(text) if kind == "int" else float(re.sub(r"\.(?=[iInN])", "", text))
        except ValueError:
            self._add_problem(node, path, f"is no number: {text[:40]!r}")
            return text

    def _add_problem(self, node: yaml.Node, path: KeyPath, message: str) -> None:
        self._source_map.problems.append(Problem(self._locate(node), path, message))

    def _locate(self, node: yaml.Node) -> TextLocation:
        mark = node.start_mark
        return TextLocation(self._label(node), (0, mark.line + 1, mark.column + 1))

    def _label(self, node: yaml.Node) -> str:
        return f"{self._source_map.file}:{node.start_mark.line + 1}:{node.start_mark.column + 1}"


# ----------------------------------------------------------------------------------------------------------- overrides


def _apply_override(source_map: SourceMap, override: str, number: int) -> None:
    """Set one `section.key=value` in the tree; sections that are missing are added.

    Args:
        source_map: The job.
        override: The override, as typed.
        number: Its index on the command line, from 0.
    """
    key, equals, text = override.partition("=")
    path: KeyPath = tuple(key.strip().split("."))
    location = TextLocation(redact_assignment(key, text) if equals else redact_queries(override), (1, number, 0), path)
    if not equals or not all(path):
        message = "is no override; write section.key=value, for instance runtime.batch_size=64"
        source_map.problems.append(Problem(location, (), message))
        return
    section: Any = source_map.tree
    for depth, name in enumerate(path[:-1], start=1):
        if section.get(name) is None:
            section[name] = {}
            source_map.key_locations[path[:depth]] = source_map.value_locations[path[:depth]] = location
        section = section[name]
        if not isinstance(section, dict):
            message = f"{'.'.join(map(str, path[:depth]))} is no section; give it whole, or take it out of the job file"
            source_map.problems.append(Problem(location, path, message))
            return
    for locations in (source_map.key_locations, source_map.value_locations):
        for old in [old for old in locations if old[: len(path)] == path]:
            del locations[old]
    section[path[-1]] = _parse_override_value(text)
    source_map.key_locations[path] = source_map.value_locations[path] = location


def _parse_override_value(text: str) -> Any:
    """Read a value as YAML reads it on one line. Text that is not YAML, such as `*.png`, stays text."""
    scratch = SourceMap("")
    try:
        node = _parse_yaml(text, "")
        if node is None:
            return None
        value = _TreeReader(scratch).read(node)
    except InvalidJob:
        return CommandLineText(text)
    is_block = isinstance(node, yaml.CollectionNode) and not node.flow_style
    return CommandLineText(text) if is_block or scratch.problems else _mark_command_line_text(value)


def _mark_command_line_text(value: Any) -> Any:
    """Mark all texts in a value as typed: relative paths in them resolve against the working directory."""
    if isinstance(value, dict):
        return {key: _mark_command_line_text(item) for key, item in value.items()}
    if isinstance(value, list):
        return [_mark_command_line_text(item) for item in value]
    return CommandLineText(value) if isinstance(value, str) else value
