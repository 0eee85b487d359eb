"""Whether the machine was as fast at the end as at the beginning."""

from __future__ import annotations

import hashlib
import os
import time
from concurrent.futures import ThreadPoolExecutor

__all__ = ["MachineSpeedCheck"]

_BYTES = bytes(64 << 20)
_TIMES = 5
_DRIFT = 0.05


class MachineSpeedCheck:
    """The same work on all cores, now and when the verdict is asked for."""

    def __init__(self) -> None:
        self._before = _seconds()

    def describe_drift(self) -> str:
        """`machine steady within 5 %`, or that it was not, and by how much."""
        drift = _seconds() / self._before - 1
        return f"NOISY: {drift:+.0%} from begin to end" if abs(drift) > _DRIFT else "machine steady within 5 %"


def _seconds() -> float:
    """The least of some, which is what the machine can do now."""
    cores = os.cpu_count() or 1
    with ThreadPoolExecutor(cores) as pool:
        best = float("inf")
        for _ in range(_TIMES):
            began = time.perf_counter()
            list(pool.map(lambda _: hashlib.sha256(_BYTES).digest(), range(cores)))
            best = min(best, time.perf_counter() - began)
    return best
