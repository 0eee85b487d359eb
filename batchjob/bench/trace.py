"""`--profile`: torch's own table and trace of a few batches, with every stage of the path as a track of its own."""

from __future__ import annotations

import json
import os
import time
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
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
_LANES = 64  # at most
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
    from torch._C._profiler import _ExperimentalConfig

    table, trace = folder / "table.txt", folder / "trace.json"
    try:
        folder.mkdir(parents=True, exist_ok=True)
        every = _ExperimentalConfig(profile_all_threads=True)  # lanes are threads of their own
        with profiled(record_shapes=True, experimental_config=every) as made:
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
    used: set[_Track] = set()
    for span in ran.spans:
        if span.stage not in _STEPS:
            used.add(track := _Track(span.process, span.stage))
            start = zero + (span.began - anchor) * 1e6
            yield _event(track, start, (span.ended - span.began) * 1e6, span.images)
    lanes: dict[int, int] = {}  # by thread
    for event in marked:
        step = event["name"].removeprefix(MARK)
        if step in _STEPS and event.get("cat") == "user_annotation":
            lane = lanes.setdefault(event["tid"], len(lanes))
            used.add(track := _Track(os.getpid(), step, lane))
            yield _event(track, float(event["ts"]), float(event["dur"]))
    yield from _names(used)


@dataclass(frozen=True, order=True)
class _Track:
    """A line of the picture: what a process does of a stage, in one of its lanes."""

    process: int
    stage: str
    lane: int = 0

    @property
    def place(self) -> int:
        return TRACKS.index(self.stage) * _LANES + self.lane

    @property
    def title(self) -> str:
        return f"{self.stage} {self.lane + 1}" if self.lane else self.stage


def _event(track: _Track, start: float, took: float, images: int | None = None) -> dict[str, Any]:
    """A complete event; times in microseconds."""
    return {
        "ph": "X",
        "cat": "batchjob",
        "name": track.stage,
        "pid": track.process,
        "tid": _TRACK_IDS + track.place,
        "ts": start,
        "dur": took,
        "args": {} if images is None else {"images": images},
    }


def _names(used: Iterable[_Track]) -> Iterator[dict[str, Any]]:
    for track in sorted(used):
        at = {"pid": track.process, "tid": _TRACK_IDS + track.place}
        title = "batchjob" if track.process == os.getpid() else f"batchjob loader {track.process}"
        yield {"ph": "M", "name": "process_name", "pid": track.process, "args": {"name": title}}
        yield {"ph": "M", "name": "thread_name", **at, "args": {"name": track.title}}
        order = track.place - len(TRACKS) * _LANES
        yield {"ph": "M", "name": "thread_sort_index", **at, "args": {"sort_index": order}}
