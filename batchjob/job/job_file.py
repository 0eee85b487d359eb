"""The text of a job: YAML, typed overrides and parameters → one tree of plain values that remembers where each stood.

Nothing is looked up here: what a key means is `job.py`'s business. Faults are collected, so that all of them are said
at once.
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
from batchjob.settings import CommandLineText
from batchjob.text import find_held_secret, redact_assignment, redact_queries

__all__ = ["read_job_file"]

SIZE_LIMIT = 1 << 20
VALUE_LIMIT = 200_000
DEPTH_LIMIT = 50


def read_job_file(
    path: Path, params: Mapping[str, str], overrides: Sequence[str], file: str | None = None
) -> SourceMap:
    """The job file at `path` with overrides laid over it and parameters put in.

    Raises:
        InvalidJob: there is no such file, or it is not YAML. Every other fault is in `problems`.
    """
    text = SourceMap(file or str(path))
    root = _compose(_content(path, text.file), text.file)
    if root is not None:
        tree = _TreeReader(text).read(root)
        if isinstance(tree, dict):
            text.tree = tree
        else:
            text.add_problem((), "must be a mapping of sections: input, model, task, output")
    for number, override in enumerate(overrides):
        _override(text, override, number)
    substitute_parameters(text, params)
    _refuse_held(text, text.tree, ())
    return text


class _Yaml12Loader(yaml.SafeLoader):
    """YAML with the plain scalars of its 1.2 core schema: `no` is text, a date is text, `010` is ten."""

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


def _content(path: Path, file: str) -> str:
    try:
        with path.open("rb") as stream:
            data = stream.read(SIZE_LIMIT + 1)
    except FileNotFoundError:
        raise InvalidJob(f"{file}: no such file; give the path of a job file") from None
    except IsADirectoryError:
        raise InvalidJob(f"{file}: is a folder; give the path of a job file") from None
    except OSError as error:
        raise InvalidJob(f"{file}: cannot be read: {error.strerror}") from None
    if len(data) > SIZE_LIMIT:
        raise InvalidJob(f"{file}: is larger than 1 MiB; long lists, such as labels, go into a file of their own")
    try:
        return data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise InvalidJob(f"{file}: is not UTF-8 text (byte {error.start}); save it as UTF-8") from None


def _compose(content: str, file: str) -> yaml.Node | None:
    try:
        return yaml.compose(content, Loader=_Yaml12Loader)
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark or error.context_mark
        where = f":{mark.line + 1}:{mark.column + 1}" if mark else ""
        raise InvalidJob(f"{file}{where}: is not YAML: {error.problem or error.context}") from None
    except yaml.YAMLError as error:
        raise InvalidJob(f"{file}: is not YAML: {str(error).splitlines()[0]}") from None
    except RecursionError:
        raise InvalidJob(f"{file}: is nested too deeply; a job needs no more than {DEPTH_LIMIT} levels") from None


class _TreeReader:
    """Nodes → plain values. Aliases are followed; number and depth are bounded, for a few lines can mean billions."""

    def __init__(self, text: SourceMap) -> None:
        self.text = text
        self.sizes: dict[yaml.Node, float] = {}

    def read(self, root: yaml.Node) -> Any:
        """All of it. Raises InvalidJob where it is beyond the bounds, before any alias is followed."""
        self.size(root)
        return self.value(root, ())

    def size(self, node: yaml.Node) -> float:
        """How many values there are once all aliases are followed; each node is looked at once."""
        if node not in self.sizes:
            self.sizes[node] = math.inf  # where it holds itself
            parts = node.value if isinstance(node, yaml.CollectionNode) else ()
            inside = (part for pair in parts for part in (pair if isinstance(pair, tuple) else (pair,)))
            self.sizes[node] = 1 + sum(map(self.size, inside))
            if self.sizes[node] > VALUE_LIMIT:
                raise self.beyond(node)
        return self.sizes[node]

    def beyond(self, node: yaml.Node) -> InvalidJob:
        return InvalidJob(f"{self.label(node)}: is too large or too deep once its aliases are followed; write it out")

    def value(self, node: yaml.Node, path: KeyPath) -> Any:
        if len(path) > DEPTH_LIMIT:
            raise self.beyond(node)
        self.text.value_locations[path] = self.place(node)
        if isinstance(node, yaml.MappingNode):
            return self.mapping(node, path)
        if isinstance(node, yaml.SequenceNode):
            return [self.value(item, (*path, index)) for index, item in enumerate(node.value)]
        return self.scalar(node, path)

    def mapping(self, node: yaml.MappingNode, path: KeyPath) -> dict[str, Any]:
        result: dict[str, Any] = {}
        for key_node, value_node in node.value:
            if not isinstance(key_node, yaml.ScalarNode):
                self.problem(key_node, path, "has a key that is not text")
                continue
            key: str = key_node.value
            here = (*path, key)
            if key in result:
                first = self.text.key_locations[here].sort_key[1]
                self.problem(key_node, here, f"is given twice, first in line {first}; keep one")
                continue
            self.text.key_locations[here] = self.place(key_node)
            result[key] = self.value(value_node, here)
        return result

    def scalar(self, node: yaml.Node, path: KeyPath) -> Any:
        raw: str = node.value
        match node.tag.removeprefix("tag:yaml.org,2002:"):
            case "str":
                return raw
            case "null":
                return None
            case "bool":
                return raw.lower() == "true"
            case "int" | "float" as kind:
                return self.number(node, path, kind)
        self.problem(node, path, f"has the tag {node.tag}, which a job does not know; leave it out")
        return raw

    def number(self, node: yaml.Node, path: KeyPath, kind: str) -> float | str:
        raw: str = node.value
        try:
            # Python reads inf and nan without YAML's dot.
            return int(raw) if kind == "int" else float(re.sub(r"\.(?=[iInN])", "", raw))
        except ValueError:
            self.problem(node, path, f"is no number: {raw[:40]!r}")
            return raw

    def problem(self, node: yaml.Node, path: KeyPath, sentence: str) -> None:
        self.text.problems.append(Problem(self.place(node), path, sentence))

    def place(self, node: yaml.Node) -> TextLocation:
        mark = node.start_mark
        return TextLocation(self.label(node), (0, mark.line + 1, mark.column + 1))

    def label(self, node: yaml.Node) -> str:
        return f"{self.text.file}:{node.start_mark.line + 1}:{node.start_mark.column + 1}"


def _refuse_held(text: SourceMap, value: Any, path: KeyPath) -> None:
    """What stands in a job goes into its plan; a secret of the environment must not."""
    if isinstance(value, dict | list):
        for key, item in value.items() if isinstance(value, dict) else enumerate(value):
            _refuse_held(text, item, (*path, key))
    elif isinstance(value, str) and (name := find_held_secret(value)):
        sentence = f"holds the value of the environment variable {name}; a job never holds credentials: leave it there"
        text.add_problem(path, sentence)


def _override(text: SourceMap, override: str, number: int) -> None:
    """Lays one `section.key=value` over the tree; sections that are not there are made."""
    key, equals, raw = override.partition("=")
    path: KeyPath = tuple(key.strip().split("."))
    place = TextLocation(redact_assignment(key, raw) if equals else redact_queries(override), (1, number, 0), path)
    if not equals or not all(path):
        sentence = "is no override; write section.key=value, for instance runtime.batch_size=64"
        text.problems.append(Problem(place, (), sentence))
        return
    section: Any = text.tree
    for depth, name in enumerate(path[:-1], start=1):
        if section.get(name) is None:
            section[name] = {}
            text.key_locations[path[:depth]] = text.value_locations[path[:depth]] = place
        section = section[name]
        if not isinstance(section, dict):
            sentence = (
                f"{'.'.join(map(str, path[:depth]))} is no section; give it whole, or take it out of the job file"
            )
            text.problems.append(Problem(place, path, sentence))
            return
    for written in (text.key_locations, text.value_locations):
        for old in [old for old in written if old[: len(path)] == path]:
            del written[old]
    section[path[-1]] = _typed(raw)
    text.key_locations[path] = text.value_locations[path] = place


def _typed(raw: str) -> Any:
    """A value as YAML would read it on one line; what is no such thing (`*.png`) is text."""
    scratch = SourceMap("")
    try:
        node = _compose(raw, "")
        if node is None:
            return None
        value = _TreeReader(scratch).read(node)
    except InvalidJob:
        return CommandLineText(raw)
    block = isinstance(node, yaml.CollectionNode) and not node.flow_style
    return CommandLineText(raw) if block or scratch.problems else _mark_typed(value)


def _mark_typed(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _mark_typed(item) for key, item in value.items()}
    if isinstance(value, list):
        return [_mark_typed(item) for item in value]
    return CommandLineText(value) if isinstance(value, str) else value
