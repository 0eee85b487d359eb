"""`batchjob bench`: list the first images, load a worker, and measure it."""

from __future__ import annotations

import errno
import os
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from tempfile import gettempdir

from batchjob import system
from batchjob.bench.input_sample import DEFAULT_IMAGES, sample_input
from batchjob.bench.machine_stats import calibrate
from batchjob.bench.results import BenchResult
from batchjob.errors import AttemptFailed, Temporary
from batchjob.job.job import Job
from batchjob.worker.loader_forkserver import start_loader_forkserver

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
    with _detect_full_disk():
        calibration_ms = calibrate()
        sample = sample_input(job, options.images or DEFAULT_IMAGES)
        started = time.perf_counter()
        # These import torch, as the first thing a worker does; the fork server imports it at the same time.
        start_loader_forkserver(job)
        from batchjob.bench.bench_worker import open_bench_worker
        from batchjob.bench.measurement import measure

        with open_bench_worker(job, options.images, _count_cores(job), sample, started) as worker:
            return measure(worker, options.profile, sample, calibration_ms)


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
