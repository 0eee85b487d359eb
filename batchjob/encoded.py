"""What of a batch is still files, for a device to decode."""

from __future__ import annotations

from dataclasses import dataclass
from itertools import pairwise
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import torch

__all__ = ["Encoded"]


@dataclass(frozen=True)
class Encoded:
    """Encoded images of a batch.

    Attributes:
        places: theirs among the batch's good images, from 0, in order.
        data: uint8 `[bytes]`, one file behind the other.
        ends: where in it each file ends.
    """

    places: tuple[int, ...]
    data: torch.Tensor
    ends: tuple[int, ...]

    def files(self) -> list[torch.Tensor]:
        """Each by itself, uint8 `[bytes]`; views of `data`."""
        return [self.data[begin:end] for begin, end in pairwise((0, *self.ends))]
