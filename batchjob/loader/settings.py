"""What a job may say of its loader, and the rule behind `auto`."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated, Literal

from pydantic import Field

from batchjob.settings import Settings

__all__ = ["LoaderConfig", "LoaderSettings", "resolve_loader_settings"]

MAX_PROCESSES = 32
DEFAULT_IMAGE_SECONDS = 60.0
_PREFETCH = 2
_MIB = 1 << 20
_WORTH_A_PROCESS = 16 * _MIB  # of encoded images: half a second of decoding
_AT_REST_MIB = 2048  # interpreter, torch, storage clients, stacks of their threads, the encoded files of a batch
_BYTES_PER_PIXEL = 16  # of the largest image: Pillow's four, its RGB, and copies of it while it is resized
_ENOUGH_MIB = 6 * 1024  # where images need no more


class LoaderSettings(Settings):
    """How images reach the model.

    Attributes:
        processes: that fetch and decode; 0 does it in the worker itself, which a crash of a decoder then ends.
        prefetch: batches each process keeps ready.
        pin_memory: page-locked batches, for faster copies to a GPU.
        image_seconds: that one image may take to decode and transform, by the clock and of CPU seconds of all its
            threads together; its download does not count.
        memory_mib: that one process may use, shared batches left out; an image that needs more is an error row.
    """

    processes: Annotated[int, Field(ge=0, le=1024)] | Literal["auto"] = "auto"
    prefetch: Annotated[int, Field(ge=1, le=1024)] | Literal["auto"] = "auto"
    pin_memory: bool | Literal["auto"] = "auto"
    image_seconds: Annotated[float, Field(gt=0, allow_inf_nan=False)] = DEFAULT_IMAGE_SECONDS
    memory_mib: Annotated[int, Field(ge=2048)] | Literal["auto"] = "auto"


@dataclass(frozen=True)
class LoaderConfig:
    """Loader settings with nothing left open; `memory` in bytes, None without a limit."""

    processes: int
    prefetch: int
    pin_memory: bool
    image_seconds: float = DEFAULT_IMAGE_SECONDS
    memory_bytes: int | None = None


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
    """The rule behind `auto`: a process per core, or fewer for a few images; pinned where there is a CUDA device.

    There are fewer, too, where shared memory has no room for what they would keep ready.

    Args:
        settings: what the job says.
        cores: that this worker may use.
        few_bytes: of all images, where the whole job has no more than `FEW_IMAGES`.
        cuda: whether batches go to a CUDA device.
        memory: bytes that this worker and its loader may use, where that is known.
        max_pixels: of the largest image that is decoded.
        batch_bytes: of the pixels of a batch.
        shared: bytes that are free in shared memory, where that is known.
    """
    most = max(1, min(cores, MAX_PROCESSES))
    wanted = most if small_input_bytes is None else min(most, 1 + small_input_bytes // _WORTH_A_PROCESS)
    each = wanted if settings.processes == "auto" else max(1, settings.processes)
    room = (
        shared_memory_bytes // 2 // batch_bytes if shared_memory_bytes is not None and batch_bytes else _PREFETCH * each
    )
    prefetch = max(1, min(_PREFETCH, room // each)) if settings.prefetch == "auto" else settings.prefetch
    processes = max(1, min(wanted, room // prefetch)) if settings.processes == "auto" else settings.processes
    return LoaderConfig(
        processes=processes,
        prefetch=prefetch,
        pin_memory=cuda and settings.pin_memory in {True, "auto"},
        image_seconds=settings.image_seconds,
        memory_bytes=_memory(memory_bytes, processes, max_pixels)
        if settings.memory_mib == "auto"
        else settings.memory_mib * _MIB,
    )


def _memory(given: int | None, processes: int, max_pixels: int) -> int | None:
    """Bytes for each process: its share, more where the largest image needs more, less where that is plenty."""
    if given is None:
        return None
    share = given // (processes + 1)
    return max(_AT_REST_MIB * _MIB + _BYTES_PER_PIXEL * max_pixels, min(share, _ENOUGH_MIB * _MIB))
