"""batchjob on a workload, through its Python API: images count once they are committed, and not before."""

from __future__ import annotations

import os
from pathlib import Path

import batchjob
from batchjob import Job
from batchjob.driver.progress import NoProgress
from benchmarks.workload import Workload

__all__ = ["TUNING_VARIABLE", "run_batchjob"]

TUNING_VARIABLE = "BATCHJOB_BENCH_LEARNING"
"""Environment variable: if set, a job of any size tries accelerations, and this machine remembers the result."""

_JOB = Path(__file__).with_name("job.yaml")
_SHARDS = 24  # points in time at which a run's pace is measured; by default batchjob commits less often


class CommitLogger(NoProgress):
    """Progress reporter that appends each commit to the workload's progress file."""

    def __init__(self, workload: Workload) -> None:
        self.workload = workload

    def advance(self, images: int, failed: int) -> None:
        self.workload.log_progress(images - failed)


def run_batchjob(workload: Workload, pool: str, *settings: str) -> None:
    """Run the job to its end. The folder must hold exactly the images to predict, since a prefix is listed whole."""
    shard_size = max(64, -(-workload.limit // _SHARDS))
    overrides = [
        f"runtime.pool={pool}",
        f"runtime.batch_size={workload.batch}",
        f"runtime.shard_size={shard_size}",
        # All other systems compute in fp32; by default batchjob takes bf16 where that is faster.
        "runtime.precision=fp32",
    ]
    if os.environ.get(TUNING_VARIABLE):
        overrides += ["runtime.tuning=on"]
    if workload.crop:
        overrides += [f"preprocess.resize={workload.resize}", f"preprocess.crop={workload.crop}"]
    params = {
        "images": workload.images,
        "output": workload.output,
        "weights": workload.weights,
        "model": workload.model,
    }
    batchjob.run(Job.from_file(_JOB, params, [*overrides, *settings]), progress=CommitLogger(workload))
