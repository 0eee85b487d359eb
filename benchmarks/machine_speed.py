"""Check that the machine is as fast at the end of a benchmark as at its beginning."""

from __future__ import annotations

import hashlib
import os
import time
from concurrent.futures import ThreadPoolExecutor

__all__ = ["MachineSpeedCheck"]

_DATA = bytes(64 << 20)
_REPEATS = 5
_MAX_DRIFT = 0.05


class MachineSpeedCheck:
    """Fixed work on all cores, timed when this object is made and again when the result is asked for."""

    def __init__(self) -> None:
        self._before = _time_fixed_work()

    def describe_drift(self) -> str:
        """Return `machine steady within 5 %`, or by how much the machine's speed has changed."""
        drift = _time_fixed_work() / self._before - 1
        return f"NOISY: {drift:+.0%} from begin to end" if abs(drift) > _MAX_DRIFT else "machine steady within 5 %"


def _time_fixed_work() -> float:
    """Return the best of a few runs, in seconds: it shows what the machine can do at present."""
    cores = os.cpu_count() or 1
    with ThreadPoolExecutor(cores) as pool:
        best = float("inf")
        for _ in range(_REPEATS):
            began = time.perf_counter()
            list(pool.map(lambda _: hashlib.sha256(_DATA).digest(), range(cores)))
            best = min(best, time.perf_counter() - began)
    return best
