"""Parallelism on a CPU: how many batches are computed at once, and memory that stays with the process for them."""

from __future__ import annotations

import ctypes
import os
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

__all__ = ["CpuParallelism", "choose_cpu_parallelism", "is_stateful", "release_freed_memory", "retain_freed_memory"]

# Each batch under way holds its pixels and the activations that the model computes from them.
_MAX_PARALLEL_BATCHES = 16
# Memory to have for each of them, in bytes: if it is exceeded, the process is killed.
_BYTES_PER_BATCH = 3 << 29

# Parameters of glibc's mallopt(3), by their numbers in malloc.h. The number of arenas is not changed: it can only be
# set before the first thread starts.
_TRIM_THRESHOLD, _TOP_PAD, _MMAP_THRESHOLD = -1, -2, -3
# The first accepted value of each parameter is used. glibc before 2.35 accepts no mmap threshold above 32 MiB, and
# setting only the other two would fix the threshold at 128 KiB for the rest of the process.
_RETAINING = {_MMAP_THRESHOLD: (1 << 30, 32 << 20), _TRIM_THRESHOLD: ((1 << 31) - 1,), _TOP_PAD: (64 << 20,)}
_DEFAULT = {_MMAP_THRESHOLD: (32 << 20,), _TRIM_THRESHOLD: (128 << 10,), _TOP_PAD: (128 << 10,)}


@dataclass(frozen=True)
class CpuParallelism:
    """Batches computed at once, and threads for each.

    Attributes:
        parallel_batches: Number of batches that the model computes at once.
        threads_per_batch: Threads of torch for each of these batches.
    """

    parallel_batches: int
    threads_per_batch: int


def choose_cpu_parallelism(
    device: str, cores: int, *, sequential: bool = False, memory: int | None = None
) -> CpuParallelism:
    """Choose how many batches to compute at once, and with how many threads each.

    On a CPU, run one batch per core with one thread each: intra-op threads synchronise after every layer, which costs
    throughput, and more of it while loader processes use the same cores (165 → 198 images/s, benchmarks/LOG.md).

    Args:
        device: Type of the device on which the model runs; all types but `cpu` compute one batch at a time.
        cores: Cores that may be used.
        sequential: The module can only compute one batch at a time, see `is_stateful`.
        memory: Bytes that may be used; None if unknown.
    """
    if device != "cpu" or sequential:
        return CpuParallelism(1, cores)
    fitting = _MAX_PARALLEL_BATCHES if memory is None else memory // _BYTES_PER_BATCH
    count = max(1, min(cores, _MAX_PARALLEL_BATCHES, fitting))
    return CpuParallelism(count, max(1, cores // count))


def is_stateful(module: nn.Module, run: Callable[[], object]) -> bool:
    """Return True if a module writes to itself while it computes, or has hooks that may write anywhere.

    Two batches computed at once in such a module could read each other's state.

    Args:
        module: Module to examine, with all its submodules.
        run: Function that runs the module once.
    """
    if any(part._forward_hooks or part._forward_pre_hooks for part in module.modules()):
        return True
    before = list(_snapshot(module))
    run()
    return before != list(_snapshot(module))


def retain_freed_memory() -> None:
    """Make the C library keep freed memory for the next allocation, in place of returning it to the system.

    The activations of a batch are tens of megabytes that are allocated and freed for each layer. As fresh pages of the
    system, each zeroed at its first touch, they cost a tenth of the throughput (`benchmarks/LOG.md`). Does nothing if
    the C library is not glibc, or if the environment configures its allocator.
    """
    _set_malloc_options(_RETAINING)


def release_freed_memory() -> None:
    """Return freed memory to the system, and go back to the C library's default."""
    if _set_malloc_options(_DEFAULT):
        ctypes.CDLL(None).malloc_trim(0)


def _snapshot(module: nn.Module) -> Iterator[object]:
    """Yield the names and fingerprints of all attributes; equal snapshots mean that nothing was written between."""
    for part in module.modules():
        for name, value in vars(part).items():
            yield name
            yield _fingerprint(value, depth=2)


def _fingerprint(value: Any, depth: int) -> object:
    """Return something that changes if the value is replaced or, for a tensor, written in place.

    Example: a tensor becomes `(id, version counter)`, a list the fingerprints of its items, a number itself.
    """
    if isinstance(value, torch.Tensor):
        return id(value), None if value.is_inference() else value._version
    if isinstance(value, dict) and depth:
        return [(key, _fingerprint(item, depth - 1)) for key, item in value.items()]
    if isinstance(value, list | tuple) and depth:
        return [_fingerprint(item, depth - 1) for item in value]
    if isinstance(value, bool | int | float | str | None):
        return value
    attributes = getattr(value, "__dict__", None) if depth and not isinstance(value, type | nn.Module) else None
    return id(value), None if attributes is None else _fingerprint(dict(attributes), depth - 1)


def _set_malloc_options(options: Mapping[int, tuple[int, ...]]) -> bool:
    """Set options of the allocator; return whether each was accepted with one of its values."""
    if any(name.startswith(("MALLOC_", "GLIBC_TUNABLES")) for name in os.environ):
        return False
    try:
        mallopt = ctypes.CDLL(None).mallopt
    except (OSError, AttributeError):
        return False
    return all(any(mallopt(option, value) for value in values) for option, values in options.items())
