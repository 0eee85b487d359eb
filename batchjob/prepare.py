"""Encoded bytes to what goes into a batch: decode, then geometry, as one picklable callable; or left as they are."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from batchjob.decode import Decoded, DecodeSettings, decode, jpeg_orientation
from batchjob.jpeg import plain_jpeg_size
from batchjob.records import Prepared
from batchjob.share import Share
from batchjob.transform import Geometry

if TYPE_CHECKING:
    import torch

__all__ = ["Divided", "Prepare"]

_DEVICE_PIXELS = 32 << 20  # of one image that is left to a device, before and after the resize


@dataclass(frozen=True)
class Prepare:
    """What a loader process does to each image.

    Attributes:
        settings: limits of the decoder, and how exact it must be.
        geometry: resize and crop, or the job's own transform.
        gray: decode to one channel in place of three.
        turn: apply the EXIF orientation.
    """

    settings: DecodeSettings
    geometry: Geometry
    gray: bool
    turn: bool

    def __call__(self, data: bytes) -> Prepared:
        """One encoded image. Raises ImageFault."""
        decoded = self.decoded(data)
        return Prepared(self.transformed(decoded), decoded.width, decoded.height, decoded.turned)

    def decoded(self, data: bytes) -> Decoded:
        """The first half: pixels as the geometry takes them. Raises ImageFault."""
        return decode(data, self.settings, "gray" if self.gray else "rgb", self.turn, self.geometry.least)

    def transformed(self, decoded: Decoded) -> torch.Tensor:
        """The second half: what goes into the batch. Raises ImageFault."""
        if self.settings.mode == "exact":
            return self.geometry(decoded.pixels)
        return self.geometry.fast(decoded.pixels, decoded.upright, decoded.shrunk)


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
