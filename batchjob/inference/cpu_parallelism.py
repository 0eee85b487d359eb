"""How many batches a device computes side by side, and with how many threads each."""

from __future__ import annotations

import ctypes
import os
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from torch import nn

__all__ = ["CpuParallelism", "choose_cpu_parallelism", "is_stateful", "release_freed_memory", "retain_freed_memory"]

_MOST = 16  # each holds a batch and what the model makes of it
_BYTES = 3 << 29  # of memory for each, since what does not fit there ends the process


@dataclass(frozen=True)
class CpuParallelism:
    """What runs at once.

    Attributes:
        count: batches.
        threads: of torch, for each of them.
    """

    parallel_batches: int
    threads_per_batch: int


def choose_cpu_parallelism(
    device: str, cores: int, *, sequential: bool = False, memory: int | None = None
) -> CpuParallelism:
    """A batch for each core of a CPU: threads that share one batch wait for each other after each layer.

    They do so the longer the more the loader's processes take of the same cores.

    Args:
        device: type of the device where the model runs. Others than CPUs get one batch at a time.
        cores: that may be used.
        alone: the module can compute but one batch at a time, see `keeps_state`.
        memory: bytes that may be used, where that is known.
    """
    if device != "cpu" or sequential:
        return CpuParallelism(1, cores)
    room = _MOST if memory is None else memory // _BYTES
    count = max(1, min(cores, _MOST, room))
    return CpuParallelism(count, max(1, cores // count))


def is_stateful(module: nn.Module, run: Callable[[], object]) -> bool:
    """Whether a module writes to itself, or to whoever hooked into it, while it computes.

    Two batches at once in such a module might meet each other's notes.

    Args:
        module: looked at, with all modules in it.
        run: runs it once.
    """
    if any(part._forward_hooks or part._forward_pre_hooks for part in module.modules()):
        return True
    before = list(_state(module))
    run()
    return before != list(_state(module))


def _state(module: nn.Module) -> Iterator[object]:
    """What tells a module that was written to from one that was not: which objects it holds, and how often changed."""
    for part in module.modules():
        for name, value in vars(part).items():
            yield name
            yield _trace(value, depth=2)


def _trace(value: Any, depth: int) -> object:
    import torch
    from torch import nn

    if isinstance(value, torch.Tensor):
        return id(value), None if value.is_inference() else value._version
    if isinstance(value, dict) and depth:
        return [(key, _trace(held, depth - 1)) for key, held in value.items()]
    if isinstance(value, list | tuple) and depth:
        return [_trace(held, depth - 1) for held in value]
    if isinstance(value, bool | int | float | str | None):
        return value
    held = getattr(value, "__dict__", None) if depth and not isinstance(value, type | nn.Module) else None
    return id(value), None if held is None else _trace(dict(held), depth - 1)


# Parameters of glibc's mallopt(3), by their numbers in malloc.h. Its arenas are left alone: how many there may be can
# only be said before the first thread begins.
_TRIM_THRESHOLD, _TOP_PAD, _MMAP_THRESHOLD = -1, -2, -3
# The first values taken count. Before glibc 2.35 none above 32 MiB was; without one, setting the others would leave the
# threshold at 128 KiB for good.
_KEPT = {_MMAP_THRESHOLD: (1 << 30, 32 << 20), _TRIM_THRESHOLD: ((1 << 31) - 1,), _TOP_PAD: (64 << 20,)}
_USUAL = {_MMAP_THRESHOLD: (32 << 20,), _TRIM_THRESHOLD: (128 << 10,), _TOP_PAD: (128 << 10,)}


def retain_freed_memory() -> None:
    """Keep what is freed for the next who asks.

    A batch's activations are tens of megabytes, taken and freed again for each layer. As fresh pages of the system,
    each zeroed at its first touch, they cost a tenth of the speed (`benchmarks/LOG.md`). Does nothing where the C
    library is not glibc, or where the environment says how it is to be.
    """
    _set(_KEPT)


def release_freed_memory() -> None:
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
