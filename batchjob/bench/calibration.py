"""One small piece of CPU work, always the same, timed before and after: has the machine changed meanwhile?"""

from __future__ import annotations

import hashlib
import time
from random import Random
from statistics import median

__all__ = ["calibrate"]

_BYTES = 4 << 20
_ROUNDS = 25


def calibrate() -> float:
    """Milliseconds that hashing 4 MiB of noise takes one core; median of 25."""
    noise = Random(0).randbytes(_BYTES)
    hashlib.sha256(noise).digest()
    return median(_clocked(noise) for _ in range(_ROUNDS)) * 1e3


def _clocked(noise: bytes) -> float:
    began = time.perf_counter()
    hashlib.sha256(noise).digest()
    return time.perf_counter() - began
