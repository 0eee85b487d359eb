"""Metrics of a run, computed from the timings of its stages."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence

from batchjob.bench.bench_worker import BenchWorker, RunRecord
from batchjob.bench.results import RunMetrics, StageUtilization
from batchjob.types import StageTiming

__all__ = ["compute_run_metrics", "compute_steady_rate"]

_READY_SECONDS = 0.002  # a batch waited for no longer than this was ready


def compute_run_metrics(worker: BenchWorker, run: RunRecord) -> RunMetrics:
    """Compute the metrics of a run of this worker."""
    rate, is_steady = compute_steady_rate(run, worker.info.ahead)
    parallel_batches = worker.cpu_parallelism.parallel_batches
    forward = run.timings_of("forward")
    first, last = forward[0].ended, forward[-1].ended
    waits = [_duration(wait) for wait in run.timings_of("wait") if wait.images and wait.ended > first]
    return RunMetrics(
        images=run.images,
        failed=run.failed,
        images_per_second=rate,
        steady=is_steady,
        load_s=worker.load_seconds,
        first_batch_s=worker.load_seconds + first - run.started,
        total_s=worker.load_seconds + run.ended - run.started,
        starvation=_compute_starvation(forward[1:], parallel_batches, last - first, sum(waits)),
        ready=sum(wait < _READY_SECONDS for wait in waits) / len(waits) if waits else None,
        cores_busy=None if run.cpu_seconds is None else run.cpu_seconds / (run.ended - run.started),
        services=_compute_utilization(run, parallel_batches),
    )


def compute_steady_rate(run: RunRecord, loaded_ahead: int) -> tuple[float, bool]:
    """Compute images/s between 10 % of the images, or those loaded in advance if they are more, and 90 %.

    Example: of 1000 images, 200 are loaded in advance. If 200 images are done after 3 s and 900 after 10 s, the rate is
    700 / 7 s = 100 images/s.

    Args:
        run: Record of the run.
        loaded_ahead: Images that the loader keeps in flight; they were loaded before the first batch was predicted.

    Returns:
        The rate and True; if the run was too short, the rate over all of it and False.
    """
    done = list(_accumulate_images(run.timings_of("forward")))
    total = done[-1][1] if done else 0
    window = [(at, images) for at, images in done if max(loaded_ahead, total * 0.1) <= images <= total * 0.9]
    if len(window) >= 2 and window[-1][0] > window[0][0]:
        (started, before), (ended, after) = window[0], window[-1]
        return (after - before) / (ended - started), True
    return run.images / (run.ended - run.started), False


def _accumulate_images(timings: Iterable[StageTiming]) -> Iterator[tuple[float, int]]:
    """Yield the end of each timing, and the images done by then."""
    images = 0
    for timing in timings:
        images += timing.images
        yield timing.ended, images


def _compute_starvation(
    forward: Sequence[StageTiming], parallel_batches: int, seconds: float, waited: float
) -> float | None:
    """Compute the share of the time without pixels; None if there was only one batch.

    The wait for a batch is no starvation while other parallel batches, or a GPU, are still at work.

    Args:
        forward: Timings of the forward pass, without the first one.
        parallel_batches: Batches computed at once.
        seconds: Time between the end of the first batch and that of the last one.
        waited: Time that the forward loop waited for batches in between.
    """
    if seconds <= 0:
        return None
    idle = seconds - sum(map(_duration, forward)) / parallel_batches
    return max(0.0, min(1.0, (idle if parallel_batches > 1 else min(waited, idle)) / seconds))


def _compute_utilization(run: RunRecord, parallel_batches: int) -> dict[str, StageUtilization]:
    utilization = {}
    for stage in ("fetch", "decode", "forward", "write"):
        timings = run.timings_of(stage)
        seconds = sum(map(_duration, timings))
        if seconds > 0:
            workers = parallel_batches if stage == "forward" else len({timing.pid for timing in timings})
            rate = sum(timing.images for timing in timings) / seconds
            utilization[stage] = StageUtilization(rate, min(1.0, seconds / workers / (run.ended - run.started)))
    return utilization


def _duration(timing: StageTiming) -> float:
    return timing.seconds
