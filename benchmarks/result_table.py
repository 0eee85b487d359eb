"""Rounds of one case → lines of text: medians, and medians of paired ratios with their spread."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from statistics import median

from benchmarks.system_run import SystemRun

__all__ = ["BATCHJOB_SYSTEMS", "format_table"]

BATCHJOB_SYSTEMS = ("batchjob_local", "batchjob_ray")
_Number = Callable[[SystemRun], float]


def format_table(title: str, rounds: Sequence[Sequence[SystemRun]], cold: Sequence[SystemRun], reference: str) -> str:
    """One case as text.

    Args:
        title: of the case.
        rounds: one run of each system a round, the same systems in each.
        cold: runs before the first round, with empty caches, of the systems that keep any.
        reference: system whose labels the others' are held against.
    """
    systems = [run.system for run in rounds[0]]
    ours = [name for name in BATCHJOB_SYSTEMS if name in systems]
    head = ["", "images/s steady", "whole, s", "cold, s", "peak MB", "same labels"]
    head += [f"{name.removeprefix('batchjob_')} ÷ it, {what}" for name in ours for what in ("steady", "whole")]
    lines = [head]
    for system in systems:
        runs = [_of(each, system) for each in rounds]
        first = [run.seconds for run in cold if run.system == system and not run.trouble]
        line = [
            system,
            _spread([run.steady for run in runs if not run.trouble], 0),
            _spread([run.seconds for run in runs if not run.trouble], 1),
            f"{first[0]:.1f}" if first else "",
            f"{max(run.peak for run in runs) / 1e6:,.0f}",
            _agreement(runs[0], _of(rounds[0], reference)),
        ]
        for name in ours:
            line.append(_ratio(rounds, name, system, lambda run: run.steady))
            line.append(_ratio(rounds, name, system, lambda run: 1 / run.seconds))
        lines.append(line)
    return f"{title}\n" + _aligned(lines)


def _of(runs: Sequence[SystemRun], system: str) -> SystemRun:
    return next(run for run in runs if run.system == system)


def _ratio(rounds: Sequence[Sequence[SystemRun]], ours: str, theirs: str, number: _Number) -> str:
    """How many times as fast we are, run against run of the same round."""
    if ours == theirs:
        return ""
    pairs = [(_of(each, ours), _of(each, theirs)) for each in rounds]
    return _spread([number(one) / number(other) for one, other in pairs if not one.trouble and not other.trouble], 2)


def _spread(values: Sequence[float], digits: int) -> str:
    """Median, and least and most; a figure that was not measured is none."""
    known = [value for value in values if not math.isnan(value)]
    if not known:
        return "not measured"
    return f"{median(known):,.{digits}f} ({min(known):,.{digits}f}–{max(known):,.{digits}f})"


def _agreement(run: SystemRun, reference: SystemRun) -> str:
    if run.trouble:
        return "FAILED"
    if run is reference:
        return "reference"
    if not reference.labels:
        return "not measured"
    same = sum(run.labels.get(name) == label for name, label in reference.labels.items())
    return f"{same / len(reference.labels):.2%}"


def _aligned(lines: Sequence[Sequence[str]]) -> str:
    widths = [max(len(line[column]) for line in lines) for column in range(len(lines[0]))]
    rows = [
        [
            cell.ljust(width) if not at else cell.rjust(width)
            for at, (cell, width) in enumerate(zip(line, widths, strict=True))
        ]
        for line in lines
    ]
    return "\n".join("  ".join(row).rstrip() for row in rows)
