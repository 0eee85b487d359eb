"""Rounds of one case as lines of text: medians, and medians of paired ratios with their range."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from statistics import median

from benchmarks.system_run import SystemRun

__all__ = ["BATCHJOB_SYSTEMS", "format_table"]

BATCHJOB_SYSTEMS = ("batchjob_local", "batchjob_ray")

_Speed = Callable[[SystemRun], float]


def format_table(title: str, rounds: Sequence[Sequence[SystemRun]], cold: Sequence[SystemRun], reference: str) -> str:
    """Format one case as a table.

    Args:
        title: Title of the case.
        rounds: Runs of each round, one for each system, the same systems in each round.
        cold: Runs with empty caches before the first round, of the systems that keep caches.
        reference: System whose labels the others' are compared with.
    """
    systems = [run.system for run in rounds[0]]
    ours = [name for name in BATCHJOB_SYSTEMS if name in systems]
    head = ["", "images/s steady", "whole, s", "cold, s", "peak MB", "same labels"]
    head += [f"{name.removeprefix('batchjob_')} ÷ it, {speed}" for name in ours for speed in ("steady", "whole")]
    lines = [head]
    for system in systems:
        runs = [_find_run(one_round, system) for one_round in rounds]
        cold_seconds = [run.seconds for run in cold if run.system == system and not run.trouble]
        line = [
            system,
            _format_range([run.steady for run in runs if not run.trouble], 0),
            _format_range([run.seconds for run in runs if not run.trouble], 1),
            f"{cold_seconds[0]:.1f}" if cold_seconds else "",
            f"{max(run.peak for run in runs) / 1e6:,.0f}",
            _format_agreement(runs[0], _find_run(rounds[0], reference)),
        ]
        for name in ours:
            line.append(_format_ratio(rounds, name, system, lambda run: run.steady))
            line.append(_format_ratio(rounds, name, system, lambda run: 1 / run.seconds))
        lines.append(line)
    return f"{title}\n" + _align_columns(lines)


def _find_run(runs: Sequence[SystemRun], system: str) -> SystemRun:
    return next(run for run in runs if run.system == system)


def _format_ratio(rounds: Sequence[Sequence[SystemRun]], ours: str, theirs: str, speed: _Speed) -> str:
    """Format how many times as fast ours is, from pairs of runs of the same round."""
    if ours == theirs:
        return ""
    pairs = [(_find_run(one_round, ours), _find_run(one_round, theirs)) for one_round in rounds]
    ratios = [speed(our) / speed(their) for our, their in pairs if not our.trouble and not their.trouble]
    return _format_range(ratios, 2)


def _format_range(values: Sequence[float], digits: int) -> str:
    """Format median, minimum and maximum; NaN values are left out."""
    known = [value for value in values if not math.isnan(value)]
    if not known:
        return "not measured"
    return f"{median(known):,.{digits}f} ({min(known):,.{digits}f}–{max(known):,.{digits}f})"


def _format_agreement(run: SystemRun, reference: SystemRun) -> str:
    if run.trouble:
        return "FAILED"
    if run is reference:
        return "reference"
    if not reference.labels:
        return "not measured"
    same = sum(run.labels.get(name) == label for name, label in reference.labels.items())
    return f"{same / len(reference.labels):.2%}"


def _align_columns(lines: Sequence[Sequence[str]]) -> str:
    widths = [max(len(line[column]) for line in lines) for column in range(len(lines[0]))]
    rows = [
        [
            cell.rjust(width) if column else cell.ljust(width)
            for column, (cell, width) in enumerate(zip(line, widths, strict=True))
        ]
        for line in lines
    ]
    return "\n".join("  ".join(row).rstrip() for row in rows)
