"""Encoded bytes to the tensor that goes into a batch: decode, then geometry, as one picklable callable."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from batchjob.decode import Decoded, DecodeSettings, decode
from batchjob.records import Prepared
from batchjob.transform import Geometry

if TYPE_CHECKING:
    import torch

__all__ = ["Prepare"]


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
