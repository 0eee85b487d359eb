"""Encoded bytes to the tensor that goes into a batch: decode, then geometry, as one picklable callable."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from batchjob.decode import DecodeSettings, decode
from batchjob.transform import Geometry

if TYPE_CHECKING:
    import torch

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

    def __call__(self, data: bytes) -> tuple[torch.Tensor, int, int]:
        """One image as `[c, h, w]`, with its width and height as stored. Raises ImageFault."""
        decoded = decode(data, self.settings, "gray" if self.gray else "rgb", self.turn)
        return self.geometry(decoded.pixels), decoded.width, decoded.height
