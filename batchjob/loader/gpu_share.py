"""Decoding divided between the loader's CPUs and the device, so that both are busy: a share, and what steers it."""

from __future__ import annotations

import ctypes
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, TypeVar

from batchjob.preprocessing.decode import read_jpeg_orientation
from batchjob.preprocessing.jpeg import read_baseline_jpeg_size
from batchjob.preprocessing.settings import DecodeSettings
from batchjob.preprocessing.transforms import ImageTransform
from batchjob.types import PreparedImage

if TYPE_CHECKING:
    from multiprocessing.context import BaseContext


__all__ = ["GpuShare", "GpuShareController", "GpuSplitTransform", "adjust_share"]

T = TypeVar("T")
INITIAL_SHARE = 0.5
_STEP = 0.05
_STARVED = 0.05  # of the time, waiting for the loader; over it the device is given more to decode
_FED = 0.01  # under it less


class GpuShare:
    """The part of the images it can decode that a device is given: one number for all loader processes.

    Written in the worker, read in the loader processes. Travels only to a process that is being started.

    Args:
        context: the one that the processes are started by.
        value: between 0 and 1.
    """

    def __init__(self, context: BaseContext, value: float = INITIAL_SHARE) -> None:
        self._cell: Any = context.RawValue(ctypes.c_double, value)
        self._owed = 0.0  # images, in this process

    @property
    def value(self) -> float:
        return float(self._cell.value)

    @value.setter
    def value(self, value: float) -> None:
        self._cell.value = value

    def is_gpu_turn(self) -> bool:
        """Whether the image at hand is the device's, if it can decode it. To be asked once for each image."""
        self._owed = min(self._owed + self._cell.value, 2.0)  # what nothing could be given for is forgotten
        return self._owed >= 1.0

    def assign_to_gpu(self) -> None:
        """The device gets the image at hand."""
        self._owed -= 1.0


def adjust_share(share: float, wait_fraction: float) -> float:
    """The share from now on.

    Whoever waits for batches of the loader has time to decode some more himself; where batches are always ready, either
    the model or the device's decoder is what all wait for, and the CPU takes over what it can.

    Args:
        share: so far.
        waited: part of the time, 0 to 1, that was spent waiting for the loader.
    """
    if wait_fraction > _STARVED:
        return min(1.0, share + _STEP)
    return max(0.0, share - _STEP) if wait_fraction < _FED else share


class GpuShareController:
    """Steers a share by how long the loader's batches are waited for.

    Args:
        share: what is steered.
        window: batches that are looked at together; so many are under way that were divided by an earlier share.
        clock: seconds, monotonic.
    """

    def __init__(self, share: GpuShare, window: int, clock: Callable[[], float] = time.perf_counter) -> None:
        self.share, self._window, self._clock = share, window, clock
        self._ended = False

    def observe(self, batches: Iterator[T]) -> Iterator[T]:
        """The same; the time that each takes to come is what counts, but for the first."""
        seen, waited, began = -1, 0.0, 0.0
        while True:
            asked = self._clock()
            batch = next(batches, None)
            if batch is None:
                return
            now = self._clock()
            seen, waited = seen + 1, waited + (now - asked)
            if seen in {0, self._window}:
                if seen and now > began:
                    self._steer(waited / (now - began))
                seen, waited, began = 0, 0.0, now
            yield batch

    def disable(self) -> None:
        """Give the device nothing any more."""
        self._ended, self.share.value = True, 0.0

    def _steer(self, waited: float) -> None:
        if not self._ended:
            self.share.value = adjust_share(self.share.value, waited)


_DEVICE_PIXELS = 32 << 20  # of one image that is left to a device, before and after the resize


@dataclass(frozen=True)
class GpuSplitTransform:
    """What a loader process does to each image where a device decodes a share of them.

    Attributes:
        host: does what is not left to the device.
        share: of the images that the device can decode.
    """

    cpu_transform: ImageTransform
    share: GpuShare

    def __call__(self, data: bytes) -> PreparedImage:
        """One encoded image; what the device is to decode is flat, uint8 `[bytes]`. Raises ImageFault."""
        import torch

        size = self._size(data) if self.share.is_gpu_turn() else None
        if size is None:
            return self.cpu_transform(data)
        self.share.assign_to_gpu()
        return PreparedImage(torch.frombuffer(bytearray(data), dtype=torch.uint8), size[1], size[0])

    def _size(self, data: bytes) -> tuple[int, int] | None:
        """Height and width of an image that the device can decode, None of all that need more care."""
        size, settings = read_baseline_jpeg_size(data), self.cpu_transform.settings
        if size is None or size[0] * size[1] > min(settings.max_pixels, _DEVICE_PIXELS):
            return None
        if self.cpu_transform.resize_crop.resized_pixels(size) > _DEVICE_PIXELS:
            return None
        return size if not self.cpu_transform.apply_exif or _upright(data, settings) else None


def _upright(data: bytes, settings: DecodeSettings) -> bool:
    try:
        return read_jpeg_orientation(data, settings) == 1
    except Exception:  # noqa: BLE001 - whatever Pillow meets in it, the host's decoder names it
        return False
