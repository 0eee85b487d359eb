"""Table of the fault suite: the figure that a test measured for each promise, the seed, and the time."""

from __future__ import annotations

import os
import time
from collections import defaultdict
from collections.abc import Callable, Sequence
from pathlib import Path

import pytest

__all__ = ["PROMISES", "Figure"]

# Promises that the whole suite in tests/faults measures. The table names those without a figure.
PROMISES = (
    "every image exactly once",
    "no reader sees a partial or foreign file",
    "double fire",
    "resume",
    "zombie",
    "hostile files",
    "systemic faults",
    "poison",
    "storage faults",
    "outage",
    "source changed",
    "disk full",
    "SIGTERM",
    "memory",
    "secrets",
    "parsers",
    "a worker that does not move is replaced",
    "a device that fails is banned",
)

Figure = Callable[[str, str], None]
_Row = tuple[str, str, str]  # promise, node id of the test, figure

_rows = pytest.StashKey[list[_Row]]()
_seconds = pytest.StashKey[defaultdict[str, float]]()
_failed = pytest.StashKey[set[str]]()
_skipped = pytest.StashKey[dict[str, str]]()  # node id -> reason
_started = pytest.StashKey[float]()
_SEED = "BATCHJOB_SEED"


@pytest.fixture
def figure(request: pytest.FixtureRequest) -> Figure:
    """Add a row to the table: `figure(promise, text)`, such as `figure("resume", "20 kills, 0 shards redone")`."""
    rows, test = request.config.stash[_rows], request.node.nodeid

    def add_row(promise: str, text: str) -> None:
        rows.append((promise, test, text))

    return add_row


@pytest.fixture(scope="session")
def seed() -> int:
    """Seed of every random choice in the suite: BATCHJOB_SEED, or 1."""
    return _read_seed()


@pytest.fixture(scope="session")
def full_clocks() -> bool:
    """True if leases and outages last as long as in production: BATCHJOB_FULL_CLOCKS=1."""
    return os.environ.get("BATCHJOB_FULL_CLOCKS") == "1"


def pytest_configure(config: pytest.Config) -> None:
    """Start an empty table."""
    config.stash[_rows], config.stash[_seconds], config.stash[_failed] = [], defaultdict(float), set()
    config.stash[_skipped], config.stash[_started] = {}, time.monotonic()
    config.pluginmanager.register(_ReportRecorder(config))


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter, config: pytest.Config) -> None:
    """Print the table, even after failed tests, and write it to the file that BATCHJOB_FIGURES names."""
    if not config.stash[_rows]:
        return
    lines = _format_table(config)
    terminalreporter.section("figures")
    terminalreporter.write_line("\n".join(lines))
    if name := os.environ.get("BATCHJOB_FIGURES"):
        Path(name).write_text("\n".join(lines) + "\n")


class _ReportRecorder:
    """Recorder of the duration of each test, of failures, and of skipped tests with their reasons."""

    def __init__(self, config: pytest.Config) -> None:
        self._stash = config.stash

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        self._stash[_seconds][report.nodeid] += report.duration
        if report.failed:
            self._stash[_failed].add(report.nodeid)
        if report.skipped and isinstance(report.longrepr, tuple):
            self._stash[_skipped][report.nodeid] = str(report.longrepr[2]).removeprefix("Skipped: ")


def _read_seed() -> int:
    return int(os.environ.get(_SEED) or 1)


def _format_table(config: pytest.Config) -> list[str]:
    stash = config.stash
    lines = [("promise", "test", "figure", "seconds")]
    for promise, test, text in [*sorted([*stash[_rows]]), *_list_missing_figures(stash)]:
        shown = f"FAILED: {text}" if test in stash[_failed] else text
        lines.append((promise, test.rpartition("/")[2], shown, f"{stash[_seconds][test]:.0f}" if test else ""))
    minutes = (time.monotonic() - stash[_started]) / 60
    return [*_align_columns(lines), f"seed {_read_seed()} ({_SEED}), {minutes:.1f} minutes in all"]


def _list_missing_figures(stash: pytest.Stash) -> list[_Row]:
    """List promises without a figure, tests that failed before they had one, and skipped tests."""
    rows = stash[_rows]
    measured, tested = {row[0] for row in rows}, {row[1] for row in rows}
    missing = [(promise, "", "not measured in this run") for promise in PROMISES if promise not in measured]
    failed = [("", test, "no figure") for test in sorted(stash[_failed] - tested)]
    skipped = [("", test, f"not run: {why}") for test, why in sorted(stash[_skipped].items()) if test not in tested]
    return missing + failed + skipped


def _align_columns(rows: Sequence[tuple[str, ...]]) -> list[str]:
    widths = [max(len(row[column]) for row in rows) for column in range(len(rows[0]))]
    cells = [[cell.ljust(width) for cell, width in zip(row, widths, strict=True)] for row in rows]
    return [" | ".join(row).rstrip() for row in [cells[0], ["-" * width for width in widths], *cells[1:]]]
