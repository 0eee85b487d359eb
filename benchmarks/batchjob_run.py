"""batchjob on an assignment, through its Python door: rows count once they are committed, and not before."""

from __future__ import annotations

import os
from pathlib import Path

import batchjob
from batchjob import Job
from batchjob.driver.progress import NoProgress
from benchmarks.workload import Workload

__all__ = ["TUNING_VARIABLE", "run_batchjob"]

TUNING_VARIABLE = "BATCHJOB_BENCH_LEARNING"
"""Environment variable: set, even a job of a few images tries what may be faster, and this machine remembers it."""

_JOB = Path(__file__).with_name("job.yaml")
_SHARDS = 24  # so many points in time has the pace of a run; left to itself batchjob commits less often


class CommitLogger(NoProgress):
    """Notes each commit. See `Progress`."""

    def __init__(self, workload: Workload) -> None:
        self.workload = workload

    def advance(self, images: int, failed: int) -> None:
        self.workload.log_progress(images - failed)


def run_batchjob(given: Workload, pool: str, *settings: str) -> None:
    """Run the job to its end. The folder holds as many images as are asked for: a prefix is listed whole."""
    shard = max(64, -(-given.limit // _SHARDS))
    more = [f"runtime.pool={pool}", f"runtime.batch_size={given.batch}", f"runtime.shard_size={shard}"]
    more += ["runtime.precision=fp32"]  # as all others compute; left to itself it takes bf16 where that is faster
    if os.environ.get(TUNING_VARIABLE):
        more += ["runtime.tuning=on"]
    if given.crop:
        more += [f"preprocess.resize={given.resize}", f"preprocess.crop={given.crop}"]
    params = {"images": given.images, "output": given.output, "weights": given.weights, "model": given.model}
    batchjob.run(Job.from_file(_JOB, params, [*more, *settings]), progress=CommitLogger(given))
