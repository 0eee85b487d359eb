"""A job as it was written: plain values that remember where each stood, and what is wrong with them."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from batchjob.errors import InvalidJob

__all__ = ["KeyPath", "Problem", "SourceMap", "TextLocation"]

KeyPath = tuple[str | int, ...]


@dataclass(frozen=True, slots=True)
class TextLocation:
    """Where a value was written.

    Attributes:
        label: `job.yaml:7:3`, or the override itself.
        order: sorts places as a reader meets them.
        path: what an override's own key already says; None in a file.
    """

    label: str
    sort_key: tuple[int, int, int]
    path: KeyPath | None = None


@dataclass(frozen=True, slots=True)
class Problem:
    """One fault: where, in which key, and the rest of the sentence."""

    location: TextLocation
    path: KeyPath
    message: str

    def __str__(self) -> str:
        if not self.path or self.path == self.location.path:
            return f"{self.location.label}: {self.message}"
        return f"{self.location.label}: {'.'.join(map(str, self.path))}: {self.message}"


@dataclass
class SourceMap:
    """A job as it was written: `tree` of plain values, and the place of every key and value in it.

    Attributes:
        unresolved: paths whose text still holds a `${name}` without a value; what else is wrong there does not matter.
    """

    file: str
    tree: dict[str, Any] = field(default_factory=dict)
    key_locations: dict[KeyPath, TextLocation] = field(default_factory=dict)
    value_locations: dict[KeyPath, TextLocation] = field(default_factory=dict)
    problems: list[Problem] = field(default_factory=list)
    unresolved: set[KeyPath] = field(default_factory=set)

    def add_problem(self, path: KeyPath, message: str, at_key: bool = False) -> None:
        """Keeps a fault, placed at the nearest thing that was written down."""
        self.problems.append(Problem(self.locate(path, at_key), path, message))

    def locate(self, path: KeyPath, at_key: bool = False) -> TextLocation:
        for depth in range(len(path), -1, -1):
            if at_key and path[:depth] in self.key_locations:
                return self.key_locations[path[:depth]]
            if path[:depth] in self.value_locations:
                return self.value_locations[path[:depth]]
        return TextLocation(f"{self.file}:1:1", (0, 1, 1))

    def raise_if_invalid(self) -> None:
        """Raises InvalidJob with every fault, a line each, in the order a reader meets them."""
        if self.problems:
            ordered = sorted(self.problems, key=lambda problem: problem.location.sort_key)
            raise InvalidJob("\n".join(dict.fromkeys(map(str, ordered))))
