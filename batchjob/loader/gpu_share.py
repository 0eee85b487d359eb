"""Share of the images that the GPU decodes, adjusted so that CPUs and GPU are both busy."""

from __future__ import annotations

import ctypes
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from multiprocessing.context import BaseContext
from typing import Any, TypeVar

import torch

from batchjob.preprocessing.decode import read_jpeg_orientation
from batchjob.preprocessing.jpeg import read_baseline_jpeg_size
from batchjob.preprocessing.settings import DecodeSettings
from batchjob.preprocessing.transforms import ImageTransform
from batchjob.types import PreparedImage

__all__ = ["GpuShare", "GpuShareController", "GpuSplitTransform", "adjust_share"]

T = TypeVar("T")

INITIAL_SHARE = 0.5

_STEP = 0.05
_HIGH_WAIT = 0.05  # fraction of the time spent waiting for the loader above which the GPU gets a larger share
_LOW_WAIT = 0.01  # fraction below which it gets a smaller one
_MAX_GPU_PIXELS = 32 << 20  # of one image that the GPU may decode, before and after the resize


class GpuShare:
    """Share of the suitable images that the GPU decodes: one number in shared memory for all loader processes.

    The worker writes it, loader processes read it. It can only be passed to a process as that process starts.

    Example: with a share of 0.4, `is_gpu_turn` adds 0.4 a call and becomes true at 0.4, 0.8, 1.2: on the third image.
    `assign_to_gpu` subtracts 1, and the sums go on with 0.6, 1.0: the fifth image.

    Args:
        context: Multiprocessing context that starts the processes.
        value: Initial share, from 0 to 1.
    """

    def __init__(self, context: BaseContext, value: float = INITIAL_SHARE) -> None:
        self._shared_value: Any = context.RawValue(ctypes.c_double, value)
        self._due = 0.0  # images that the GPU should have got, of those of this process

    @property
    def value(self) -> float:
        return float(self._shared_value.value)

    @value.setter
    def value(self, value: float) -> None:
        self._shared_value.value = value

    def is_gpu_turn(self) -> bool:
        """Return True if the GPU should decode the next image, provided it can. Call it once for each image."""
        # Capped: after many unsuitable images the GPU does not get all of the next ones.
        self._due = min(self._due + self._shared_value.value, 2.0)
        return self._due >= 1.0

    def assign_to_gpu(self) -> None:
        """Count the image as one that the GPU decodes."""
        self._due -= 1.0


@dataclass(frozen=True)
class GpuSplitTransform:
    """Encoded image to tensor, where the GPU decodes a share of the images: those stay encoded. Picklable.

    Attributes:
        cpu_transform: Transform of all images that are not left to the GPU.
        share: Share of the suitable images that the GPU decodes.
    """

    cpu_transform: ImageTransform
    share: GpuShare

    def __call__(self, data: bytes) -> PreparedImage:
        """Prepare one encoded image; one for the GPU comes as flat uint8 `[bytes]`. Raises ImageError."""
        size = self._read_suitable_size(data) if self.share.is_gpu_turn() else None
        if size is None:
            return self.cpu_transform(data)
        self.share.assign_to_gpu()
        return PreparedImage(torch.frombuffer(bytearray(data), dtype=torch.uint8), size[1], size[0])

    def _read_suitable_size(self, data: bytes) -> tuple[int, int] | None:
        """Read height and width of an image that the GPU can decode; None of all others."""
        size, settings = read_baseline_jpeg_size(data), self.cpu_transform.settings
        if size is None or size[0] * size[1] > min(settings.max_pixels, _MAX_GPU_PIXELS):
            return None
        if self.cpu_transform.resize_crop.resized_pixels(size) > _MAX_GPU_PIXELS:
            return None
        return size if not self.cpu_transform.apply_exif or _is_upright(data, settings) else None


class GpuShareController:
    """Control of the GPU's share by the time that the loader's batches are waited for.

    Args:
        share: Share to adjust.
        window: Batches between two adjustments: as many as are in flight, which were divided by an earlier share.
        clock: Monotonic clock, in seconds.
    """

    def __init__(self, share: GpuShare, window: int, clock: Callable[[], float] = time.perf_counter) -> None:
        self.share, self._window, self._clock = share, window, clock
        self._disabled = False

    def observe(self, batches: Iterator[T]) -> Iterator[T]:
        """Pass batches through and measure the wait for each but the first, whose wait is start-up time."""
        seen, waited, began = -1, 0.0, 0.0
        while True:
            asked = self._clock()
            batch = next(batches, None)
            if batch is None:
                return
            now = self._clock()
            seen, waited = seen + 1, waited + (now - asked)
            if seen in {0, self._window}:
                if seen and now > began and not self._disabled:
                    self.share.value = adjust_share(self.share.value, waited / (now - began))
                seen, waited, began = 0, 0.0, now
            yield batch

    def disable(self) -> None:
        """Set the share to 0 for good: the CPU decodes everything."""
        self._disabled, self.share.value = True, 0.0


def adjust_share(share: float, wait_fraction: float) -> float:
    """Compute the next share.

    A worker that waits for the loader has time left on its GPU, which can decode more. Where batches are always ready,
    the model or the GPU's decoder is the bottleneck, and the CPU takes over what it can.

    Example: at a share of 0.5, waiting 8 % of the time gives 0.55, 3 % keeps 0.5, and 0 % gives 0.45.

    Args:
        share: Current share.
        wait_fraction: Part of the time, 0 to 1, that was spent waiting for the loader.
    """
    if wait_fraction > _HIGH_WAIT:
        return min(1.0, share + _STEP)
    return max(0.0, share - _STEP) if wait_fraction < _LOW_WAIT else share


def _is_upright(data: bytes, settings: DecodeSettings) -> bool:
    try:
        return read_jpeg_orientation(data, settings) == 1
    except Exception:  # noqa: BLE001 - the CPU's decoder meets the same fault, and names it
        return False
