"""`--profile`: torch's table and Chrome trace of a few batches, with a track for each stage of the path."""

from __future__ import annotations

import json
import os
import time
from collections import defaultdict
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch.profiler import ProfilerActivity

from batchjob.bench.bench_worker import BenchWorker
from batchjob.errors import InvalidJob
from batchjob.inference.predictor import PROFILER_PREFIX
from batchjob.types import StageTiming

__all__ = ["ANCHOR", "TRACKS", "build_track_events", "torch_profiler", "write_profile"]

TRACKS = ("fetch", "decode", "wait", "H2D", "forward", "D2H", "write", "commit")
"""Stages from top to bottom; other stages follow below them."""
ANCHOR = f"{PROFILER_PREFIX}anchor"
"""Name of an event whose time is known by torch's clock and by `time.perf_counter`."""

_FIRST_TRACK_ID = 900_000_001  # far from the ids of threads
_MAX_LANES = 64
_DEVICE_STEPS = ("H2D", "forward", "D2H")  # torch's own trace has their times
# Categories of torch's trace. A step has one event on the GPU, when it ran, and one on the host, when it was launched.
_ON_GPU, _ON_HOST = "gpu_user_annotation", "user_annotation"
_ANCHORS = 5
_TABLE_ROWS = 60


def write_profile(worker: BenchWorker, folder: Path) -> tuple[str, ...]:
    """Run a few batches under torch's profiler; return the paths of the files that it wrote.

    Args:
        worker: Worker whose sample runs.
        folder: Folder for the files; created if it is missing.

    Raises:
        InvalidJob: If the folder cannot be written.
    """
    table, trace = folder / "table.txt", folder / "trace.json"
    try:
        folder.mkdir(parents=True, exist_ok=True)
        # A private name of torch, imported only where a profile is asked for.
        from torch._C._profiler import _ExperimentalConfig

        # Parallel batches run in threads of their own.
        config = _ExperimentalConfig(profile_all_threads=True)
        with torch_profiler(record_shapes=True, experimental_config=config) as profiler:
            # The first anchor takes longer than the others, so the last one is used.
            for _ in range(_ANCHORS):
                with torch.profiler.record_function(ANCHOR):
                    anchor = time.perf_counter()
            run = worker.run([worker.sample_shard])
        averages = profiler.key_averages(group_by_input_shape=True)
        on_cuda = worker.engine.device.type == "cuda"
        order = "self_cuda_time_total" if on_cuda else "self_cpu_time_total"
        table.write_text(averages.table(sort_by=order, row_limit=_TABLE_ROWS) + "\n")
        profiler.export_chrome_trace(str(trace))
        document = json.loads(trace.read_text())
        document["traceEvents"] += list(build_track_events(document["traceEvents"], run.timings, anchor))
        trace.write_text(json.dumps(document))
    except OSError as error:
        raise InvalidJob(f"--profile {folder}: cannot be written ({error.strerror or error})") from error
    return str(table), str(trace)


@contextmanager
def torch_profiler(**options: Any) -> Iterator[torch.profiler.profile]:
    """Run torch's profiler for the CPU, and for the GPU if there is one."""
    # Else Kineto writes lines about its start and end to stderr.
    os.environ.setdefault("KINETO_LOG_LEVEL", "99")
    activities = [ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if torch.cuda.is_available() else [])]
    with torch.profiler.profile(activities=activities, **options) as profiler:
        yield profiler


def build_track_events(
    events: Sequence[dict[str, Any]], timings: Sequence[StageTiming], anchor: float
) -> Iterator[dict[str, Any]]:
    """Build events in Chrome's trace format: a track for each stage and process, and the names of the tracks.

    Steps of the device take their times from torch's trace: those of the GPU if there are any. Other stages take them
    from our timings. Example: an anchor at 1000 µs of torch's clock and at 5.0 s of `time.perf_counter` puts a timing
    that began at 5.001 s at 2000 µs.

    Args:
        events: Events of torch's trace, `ANCHOR` among them.
        timings: Timings of the same run.
        anchor: Time of the last anchor, by `time.perf_counter`.
    """
    marked = [event for event in events if str(event.get("name", "")).startswith(PROFILER_PREFIX) and "dur" in event]
    last_anchor = max((event for event in marked if event["name"] == ANCHOR), key=lambda event: float(event["ts"]))
    zero = float(last_anchor["ts"]) + float(last_anchor["dur"]) / 2
    stages = dict.fromkeys((*TRACKS, *(timing.stage for timing in timings)))
    rows = {stage: row for row, stage in enumerate(stages)}
    used: set[_Track] = set()
    for timing, lane in _assign_lanes([timing for timing in timings if timing.stage not in _DEVICE_STEPS]):
        used.add(track := _Track(timing.pid, rows[timing.stage], timing.stage, lane))
        start, duration = zero + (timing.started - anchor) * 1e6, (timing.seconds) * 1e6
        yield _build_event(track, start, duration, timing.images)
    for step in _DEVICE_STEPS:
        for event, lane in _find_step_events(marked, step):
            used.add(track := _Track(os.getpid(), rows[step], step, lane))
            yield _build_event(track, float(event["ts"]), float(event["dur"]))
    yield from _build_track_names(used, len(rows))


def _assign_lanes(timings: Iterable[StageTiming]) -> Iterator[tuple[StageTiming, int]]:
    """Yield each timing with the first free lane of its process and stage, because a stage may overlap with itself.

    Example: timings of 0 to 2, 1 to 3 and 2 to 4 seconds get the lanes 0, 1 and 0.
    """
    lane_ends: dict[tuple[int, str], list[float]] = defaultdict(list)
    for timing in sorted(timings, key=lambda timing: timing.started):
        ends = lane_ends[timing.pid, timing.stage]
        lane = next((lane for lane, end in enumerate(ends) if end <= timing.started), len(ends))
        ends[lane : lane + 1] = [timing.ended]
        yield timing, lane


def _find_step_events(marked: Sequence[dict[str, Any]], step: str) -> Iterator[tuple[dict[str, Any], int]]:
    """Yield torch's events of a step, each with its lane: one for each stream of the GPU, or for each thread."""
    step_events = [event for event in marked if event["name"] == f"{PROFILER_PREFIX}{step}"]
    gpu_events = [event for event in step_events if event.get("cat") == _ON_GPU]
    lanes: dict[Any, int] = {}
    if not gpu_events:
        # Number the threads over all steps, so that a thread has the same lane in each of them.
        for event in marked:
            if event.get("cat") == _ON_HOST and event["name"] != ANCHOR:
                lanes.setdefault(event["tid"], len(lanes))
    for event in gpu_events or [event for event in step_events if event.get("cat") == _ON_HOST]:
        yield event, lanes.setdefault(event["tid"], len(lanes))


@dataclass(frozen=True)
class _Track:
    """Line of the trace viewer: one stage of a process, in one of its lanes."""

    pid: int
    row: int
    stage: str
    lane: int

    @property
    def index(self) -> int:
        """Position from the top: the tracks of row 2 begin at 2 * 64 = 128."""
        return self.row * _MAX_LANES + self.lane

    @property
    def title(self) -> str:
        return f"{self.stage} {self.lane + 1}" if self.lane else self.stage


def _build_event(track: _Track, start: float, duration: float, images: int | None = None) -> dict[str, Any]:
    """Build a complete event (phase X); times in microseconds."""
    return {
        "ph": "X",
        "cat": "batchjob",
        "name": track.stage,
        "pid": track.pid,
        "tid": _FIRST_TRACK_ID + track.index,
        "ts": start,
        "dur": duration,
        "args": {} if images is None else {"images": images},
    }


def _build_track_names(used: Iterable[_Track], row_count: int) -> Iterator[dict[str, Any]]:
    """Yield metadata events (phase M): names of processes and tracks, and an order that puts our tracks on top."""
    for track in sorted(used, key=lambda track: (track.pid, track.index)):
        ids = {"pid": track.pid, "tid": _FIRST_TRACK_ID + track.index}
        title = "batchjob" if track.pid == os.getpid() else f"batchjob loader {track.pid}"
        yield {"ph": "M", "name": "process_name", "pid": track.pid, "args": {"name": title}}
        yield {"ph": "M", "name": "thread_name", **ids, "args": {"name": track.title}}
        # Negative, because torch's own threads have 0 or more.
        order = track.index - row_count * _MAX_LANES
        yield {"ph": "M", "name": "thread_sort_index", **ids, "args": {"sort_index": order}}
