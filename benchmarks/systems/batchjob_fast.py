"""batchjob as in `batchjob_local`, with `decode.mode=fast`: pixels differ by half a level, like torchvision's v2."""

from __future__ import annotations

from benchmarks.batchjob_run import run_batchjob
from benchmarks.workload import Workload

if __name__ == "__main__":
    run_batchjob(Workload.parse(), "local", "decode.mode=fast")
