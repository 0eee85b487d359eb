"""Encoded bytes to the tensor that goes into a batch: decode, then geometry, as one picklable callable."""

from __future__ import annotations

from dataclasses import dataclass

from batchjob.decode import DecodeSettings, decode
from batchjob.records import Prepared
from batchjob.transform import Geometry

__all__ = ["Prepare"]


@dataclass(frozen=True)
class Prepare:
    """What a loader process does to each image.

    Attributes:
        settings: limits of the decoder.
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
        decoded = decode(data, self.settings, "gray" if self.gray else "rgb", self.turn)
        turned = decoded.pixels.shape[1] != decoded.width
        return Prepared(self.geometry(decoded.pixels), decoded.width, decoded.height, turned)
