"""The order of a bench: list, a run, each stage alone, the ladder, the modes; and what follows from them."""

from __future__ import annotations

import errno
import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from tempfile import gettempdir

from batchjob import system
from batchjob.bench.bench_worker import BenchWorker, InputSample, open_bench_worker, sample_input
from batchjob.bench.bottleneck import compute_ceilings, explain_bottleneck
from batchjob.bench.grad_modes import measure_grad_modes
from batchjob.bench.machine_stats import MemorySampler, calibrate
from batchjob.bench.profiler_trace import write_profile
from batchjob.bench.results import BenchResult, Calibration, MemoryPeak, RunMetrics
from batchjob.bench.stages import measure_disk_rate, measure_fetch_rate, measure_stages
from batchjob.bench.throughput import compute_run_metrics, measure_throughput_steps
from batchjob.errors import AttemptFailed, InvalidJob, Temporary
from batchjob.job.job import Job
from batchjob.text import format_count

__all__ = ["BenchOptions", "bench"]

_FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)


@dataclass(frozen=True)
class BenchOptions:
    """What to measure.

    Attributes:
        images: of a run; where the job has fewer they come again.
        profile: folder for torch's table and a Chrome trace; None for neither.
    """

    images: int = 1000
    profile: Path | None = None


def bench(job: Job, options: BenchOptions) -> BenchResult:
    """Measure a job's path from storage to Parquet, through the parts that a run uses. Its output is not touched.

    Raises:
        InvalidJob: the job cannot run, or has fewer than two batches of images.
        Temporary: the disk for temporary files is full.
        BatchjobError: the run itself fails.
    """
    with _disk_may_be_full():
        before = calibrate()
        listed = sample_input(job, options.images)
        with open_bench_worker(job, options.images, _cores(job), listed) as rig:
            return _found(rig, options, listed, before)


def _found(rig: BenchWorker, wanted: BenchOptions, listed: InputSample, before: float) -> BenchResult:
    run, memory = _run(rig)
    batches = rig.load_batches(rig.sample_shard)
    stages = (listed.stage, *measure_stages(rig, batches))
    found = compute_ceilings(
        stages, rig.cores, store_images_per_second=measure_fetch_rate(rig), disk_bytes_per_second=measure_disk_rate(rig)
    )
    rungs, side_by_side = measure_throughput_steps(rig, batches, run), measure_grad_modes(rig, batches)
    files = () if wanted.profile is None else write_profile(rig, wanted.profile)
    processes, engine = rig.parts.loader.config.processes, rig.parts.engine
    return BenchResult(
        model=rig.loaded.model,
        device=rig.loaded.device,
        recipe=rig.parts.predictor.forward.config.description,
        batch_size=rig.batch_size,
        cores=rig.cores,
        loader_processes=processes,
        images=run.images,
        distinct=min(run.images, listed.rows),
        stages=stages,
        ceilings=found,
        ladder=rungs,
        run=run,
        share=run.images_per_second / found[0].images_per_second if found else None,
        modes=side_by_side,
        memory=memory,
        calibration=Calibration(before, calibrate()),
        verdict=explain_bottleneck(
            run.images_per_second,
            found,
            stages,
            starvation=run.starvation,
            loader_processes=processes,
            on_cpu=engine.device.type == "cpu",
            cores=rig.cores,
            cores_busy=run.cores_busy,
            exact_decode=rig.job.decode.mode == "exact",
        ),
        profile=files,
    )


def _run(rig: BenchWorker) -> tuple[RunMetrics, tuple[MemoryPeak, ...]]:
    """The run itself. Raises InvalidJob where not one image came through it."""
    with MemorySampler(lambda: {span.pid for span in list(rig.timings) if span.stage == "decode"}) as watch:
        ran = rig.run(rig.shards)
    if ran.failed == ran.images:
        raise InvalidJob(
            f"{rig.job.input.uri}: {format_count(ran.failed, 'image')} tried, each an error row: "
            "nothing can be measured; "
            "`batchjob run` and `batchjob errors` say why"
        )
    return compute_run_metrics(rig, ran), watch.peaks()


def _cores(job: Job) -> int:
    asked = job.runtime.cpus_per_worker
    return system.available_cores() if asked == "auto" else max(1, int(asked))


@contextmanager
def _disk_may_be_full() -> Iterator[None]:
    """Raises Temporary in place of whatever a full disk makes of a write."""
    try:
        yield
    except OSError as error:
        if error.errno not in _FULL:
            raise
        raise _full() from error
    except AttemptFailed as error:
        if "disk is full" not in error.message and not any(os.strerror(code) in error.message for code in _FULL):
            raise
        raise _full() from error


def _full() -> Temporary:
    return Temporary(
        f"{gettempdir()}: the disk is full, so nothing could be measured; make room or set TMPDIR, then run again"
    )
