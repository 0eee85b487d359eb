"""Source map of a job: plain values, the location in the text of each key and value, and the problems found."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from batchjob.errors import InvalidJob
from batchjob.setting_errors import KeyPath

__all__ = ["KeyPath", "Problem", "SourceMap", "TextLocation"]


@dataclass(frozen=True, slots=True)
class TextLocation:
    """Location of a key or value in what the user wrote.

    Attributes:
        label: `job.yaml:7:3`, or the override or parameter as typed.
        sort_key: Order in which a reader meets locations: (0, line, column) in the file, (1, number, 0) for an
            override, (2, number, 0) for a parameter.
        path: Key path that an override names itself; messages do not repeat it. None in a file.
    """

    label: str
    sort_key: tuple[int, int, int]
    path: KeyPath | None = None


@dataclass(frozen=True, slots=True)
class Problem:
    """One fault of a job.

    Attributes:
        location: Location that the message points at.
        path: Key path at fault; empty for the whole job.
        message: Rest of the sentence: `must be at most 1, not 7`.
    """

    location: TextLocation
    path: KeyPath
    message: str

    def __str__(self) -> str:
        if not self.path or self.path == self.location.path:
            return f"{self.location.label}: {self.message}"
        return f"{self.location.label}: {'.'.join(map(str, self.path))}: {self.message}"


@dataclass
class SourceMap:
    """A job as it was written.

    An example, for the file `job.yaml` with the line `task: {top_k: five}`:

        tree             {"task": {"top_k": "five"}}
        key_locations    ("task",): 1:1    ("task", "top_k"): 1:8
        value_locations  (): 1:1           ("task",): 1:7           ("task", "top_k"): 1:15

    Attributes:
        file: Path of the job file, as messages show it.
        tree: Plain values.
        key_locations: Location of each key.
        value_locations: Location of each value.
        problems: Faults found so far.
        unresolved: Paths of texts that hold a `${name}` without a value. Other faults there are not reported.
    """

    file: str
    tree: dict[str, Any] = field(default_factory=dict)
    key_locations: dict[KeyPath, TextLocation] = field(default_factory=dict)
    value_locations: dict[KeyPath, TextLocation] = field(default_factory=dict)
    problems: list[Problem] = field(default_factory=list)
    unresolved: set[KeyPath] = field(default_factory=set)

    def add_problem(self, path: KeyPath, message: str, at_key: bool = False) -> None:
        """Add a fault.

        Args:
            path: Key path at fault.
            message: Rest of the sentence.
            at_key: True points at the key, False at the value.
        """
        self.problems.append(Problem(self.locate(path, at_key), path, message))

    def locate(self, path: KeyPath, at_key: bool = False) -> TextLocation:
        """Return the location of a path, or of its nearest ancestor that was written."""
        for depth in range(len(path), -1, -1):
            if at_key and path[:depth] in self.key_locations:
                return self.key_locations[path[:depth]]
            if path[:depth] in self.value_locations:
                return self.value_locations[path[:depth]]
        return TextLocation(f"{self.file}:1:1", (0, 1, 1))

    def raise_if_invalid(self) -> None:
        """Raise InvalidJob if there are problems: one line each, in the order in which a reader meets them."""
        if self.problems:
            ordered = sorted(self.problems, key=lambda problem: problem.location.sort_key)
            raise InvalidJob("\n".join(dict.fromkeys(map(str, ordered))))
