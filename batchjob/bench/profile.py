"""`--profile`: torch's table and Chrome trace of a few batches, with a track for each stage of the path."""

from __future__ import annotations

import json
import os
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from torch.profiler import ProfilerActivity

from batchjob.bench.bench_worker import BenchWorker
from batchjob.errors import InvalidJob
from batchjob.inference.predictor import PROFILER_PREFIX
from batchjob.types import StageTiming

__all__ = ["build_track_events", "write_profile"]

# An event whose time is known by torch's clock and by `time.perf_counter`.
_ANCHOR = f"{PROFILER_PREFIX}anchor"


def write_profile(worker: BenchWorker, folder: Path) -> tuple[str, ...]:
    """Run the sample under torch's profiler; return the paths of the files. InvalidJob if they cannot be written."""
    table, trace = folder / "table.txt", folder / "trace.json"
    # Else Kineto writes lines about its start and end to stderr.
    os.environ.setdefault("KINETO_LOG_LEVEL", "99")
    # A private name of torch, imported only where a profile is asked for: parallel batches run in threads of their own.
    from torch._C._profiler import _ExperimentalConfig

    on_cuda = worker.engine.device.type == "cuda"
    activities = [ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if on_cuda else [])]
    config = _ExperimentalConfig(profile_all_threads=True)
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with torch.profiler.profile(activities=activities, record_shapes=True, experimental_config=config) as profiler:
            # The first anchor takes longer than the others, so the last one is used.
            for _ in range(5):
                with torch.profiler.record_function(_ANCHOR):
                    anchor = time.perf_counter()
            worker.run([worker.sample_shard])
        averages = profiler.key_averages(group_by_input_shape=True)
        order = f"self_{'cuda' if on_cuda else 'cpu'}_time_total"
        table.write_text(averages.table(sort_by=order, row_limit=60) + "\n")
        profiler.export_chrome_trace(str(trace))
        document = json.loads(trace.read_text())
        anchored = max(float(event["ts"]) for event in document["traceEvents"] if event.get("name") == _ANCHOR)
        document["traceEvents"] += build_track_events(worker.timings, anchored - anchor * 1e6)
        trace.write_text(json.dumps(document))
    except OSError as error:
        raise InvalidJob(f"--profile {folder}: cannot be written ({error.strerror or error})") from error
    return str(table), str(trace)


def build_track_events(timings: Sequence[StageTiming], offset: float) -> Iterator[dict[str, Any]]:
    """Build events in Chrome's trace format, of which viewers make a track for each stage of a process.

    They are asynchronous ones, which may overlap. Example: `offset`, in microseconds from the zero of torch's clock to
    that of `time.perf_counter`, is -4,999,000; then a timing that began at 5.001 s begins at 2000 µs of the trace.
    """
    for number, timing in enumerate(timings):
        event = {"cat": "batchjob", "name": timing.stage, "id": number, "pid": timing.pid, "tid": timing.pid}
        yield {**event, "ph": "b", "ts": timing.started * 1e6 + offset, "args": {"images": timing.images}}
        yield {**event, "ph": "e", "ts": timing.ended * 1e6 + offset}
    for pid in {timing.pid for timing in timings}:
        title = "batchjob" if pid == os.getpid() else f"batchjob loader {pid}"
        yield {"ph": "M", "name": "process_name", "pid": pid, "args": {"name": title}}
