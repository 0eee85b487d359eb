"""A job as it was written: plain values that remember where each stood, and what is wrong with them."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from batchjob.errors import InvalidJob

__all__ = ["JobText", "KeyPath", "Place", "Problem"]

KeyPath = tuple[str | int, ...]


@dataclass(frozen=True, slots=True)
class Place:
    """Where a value was written.

    Attributes:
        label: `job.yaml:7:3`, or the override itself.
        order: sorts places as a reader meets them.
        path: what an override's own key already says; None in a file.
    """

    label: str
    order: tuple[int, int, int]
    path: KeyPath | None = None


@dataclass(frozen=True, slots=True)
class Problem:
    """One fault: where, in which key, and the rest of the sentence."""

    place: Place
    path: KeyPath
    sentence: str

    def __str__(self) -> str:
        if not self.path or self.path == self.place.path:
            return f"{self.place.label}: {self.sentence}"
        return f"{self.place.label}: {'.'.join(map(str, self.path))}: {self.sentence}"


@dataclass
class JobText:
    """A job as it was written: `tree` of plain values, and the place of every key and value in it.

    Attributes:
        unresolved: paths whose text still holds a `${name}` without a value; what else is wrong there does not matter.
    """

    file: str
    tree: dict[str, Any] = field(default_factory=dict)
    keys: dict[KeyPath, Place] = field(default_factory=dict)
    values: dict[KeyPath, Place] = field(default_factory=dict)
    problems: list[Problem] = field(default_factory=list)
    unresolved: set[KeyPath] = field(default_factory=set)

    def report(self, path: KeyPath, sentence: str, at_key: bool = False) -> None:
        """Keeps a fault, placed at the nearest thing that was written down."""
        self.problems.append(Problem(self.place(path, at_key), path, sentence))

    def place(self, path: KeyPath, at_key: bool = False) -> Place:
        for depth in range(len(path), -1, -1):
            if at_key and path[:depth] in self.keys:
                return self.keys[path[:depth]]
            if path[:depth] in self.values:
                return self.values[path[:depth]]
        return Place(f"{self.file}:1:1", (0, 1, 1))

    def complain(self) -> None:
        """Raises InvalidJob with every fault, a line each, in the order a reader meets them."""
        if self.problems:
            ordered = sorted(self.problems, key=lambda problem: problem.place.order)
            raise InvalidJob("\n".join(dict.fromkeys(map(str, ordered))))
