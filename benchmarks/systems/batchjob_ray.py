"""batchjob with its workers on a Ray that it starts and stops; everything else is left to it."""

from __future__ import annotations

from benchmarks.assignment import Assignment
from benchmarks.batchjob_run import run

if __name__ == "__main__":
    run(Assignment.parse(), "ray")
