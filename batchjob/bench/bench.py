"""`batchjob bench`: list the first images, load a worker, and measure it: a run, each stage alone, the ceilings."""

from __future__ import annotations

import errno
import os
from dataclasses import dataclass
from pathlib import Path
from tempfile import gettempdir

from batchjob.bench.bench_worker import BenchWorker, open_bench_worker
from batchjob.bench.bottleneck import compute_ceilings
from batchjob.bench.machine_stats import calibrate, sample_memory
from batchjob.bench.profile import write_profile
from batchjob.bench.results import BenchResult
from batchjob.bench.stages import measure_fetch_rate, measure_stages
from batchjob.errors import AttemptFailed, Temporary
from batchjob.job.job import Job

__all__ = ["BenchOptions", "bench"]

_DISK_FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)


@dataclass(frozen=True)
class BenchOptions:
    """Options of a bench.

    Attributes:
        images: Images of a run; if the job has fewer, they are repeated. None takes 1,000, or four batches if these
            are more.
        profile: Folder for torch's table and a Chrome trace; None writes neither.
    """

    images: int | None = None
    profile: Path | None = None


def bench(job: Job, options: BenchOptions) -> BenchResult:
    """Measure a job's path from storage to Parquet, with the parts that a run uses. Its output is not touched.

    Raises:
        InvalidJob: If the job cannot run, or has fewer than two batches of images.
        Temporary: If the disk for temporary files is full.
        BatchjobError: If the run itself fails.
    """
    try:
        before_ms = calibrate()
        with open_bench_worker(job, options.images) as worker:
            return _measure(worker, options.profile, before_ms)
    except (OSError, AttemptFailed) as error:
        if not _is_disk_full(error):
            raise
        raise Temporary(
            f"{gettempdir()}: the disk is full, so nothing could be measured; make room or set TMPDIR, then run again"
        ) from error


def _is_disk_full(error: OSError | AttemptFailed) -> bool:
    if isinstance(error, OSError):
        return error.errno in _DISK_FULL
    return any(reason in error.message for reason in ("disk is full", *map(os.strerror, _DISK_FULL)))


def _measure(worker: BenchWorker, profile_folder: Path | None, before_ms: float) -> BenchResult:
    with sample_memory() as memory:
        run = worker.run(worker.shards)
    batches = worker.load_sample()
    pixels = worker.select_pixels(batches)
    stages = (worker.listing, *measure_stages(worker, batches, pixels))
    return BenchResult(
        model=worker.info.model,
        device=worker.info.device,
        recipe=worker.predictor.forward.config.description,
        decode_mode=worker.job.decode.mode,
        batch_size=worker.batch_size,
        cores=worker.cores,
        loader_processes=worker.loader.config.processes,
        distinct=min(run.images, worker.listed),
        stages=stages,
        ceilings=compute_ceilings(stages, worker.cores, measure_fetch_rate(worker)),
        run=run,
        memory=memory,
        profile=() if profile_folder is None else write_profile(worker, profile_folder),
        calibration_ms=(before_ms, calibrate()),
    )
