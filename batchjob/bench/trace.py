"""`--profile`: torch's own table and trace of a few batches, with every stage of the path as a track of its own."""

from __future__ import annotations

import json
import os
import time
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from batchjob.bench.rig import Ran, Rig
from batchjob.errors import InvalidJob
from batchjob.predict import MARK

if TYPE_CHECKING:
    import torch

__all__ = ["TRACKS", "profile", "profiled"]

TRACKS = ("fetch", "decode", "wait", "H2D", "forward", "D2H", "write", "commit")

_TRACK_IDS = 900_000_001  # far from the numbers of threads
_STEPS = ("H2D", "forward", "D2H")  # which torch's own trace times
_ANCHOR = f"{MARK}anchor"  # a moment that both clocks know
_ANCHORS = 5
_TABLE_ROWS = 60


def profile(rig: Rig, folder: Path) -> tuple[str, ...]:
    """Run a few batches under torch's profiler; returns the files that it wrote.

    Args:
        rig: whose sample runs.
        folder: is made where it is not there.

    Raises:
        InvalidJob: it cannot be written there.
    """
    import torch

    table, trace = folder / "table.txt", folder / "trace.json"
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with profiled(record_shapes=True) as made:
            for _ in range(_ANCHORS):  # the first takes longer
                with torch.profiler.record_function(_ANCHOR):
                    anchor = time.perf_counter()
            ran = rig.run([rig.sample])
        by_shape = made.key_averages(group_by_input_shape=True)
        order = "self_cuda_time_total" if rig.parts.engine.device.type == "cuda" else "self_cpu_time_total"
        table.write_text(by_shape.table(sort_by=order, row_limit=_TABLE_ROWS) + "\n")
        made.export_chrome_trace(str(trace))
        whole = json.loads(trace.read_text())
        whole["traceEvents"] += list(_tracks(whole["traceEvents"], ran, anchor))
        trace.write_text(json.dumps(whole))
    except OSError as error:
        raise InvalidJob(f"--profile {folder}: cannot be written ({error.strerror or error})") from error
    return str(table), str(trace)


@contextmanager
def profiled(**options: Any) -> Iterator[torch.profiler.profile]:
    """torch's profiler, of the CPU and where there is one the GPU."""
    os.environ.setdefault("KINETO_LOG_LEVEL", "99")  # it would speak to people of its own beginning and end
    import torch
    from torch.profiler import ProfilerActivity

    activities = [ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if torch.cuda.is_available() else [])]
    with torch.profiler.profile(activities=activities, **options) as made:
        yield made


def _tracks(events: Iterable[dict[str, Any]], ran: Ran, anchor: float) -> Iterator[dict[str, Any]]:
    """Events in the format of Chrome traces: what torch timed of a stage, else our own spans; and the tracks' names."""
    marked = [event for event in events if str(event.get("name", "")).startswith(MARK) and "dur" in event]
    last = max((event for event in marked if event["name"] == _ANCHOR), key=lambda event: float(event["ts"]))
    zero = float(last["ts"]) + float(last["dur"]) / 2
    used: set[tuple[int, str]] = set()
    for span in ran.spans:
        if span.stage not in _STEPS:
            used.add((span.process, span.stage))
            start = zero + (span.began - anchor) * 1e6
            yield _event(span.process, span.stage, start, (span.ended - span.began) * 1e6, span.images)
    for event in marked:
        step = event["name"].removeprefix(MARK)
        if step in _STEPS and event.get("cat") == "user_annotation":
            used.add((os.getpid(), step))
            yield _event(os.getpid(), step, float(event["ts"]), float(event["dur"]))
    yield from _names(used)


def _event(process: int, stage: str, start: float, took: float, images: int | None = None) -> dict[str, Any]:
    """A complete event; times in microseconds."""
    return {
        "ph": "X",
        "cat": "batchjob",
        "name": stage,
        "pid": process,
        "tid": _track(stage),
        "ts": start,
        "dur": took,
        "args": {} if images is None else {"images": images},
    }


def _names(used: Iterable[tuple[int, str]]) -> Iterator[dict[str, Any]]:
    for process, stage in sorted(used):
        tid = _track(stage)
        title = "batchjob" if process == os.getpid() else f"batchjob loader {process}"
        yield {"ph": "M", "name": "process_name", "pid": process, "args": {"name": title}}
        yield {"ph": "M", "name": "thread_name", "pid": process, "tid": tid, "args": {"name": stage}}
        order = TRACKS.index(stage) - len(TRACKS)
        yield {"ph": "M", "name": "thread_sort_index", "pid": process, "tid": tid, "args": {"sort_index": order}}


def _track(stage: str) -> int:
    return _TRACK_IDS + TRACKS.index(stage)
