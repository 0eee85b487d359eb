"""`batchjob bench`: measure the listing, a run, each stage alone, the throughput steps and the grad modes."""

from __future__ import annotations

import errno
import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from tempfile import gettempdir

from batchjob import system
from batchjob.bench.bench_worker import BenchWorker, open_bench_worker
from batchjob.bench.bottleneck import compute_ceilings, explain_bottleneck
from batchjob.bench.grad_modes import measure_grad_modes
from batchjob.bench.input_sample import InputSample, sample_input
from batchjob.bench.io_rates import measure_disk_rate, measure_fetch_rate
from batchjob.bench.machine_stats import MemorySampler, calibrate
from batchjob.bench.profiler_trace import write_profile
from batchjob.bench.results import BenchResult, Calibration, MemoryPeak, RunMetrics
from batchjob.bench.run_metrics import compute_run_metrics
from batchjob.bench.stages import measure_stages
from batchjob.bench.throughput import measure_throughput_steps
from batchjob.errors import AttemptFailed, InvalidJob, Temporary
from batchjob.job.job import Job
from batchjob.text import format_count

__all__ = ["BenchOptions", "bench"]

_DISK_FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)


@dataclass(frozen=True)
class BenchOptions:
    """Options of a bench.

    Attributes:
        images: Images of a run; if the job has fewer, they are repeated.
        profile: Folder for torch's table and a Chrome trace; None writes neither.
    """

    images: int = 1000
    profile: Path | None = None


def bench(job: Job, options: BenchOptions) -> BenchResult:
    """Measure a job's path from storage to Parquet, with the parts that a run uses. Its output is not touched.

    Raises:
        InvalidJob: If the job cannot run, or has fewer than two batches of images.
        Temporary: If the disk for temporary files is full.
        BatchjobError: If the run itself fails.
    """
    with _detect_full_disk():
        calibration_ms = calibrate()
        sample = sample_input(job, options.images)
        with open_bench_worker(job, options.images, _count_cores(job), sample) as worker:
            return _measure(worker, options, sample, calibration_ms)


def _measure(worker: BenchWorker, options: BenchOptions, sample: InputSample, calibration_ms: float) -> BenchResult:
    run, memory = _measure_run(worker)
    batches = worker.load_batches(worker.sample_shard)
    stages = (sample.stage, *measure_stages(worker, batches))
    ceilings = compute_ceilings(
        stages,
        worker.cores,
        store_images_per_second=measure_fetch_rate(worker),
        disk_bytes_per_second=measure_disk_rate(worker),
    )
    steps = measure_throughput_steps(worker, batches, run)
    grad_modes = measure_grad_modes(worker, batches)
    profile = () if options.profile is None else write_profile(worker, options.profile)
    loader_processes = worker.loader.config.processes
    return BenchResult(
        model=worker.info.model,
        device=worker.info.device,
        recipe=worker.predictor.forward.config.description,
        batch_size=worker.batch_size,
        cores=worker.cores,
        loader_processes=loader_processes,
        images=run.images,
        distinct=min(run.images, sample.rows),
        stages=stages,
        ceilings=ceilings,
        ladder=steps,
        run=run,
        share=run.images_per_second / ceilings[0].images_per_second if ceilings else None,
        modes=grad_modes,
        memory=memory,
        calibration=Calibration(calibration_ms, calibrate()),
        verdict=explain_bottleneck(
            run.images_per_second,
            ceilings,
            stages,
            starvation=run.starvation,
            loader_processes=loader_processes,
            on_cpu=worker.engine.device.type == "cpu",
            cores=worker.cores,
            cores_busy=run.cores_busy,
            exact_decode=worker.job.decode.mode == "exact",
        ),
        profile=profile,
    )


def _measure_run(worker: BenchWorker) -> tuple[RunMetrics, tuple[MemoryPeak, ...]]:
    """Run all shards. Raises InvalidJob if every image became an error row."""

    def find_loader_pids() -> set[int]:
        return {timing.pid for timing in list(worker.timings) if timing.stage == "decode"}

    with MemorySampler(find_loader_pids) as sampler:
        run = worker.run(worker.shards)
    if run.failed == run.images:
        raise InvalidJob(
            f"{worker.job.input.uri}: {format_count(run.failed, 'image')} tried, each an error row: nothing can be "
            "measured; `batchjob run` and `batchjob errors` say why"
        )
    return compute_run_metrics(worker, run), sampler.peaks()


def _count_cores(job: Job) -> int:
    cores = job.runtime.cpus_per_worker
    return system.available_cores() if cores == "auto" else max(1, int(cores))


@contextmanager
def _detect_full_disk() -> Iterator[None]:
    """Raise Temporary in place of any error that a full disk causes."""
    try:
        yield
    except OSError as error:
        if error.errno not in _DISK_FULL:
            raise
        raise _disk_full_error() from error
    except AttemptFailed as error:
        if "disk is full" not in error.message and not any(os.strerror(code) in error.message for code in _DISK_FULL):
            raise
        raise _disk_full_error() from error


def _disk_full_error() -> Temporary:
    return Temporary(
        f"{gettempdir()}: the disk is full, so nothing could be measured; make room or set TMPDIR, then run again"
    )
