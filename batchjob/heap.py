"""Memory that a process frees and takes again: kept, where the C library would give it back to the system each time."""

from __future__ import annotations

import ctypes
import os
from collections.abc import Mapping

__all__ = ["give_back", "keep"]

# Parameters of glibc's mallopt(3), by their numbers in malloc.h. Its arenas are left alone: how many there may be can
# only be said before the first thread begins.
_TRIM_THRESHOLD, _TOP_PAD, _MMAP_THRESHOLD = -1, -2, -3
# The first values taken count. Before glibc 2.35 none above 32 MiB was; without one, setting the others would leave the
# threshold at 128 KiB for good.
_KEPT = {_MMAP_THRESHOLD: (1 << 30, 32 << 20), _TRIM_THRESHOLD: ((1 << 31) - 1,), _TOP_PAD: (64 << 20,)}
_USUAL = {_MMAP_THRESHOLD: (32 << 20,), _TRIM_THRESHOLD: (128 << 10,), _TOP_PAD: (128 << 10,)}


def keep() -> None:
    """Keep what is freed for the next who asks.

    A batch's activations are tens of megabytes, taken and freed again for each layer. As fresh pages of the system,
    each zeroed at its first touch, they cost a tenth of the speed (`benchmarks/LOG.md`). Does nothing where the C
    library is not glibc, or where the environment says how it is to be.
    """
    _set(_KEPT)


def give_back() -> None:
    """Give the system what is free, and keep no more of it than usual from now on."""
    if _set(_USUAL):
        ctypes.CDLL(None).malloc_trim(0)


def _set(parameters: Mapping[int, tuple[int, ...]]) -> bool:
    if any(name.startswith(("MALLOC_", "GLIBC_TUNABLES")) for name in os.environ):
        return False
    try:
        mallopt = ctypes.CDLL(None).mallopt
    except (OSError, AttributeError):
        return False
    return all(any(mallopt(parameter, value) for value in values) for parameter, values in parameters.items())
