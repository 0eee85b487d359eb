"""`batchjob_local` with `decode.mode=fast`: pixels then differ by about half a level, as torchvision's v2 has them."""

from __future__ import annotations

from benchmarks.assignment import Assignment
from benchmarks.batchjob_run import run

if __name__ == "__main__":
    run(Assignment.parse(), "local", "decode.mode=fast")
