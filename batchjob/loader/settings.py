"""Job settings of the loader (`runtime.loader:`), and the rule that resolves `auto`."""

from __future__ import annotations

import sys
from dataclasses import dataclass
from typing import Annotated, Literal

from pydantic import Field

from batchjob.settings import Settings

__all__ = ["LoaderConfig", "LoaderSettings", "resolve_loader_settings"]

MAX_PROCESSES = 32
DEFAULT_IMAGE_SECONDS = 60.0

_PREFETCH = 2
_BEYOND_PROCESSES = 3  # requests beyond those that the processes hold
_MIB = 1 << 20
_BYTES_PER_PROCESS = 16 * _MIB  # encoded images worth one more process: half a second of decoding
_IDLE_MIB = 2048  # interpreter, torch, storage clients, stacks of their threads, the encoded files of a batch
_BYTES_PER_PIXEL = 16  # of the largest image: Pillow's four, its RGB, and copies of it while it is resized
_ENOUGH_MIB = 6 * 1024  # for a process whose images need no more


class LoaderSettings(Settings):
    """Processes that fetch and decode images, and their limits.

    Attributes:
        processes: Processes that fetch and decode; 0 does it in the worker itself, which then ends if a decoder
            crashes.
        prefetch: Batches that each process keeps ready.
        pin_memory: Page-locked batches, for faster copies to a GPU.
        image_seconds: Seconds in which one image must be decoded and transformed, by the clock and also in CPU time
            of all threads together; its download does not count.
        memory_mib: Memory of one process in MiB, shared batches not included; an image that needs more is an error
            row.
    """

    processes: Annotated[int, Field(ge=0, le=1024)] | Literal["auto"] = "auto"
    prefetch: Annotated[int, Field(ge=1, le=1024)] | Literal["auto"] = "auto"
    pin_memory: bool | Literal["auto"] = "auto"
    image_seconds: Annotated[float, Field(gt=0, allow_inf_nan=False)] = DEFAULT_IMAGE_SECONDS
    memory_mib: Annotated[int, Field(ge=2048)] | Literal["auto"] = "auto"


@dataclass(frozen=True)
class LoaderConfig:
    """Loader settings without `auto`.

    Attributes:
        processes: Loader processes; 0 loads in the worker.
        prefetch: Batches that each process keeps ready.
        pin_memory: Copy batches into page-locked memory.
        image_seconds: Seconds in which one image must be decoded and transformed.
        memory_bytes: Memory of one process, in bytes; None without a limit.
        max_batches: Batches for which shared memory has room; None if there is plenty.
    """

    processes: int
    prefetch: int
    pin_memory: bool
    image_seconds: float = DEFAULT_IMAGE_SECONDS
    memory_bytes: int | None = None
    max_batches: int | None = None

    @property
    def window(self) -> int:
        """Batches that are requested and not used yet.

        DataLoader asks for its next index before it hands out the batch that has arrived. With no more requests than
        its processes hold, each batch would leave one of them without work (9 % fewer images/s).

        Example: 2 processes with 2 batches each have 7 requests, or 4 if shared memory has room for 4 batches.
        """
        held = self.processes * self.prefetch
        return held + _BEYOND_PROCESSES if self.max_batches is None else max(held, self.max_batches)


def resolve_loader_settings(
    settings: LoaderSettings,
    *,
    cores: int,
    small_input_bytes: int | None = None,
    cuda: bool = False,
    memory_bytes: int | None = None,
    max_pixels: int = 0,
    batch_bytes: int = 0,
    shared_memory_bytes: int | None = None,
) -> LoaderConfig:
    """Resolve `auto`: one process per core, fewer for a small input, pinned batches for a CUDA device.

    There are also fewer processes where shared memory has no room for the batches that they keep ready.

    Example: 8 cores, 1 GiB of shared memory and batches of 64 MiB leave room for 8 batches, half of the memory; so
    `prefetch` is 1 (8 batches // 8 processes) and there are 8 processes.

    Args:
        settings: Settings of the job.
        cores: CPU cores that this worker may use.
        small_input_bytes: Bytes of all encoded images; None where the job has more than `SMALL_INPUT_IMAGES`.
        cuda: True if batches go to a CUDA device.
        memory_bytes: Memory that this worker and its loader may use, in bytes; None if unknown.
        max_pixels: Pixels of the largest image that is decoded.
        batch_bytes: Bytes of the pixels of a batch.
        shared_memory_bytes: Free shared memory, in bytes; None if unknown.
    """
    max_processes = max(1, min(cores, MAX_PROCESSES))
    useful = max_processes
    if small_input_bytes is not None:
        useful = min(max_processes, 1 + small_input_bytes // _BYTES_PER_PROCESS)
    processes = useful if settings.processes == "auto" else max(1, settings.processes)
    batches_in_memory = sys.maxsize
    if shared_memory_bytes is not None and batch_bytes:
        batches_in_memory = shared_memory_bytes // 2 // batch_bytes
    prefetch = max(1, min(_PREFETCH, batches_in_memory // processes))
    if settings.prefetch != "auto":
        prefetch = settings.prefetch
    processes = max(1, min(useful, batches_in_memory // prefetch))
    if settings.processes != "auto":
        processes = settings.processes
    return LoaderConfig(
        processes=processes,
        prefetch=prefetch,
        pin_memory=cuda and settings.pin_memory in {True, "auto"},
        image_seconds=settings.image_seconds,
        memory_bytes=(
            _choose_process_memory(memory_bytes, processes, max_pixels)
            if settings.memory_mib == "auto"
            else settings.memory_mib * _MIB
        ),
        max_batches=batches_in_memory if batches_in_memory < processes * prefetch + _BEYOND_PROCESSES else None,
    )


def _choose_process_memory(available: int | None, processes: int, max_pixels: int) -> int | None:
    """Choose the memory of each process: its share, more if the largest image needs it, less if that is plenty.

    Example: 3 processes and the worker share 16 GiB, so each may use 4 GiB.
    """
    if available is None:
        return None
    share = available // (processes + 1)
    return max(_IDLE_MIB * _MIB + _BYTES_PER_PIXEL * max_pixels, min(share, _ENOUGH_MIB * _MIB))
