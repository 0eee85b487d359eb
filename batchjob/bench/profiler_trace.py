"""`--profile`: torch's own table and trace of a few batches, with every stage of the path as a track of its own."""

from __future__ import annotations

import json
import os
import time
from collections import defaultdict
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from batchjob.bench.bench_worker import BenchWorker
from batchjob.errors import InvalidJob
from batchjob.inference.predictor import PROFILER_PREFIX
from batchjob.types import StageTiming

if TYPE_CHECKING:
    import torch

__all__ = ["ANCHOR", "TRACKS", "build_track_events", "torch_profiler", "write_profile"]

TRACKS = ("fetch", "decode", "device decode", "wait", "H2D", "forward", "D2H", "write", "commit")
"""Stages from top to bottom; others lie below them."""
ANCHOR = f"{PROFILER_PREFIX}anchor"
"""A moment that both clocks know."""
_TRACK_IDS = 900_000_001  # far from the numbers of threads
_LANES = 64  # at most
_STEPS = ("H2D", "forward", "D2H")  # which torch's own trace times
_ON_GPU, _ON_HOST = "gpu_user_annotation", "user_annotation"  # of a step: when it ran, and when it was begun
_ANCHORS = 5
_TABLE_ROWS = 60


def write_profile(rig: BenchWorker, folder: Path) -> tuple[str, ...]:
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
        with torch_profiler(record_shapes=True, experimental_config=every) as made:
            for _ in range(_ANCHORS):  # the first takes longer
                with torch.profiler.record_function(ANCHOR):
                    anchor = time.perf_counter()
            ran = rig.run([rig.sample_shard])
        by_shape = made.key_averages(group_by_input_shape=True)
        order = "self_cuda_time_total" if rig.parts.engine.device.type == "cuda" else "self_cpu_time_total"
        table.write_text(by_shape.table(sort_by=order, row_limit=_TABLE_ROWS) + "\n")
        made.export_chrome_trace(str(trace))
        whole = json.loads(trace.read_text())
        whole["traceEvents"] += list(build_track_events(whole["traceEvents"], ran.timings, anchor))
        trace.write_text(json.dumps(whole))
    except OSError as error:
        raise InvalidJob(f"--profile {folder}: cannot be written ({error.strerror or error})") from error
    return str(table), str(trace)


@contextmanager
def torch_profiler(**options: Any) -> Iterator[torch.profiler.profile]:
    """torch's profiler, of the CPU and where there is one the GPU."""
    os.environ.setdefault("KINETO_LOG_LEVEL", "99")  # it would speak to people of its own beginning and end
    import torch
    from torch.profiler import ProfilerActivity

    activities = [ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if torch.cuda.is_available() else [])]
    with torch.profiler.profile(activities=activities, **options) as made:
        yield made


def build_track_events(
    events: Sequence[dict[str, Any]], spans: Sequence[StageTiming], anchor: float
) -> Iterator[dict[str, Any]]:
    """Events of Chrome's format: what torch timed of a stage, on the GPU where it did, else our spans; and their names.

    Args:
        events: of torch's trace, among them `ANCHOR`.
        spans: of the same run.
        anchor: when the last anchor was, by `time.perf_counter`.
    """
    marked = [event for event in events if str(event.get("name", "")).startswith(PROFILER_PREFIX) and "dur" in event]
    last = max((event for event in marked if event["name"] == ANCHOR), key=lambda event: float(event["ts"]))
    zero = float(last["ts"]) + float(last["dur"]) / 2
    rows = {stage: row for row, stage in enumerate(dict.fromkeys((*TRACKS, *(span.stage for span in spans))))}
    used: set[_Track] = set()
    for span, lane in _laned([span for span in spans if span.stage not in _STEPS]):
        used.add(track := _Track(span.pid, rows[span.stage], span.stage, lane))
        yield _event(track, zero + (span.began - anchor) * 1e6, (span.ended - span.began) * 1e6, span.images)
    for step in _STEPS:
        for event, lane in _timed(marked, step):
            used.add(track := _Track(os.getpid(), rows[step], step, lane))
            yield _event(track, float(event["ts"]), float(event["dur"]))
    yield from _names(used, len(rows))


def _laned(spans: Iterable[StageTiming]) -> Iterator[tuple[StageTiming, int]]:
    """Each with the first lane of its process's stage that is free by then: a stage may be at two batches at once."""
    ends: dict[tuple[int, str], list[float]] = defaultdict(list)
    for span in sorted(spans, key=lambda span: span.began):
        lanes = ends[span.pid, span.stage]
        lane = next((lane for lane, end in enumerate(lanes) if end <= span.began), len(lanes))
        lanes[lane : lane + 1] = [span.ended]
        yield span, lane


def _timed(marked: Sequence[dict[str, Any]], step: str) -> Iterator[tuple[dict[str, Any], int]]:
    """What torch timed of a step, each with its lane: that of the GPU's stream, or of the thread."""
    found = [event for event in marked if event["name"] == f"{PROFILER_PREFIX}{step}"]
    gpu = [event for event in found if event.get("cat") == _ON_GPU]
    lanes: dict[Any, int] = {}
    if not gpu:  # a thread has the same lane in all steps
        for event in marked:
            if event.get("cat") == _ON_HOST and event["name"] != ANCHOR:
                lanes.setdefault(event["tid"], len(lanes))
    for event in gpu or [event for event in found if event.get("cat") == _ON_HOST]:
        yield event, lanes.setdefault(event["tid"], len(lanes))


@dataclass(frozen=True)
class _Track:
    """A line of the picture: what a process does of a stage, in one of its lanes."""

    process: int
    row: int
    stage: str
    lane: int

    @property
    def place(self) -> int:
        return self.row * _LANES + self.lane

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


def _names(used: Iterable[_Track], rows: int) -> Iterator[dict[str, Any]]:
    for track in sorted(used, key=lambda track: (track.process, track.place)):
        at = {"pid": track.process, "tid": _TRACK_IDS + track.place}
        title = "batchjob" if track.process == os.getpid() else f"batchjob loader {track.process}"
        yield {"ph": "M", "name": "process_name", "pid": track.process, "args": {"name": title}}
        yield {"ph": "M", "name": "thread_name", **at, "args": {"name": track.title}}
        order = track.place - rows * _LANES
        yield {"ph": "M", "name": "thread_sort_index", **at, "args": {"sort_index": order}}
