"""`batchjob bench`: what each stage could do, what the whole does, what holds it back, and which setting moves that."""

from __future__ import annotations

from batchjob.bench.findings import Findings
from batchjob.bench.measure import Wanted, bench
from batchjob.bench.wording import lines

__all__ = ["Findings", "Wanted", "bench", "lines"]
