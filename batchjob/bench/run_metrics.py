"""Metrics of a run, computed from the timings of its stages."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence
from itertools import accumulate

from batchjob.bench.results import RunMetrics
from batchjob.types import StageTiming

__all__ = ["compute_run_metrics"]


def compute_run_metrics(
    timings: Sequence[StageTiming],
    failed: int,
    cpu_seconds: float,
    load_seconds: float,
    loaded_ahead: int,
    parallel_batches: int,
) -> RunMetrics:
    """Compute the metrics of a run in which at least one image was predicted.

    Args:
        timings: Timings of all stages, from the first wait for a batch to the last commit.
        failed: Number of error rows.
        cpu_seconds: CPU time of all processes from the first predicted batch on.
        load_seconds: Time until the worker was ready, before the run.
        loaded_ahead: Images that the loader keeps in flight.
        parallel_batches: Batches computed at once.
    """
    stages: dict[str, list[StageTiming]] = defaultdict(list)
    for timing in sorted(timings, key=lambda timing: timing.ended):
        stages[timing.stage].append(timing)
    forward, commits, started = stages["forward"], stages["commit"], stages["wait"][0].started
    first, last, seconds = forward[0].ended, forward[-1].ended, commits[-1].ended - started
    images, rate = sum(commit.images for commit in commits), _compute_steady_rate(forward, loaded_ahead)
    starvation = None
    if last > first:
        waited = sum(wait.seconds for wait in stages["wait"] if wait.images and wait.ended > first)
        # The wait for a batch is no starvation while other parallel batches, or a GPU, are still at work.
        idle = last - first - sum(timing.seconds for timing in forward[1:]) / parallel_batches
        starvation = max(0.0, min(1.0, (idle if parallel_batches > 1 else min(waited, idle)) / (last - first)))
    busy = {}
    for stage in ("fetch", "decode", "forward", "write"):
        if spans := stages[stage]:
            workers = parallel_batches if stage == "forward" else len({span.pid for span in spans})
            period = spans[-1].ended - min(span.started for span in spans)
            busy[stage] = min(1.0, sum(span.seconds for span in spans) / workers / period)
    return RunMetrics(
        images=images,
        failed=failed,
        images_per_second=rate or images / seconds,
        steady=rate is not None,
        load_s=load_seconds,
        first_batch_s=load_seconds + first - started,
        total_s=load_seconds + seconds,
        starvation=starvation,
        cores_busy=cpu_seconds / (commits[-1].ended - first),
        busy=busy,
    )


def _compute_steady_rate(forward: Sequence[StageTiming], loaded_ahead: int) -> float | None:
    """Compute images/s between 10 % of the images, or those loaded in advance if they are more, and 90 %.

    Example: of 1000 images, 200 are loaded in advance. If 200 images are done after 3 s and 900 after 10 s, the rate is
    700 / 7 s = 100 images/s. None if the run was too short.
    """
    done = list(accumulate(timing.images for timing in forward))
    low, high = max(loaded_ahead, done[-1] * 0.1), done[-1] * 0.9
    window = [(timing.ended, images) for timing, images in zip(forward, done, strict=True) if low <= images <= high]
    if len(window) < 2 or window[-1][0] <= window[0][0]:
        return None
    (started, before), (ended, after) = window[0], window[-1]
    return (after - before) / (ended - started)
