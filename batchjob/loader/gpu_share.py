"""Decoding divided between the loader's CPUs and the device, so that both are busy: a share, and what steers it."""

from __future__ import annotations

import ctypes
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, TypeVar

from batchjob.preprocessing.decode import jpeg_orientation
from batchjob.preprocessing.jpeg import plain_jpeg_size
from batchjob.preprocessing.settings import DecodeSettings
from batchjob.preprocessing.transforms import Prepare
from batchjob.types import Prepared

if TYPE_CHECKING:
    from multiprocessing.context import BaseContext


__all__ = ["Balance", "Divided", "Share", "steered"]

T = TypeVar("T")
FIRST = 0.5
_STEP = 0.05
_STARVED = 0.05  # of the time, waiting for the loader; over it the device is given more to decode
_FED = 0.01  # under it less


class Share:
    """The part of the images it can decode that a device is given: one number for all loader processes.

    Written in the worker, read in the loader processes. Travels only to a process that is being started.

    Args:
        context: the one that the processes are started by.
        value: between 0 and 1.
    """

    def __init__(self, context: BaseContext, value: float = FIRST) -> None:
        self._cell: Any = context.RawValue(ctypes.c_double, value)
        self._owed = 0.0  # images, in this process

    @property
    def value(self) -> float:
        return float(self._cell.value)

    @value.setter
    def value(self, value: float) -> None:
        self._cell.value = value

    def due(self) -> bool:
        """Whether the image at hand is the device's, if it can decode it. To be asked once for each image."""
        self._owed = min(self._owed + self._cell.value, 2.0)  # what nothing could be given for is forgotten
        return self._owed >= 1.0

    def give(self) -> None:
        """The device gets the image at hand."""
        self._owed -= 1.0


def steered(share: float, waited: float) -> float:
    """The share from now on.

    Whoever waits for batches of the loader has time to decode some more himself; where batches are always ready, either
    the model or the device's decoder is what all wait for, and the CPU takes over what it can.

    Args:
        share: so far.
        waited: part of the time, 0 to 1, that was spent waiting for the loader.
    """
    if waited > _STARVED:
        return min(1.0, share + _STEP)
    return max(0.0, share - _STEP) if waited < _FED else share


class Balance:
    """Steers a share by how long the loader's batches are waited for.

    Args:
        share: what is steered.
        window: batches that are looked at together; so many are under way that were divided by an earlier share.
        clock: seconds, monotonic.
    """

    def __init__(self, share: Share, window: int, clock: Callable[[], float] = time.perf_counter) -> None:
        self.share, self._window, self._clock = share, window, clock
        self._ended = False

    def over(self, batches: Iterator[T]) -> Iterator[T]:
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

    def end(self) -> None:
        """Give the device nothing any more."""
        self._ended, self.share.value = True, 0.0

    def _steer(self, waited: float) -> None:
        if not self._ended:
            self.share.value = steered(self.share.value, waited)


_DEVICE_PIXELS = 32 << 20  # of one image that is left to a device, before and after the resize


@dataclass(frozen=True)
class Divided:
    """What a loader process does to each image where a device decodes a share of them.

    Attributes:
        host: does what is not left to the device.
        share: of the images that the device can decode.
    """

    host: Prepare
    share: Share

    def __call__(self, data: bytes) -> Prepared:
        """One encoded image; what the device is to decode is flat, uint8 `[bytes]`. Raises ImageFault."""
        import torch

        size = self._size(data) if self.share.due() else None
        if size is None:
            return self.host(data)
        self.share.give()
        return Prepared(torch.frombuffer(bytearray(data), dtype=torch.uint8), size[1], size[0])

    def _size(self, data: bytes) -> tuple[int, int] | None:
        """Height and width of an image that the device can decode, None of all that need more care."""
        size, settings = plain_jpeg_size(data), self.host.settings
        if size is None or size[0] * size[1] > min(settings.max_pixels, _DEVICE_PIXELS):
            return None
        if self.host.geometry.resized_pixels(size) > _DEVICE_PIXELS:
            return None
        return size if not self.host.turn or _upright(data, settings) else None


def _upright(data: bytes, settings: DecodeSettings) -> bool:
    try:
        return jpeg_orientation(data, settings) == 1
    except Exception:  # noqa: BLE001 - whatever Pillow meets in it, the host's decoder names it
        return False
