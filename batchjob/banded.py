"""Resizing along a dimension as a product with a sparse matrix of bands: torch's own weights, in half its time."""

from __future__ import annotations

import warnings
from dataclasses import dataclass
from functools import lru_cache
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import torch

__all__ = ["Band", "band", "product"]

# Torch sums the pixels of a sample one by one, each in a fused multiply-add, as the sparse product does; from the fifth
# on its compiled loop takes four at a time and rounds otherwise.
_MOST_TAPS = 4


@dataclass(frozen=True, eq=False)
class Band:
    """How some neighbouring samples of a resized side follow from its pixels.

    Attributes:
        first, end: the pixels that count, the end excluded.
        weights: sparse (CSR) float32 `[samples, end - first]`.
    """

    first: int
    end: int
    weights: torch.Tensor


@lru_cache(maxsize=256)  # images of a dataset share a few sizes; a band takes some ten KB
def band(whole: int, resized: int, low: int, high: int) -> Band | None:
    """The band of a bilinear, antialiased resize; None where a sample hangs on more pixels than sum up alike.

    Args:
        whole: the side's length.
        resized: what it becomes.
        low, high: the samples that are wanted, the end excluded.
    """
    import torch

    scale = whole / resized
    reach = max(scale, 1.0)
    if 2 * reach > _MOST_TAPS:
        return None
    taps = int(2 * reach) + 4
    seen = _seen(whole, resized, taps)[low:high]
    middles = (torch.arange(low, high, dtype=torch.float64) + 0.5) * scale
    first = (middles - reach - 1).floor().long().clamp_(min=0)
    pixels = first[:, None] + torch.arange(taps)
    weights = seen.gather(1, pixels % taps) * (pixels < whole)
    used = weights != 0
    if int(used.sum(1).max()) > _MOST_TAPS:
        return None
    return _packed(pixels[used], weights[used], used.sum(1))


def _seen(whole: int, resized: int, taps: int) -> torch.Tensor:
    """Torch's own weights, `[resized, taps]`, as it resizes unit rows: that of pixel p in column p modulo taps."""
    import torch
    from torch.nn.functional import interpolate

    units = torch.zeros(1, 1, whole, taps)
    at = torch.arange(whole)
    units[0, 0, at, at % taps] = 1.0
    return interpolate(units, size=(resized, taps), mode="bilinear", align_corners=False, antialias=True)[0, 0]


def _packed(pixels: torch.Tensor, weights: torch.Tensor, counts: torch.Tensor) -> Band:
    import torch

    first, end = int(pixels.min()), int(pixels.max()) + 1
    rows = torch.zeros(len(counts) + 1, dtype=torch.long)
    torch.cumsum(counts, 0, out=rows[1:])
    with warnings.catch_warnings():  # once in a process torch says that such tensors are in beta state
        warnings.filterwarnings("ignore", message="Sparse CSR tensor support", category=UserWarning)
        matrix = torch.sparse_csr_tensor(
            rows, pixels - first, weights, size=(len(counts), end - first), check_invariants=False
        )
    return Band(first, end, matrix)


def product(image: torch.Tensor, rows: Band, columns: Band) -> torch.Tensor:
    """The image resized along its rows, then along its columns, of the pixels that count alone.

    Args:
        image: uint8 `[c, h, w]`; quickest with its channels last in memory.
        rows: which rows of the result, from which of the image.
        columns: likewise.

    Returns:
        uint8 `[c, height, width]`, with its channels last in memory.
    """
    import torch

    used = image[:, rows.first : rows.end, columns.first : columns.end]
    channels, high, wide = used.shape
    # A product runs along memory where what it sums over comes first.
    across = torch.empty(wide, channels, high).copy_(used.permute(2, 0, 1))
    narrow = columns.weights @ across.view(wide, channels * high)
    down = narrow.view(-1, high).t().contiguous()
    made = (rows.weights @ down).round_().to(torch.uint8)
    return made.view(len(made), -1, channels).permute(2, 0, 1)
