"""A bench result as a JSON object and as text: five lines of verdict, then the tables."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import asdict
from io import StringIO
from typing import Any

from rich import box
from rich.console import Console
from rich.table import Table

from batchjob.bench.bottleneck import find_bottleneck
from batchjob.bench.results import BenchResult
from batchjob.text import format_count

__all__ = ["format_report", "to_json_dict"]


def to_json_dict(result: BenchResult) -> dict[str, Any]:
    """Return the result for JSON; null means `not measured`."""
    cause, remedy = find_bottleneck(result)
    return asdict(result) | {
        "images": result.run.images,
        "tightest": result.ceilings[0].name,
        "share": result.share,
        "drift": result.drift,
        "noisy": result.noisy,
        "verdict": f"bottleneck: {cause}; to move it: {remedy}",
    }


def format_report(result: BenchResult) -> list[str]:
    """Format five lines of verdict, and the tables as one text."""
    console, document = Console(file=(text := StringIO()), width=140, color_system=None), to_json_dict(result)
    busy = document["run"].pop("busy")
    for row in document["stages"]:
        row |= {"busy in the run": busy.get(row["name"]), "note": row.pop("note")}
    memory = [{"processes": name, "MiB": size / 2**20} for name, size in document["memory"].items()]
    for title, rows in (
        ("each stage alone", document["stages"]),
        ("joint ceilings", document["ceilings"]),
        ("the run", [document["run"]]),
        ("memory at most", memory),
    ):
        console.print(_build_table(title, rows))
    tables = "\n".join(line.rstrip() for line in text.getvalue().splitlines())
    return [*_format_verdict(result), tables, *(f"wrote {path}" for path in result.profile)]


def _format_verdict(result: BenchResult) -> Iterator[str]:
    run, tightest, (before, after) = result.run, result.ceilings[0], result.calibration_ms
    cause, remedy = find_bottleneck(result)
    yield f"bottleneck: {cause}"
    yield f"to move it: {remedy}"
    period = "in steady state" if run.steady else "over the whole run, too short for a steady state"
    yield (
        f"the run:    {run.images_per_second:,.1f} images/s {period}, {result.share:.0%} of the tightest ceiling "
        f"({tightest.name}: {tightest.images_per_second:,.1f} images/s, {tightest.note})"
    )
    yield (
        f"measured:   {format_count(run.images, 'image')}, {result.distinct:,} of them distinct, "
        f"{format_count(run.failed, 'error row')}; {result.model} on {result.device}, {result.recipe}, batches of "
        f"{result.batch_size}, {format_count(result.cores, 'core')}, loader processes: {result.loader_processes}"
    )
    state = "NOISY, measure again" if result.noisy else "steady"
    yield f"machine:    {state}; the same work took {before:.2f} ms before, {after:.2f} after ({result.drift:+.1%})"


def _build_table(title: str, rows: Sequence[dict[str, Any]]) -> Table:
    """Build a table with a column for each key; texts are on the left, numbers on the right."""
    table = Table(title=f"\n{title}", title_justify="left", title_style="", box=box.SIMPLE_HEAD, show_edge=False)
    for key in rows[0]:
        is_text = isinstance(rows[0][key], str)
        table.add_column(key.replace("_", " "), justify="left" if is_text else "right", overflow="fold")
    for row in rows:
        table.add_row(*map(_format_cell, row.values()))
    return table


def _format_cell(value: object) -> str:
    if isinstance(value, float):
        return f"{value:,.1f}" if abs(value) >= 100 else f"{value:.3g}"
    return "-" if value is None else f"{value:,}" if type(value) is int else str(value)
