"""batchjob with its workers on a Ray cluster that it starts and stops, and defaults for everything else."""

from __future__ import annotations

from benchmarks.batchjob_run import run_batchjob
from benchmarks.workload import Workload

if __name__ == "__main__":
    run_batchjob(Workload.parse(), "ray")
