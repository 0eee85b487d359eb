"""Resize and cut in one: torchvision's antialiased resize of uint8 images, of the pixels used alone."""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache, lru_cache
from typing import TYPE_CHECKING, Literal

if TYPE_CHECKING:
    import torch

__all__ = [
    "BandMatrix",
    "CropBox",
    "Interpolation",
    "make_band_matrix",
    "resize_and_crop",
    "resize_and_crop_uint8",
    "resize_with_bands",
]

CropBox = tuple[int, int, int, int]
"""Top, left, height and width."""
Interpolation = Literal["bilinear", "bicubic"]
_SUPPORT = {"bilinear": 1.0, "bicubic": 2.0}  # half the filter's width, in pixels of the smaller image
_STRIP = 1 << 16  # pixels that are float at once: so few stay in the processor's cache


def resize_and_crop(
    image: torch.Tensor, size: tuple[int, int], box: CropBox, interpolation: Interpolation
) -> torch.Tensor:
    """The part `box` of the image resized to `size`: bit for bit `torchvision.transforms.functional.resize`.

    Torch goes along the rows, then along the columns, and each output sample is by itself. So rows below and columns
    right of the pixels used are left out, and all columns beside the box once the rows are done. What lies above and
    to the left stays: positions count from there, and counted otherwise they would be rounded otherwise.

    Args:
        image: uint8 `[c, h, w]`.
        size: height and width that all of the image would have.
        box: within `size`.
        by: the filter.

    Returns:
        uint8 `[c, height, width]`.
    """
    bands = _bands(image, size, box) if interpolation == "bilinear" else None
    return (
        _by_torch(image, size, box, interpolation)
        if bands is None or not matches_torch()
        else resize_with_bands(image, *bands)
    )


def _bands(image: torch.Tensor, size: tuple[int, int], box: CropBox) -> tuple[BandMatrix, BandMatrix] | None:
    """Those of rows and columns, where both can be had."""
    if 1 in size:  # torch resizes to a single row or column in an order of its own
        return None
    top, left, high, wide = box
    rows = make_band_matrix(image.shape[1], size[0], top, top + high)
    columns = None if rows is None else make_band_matrix(image.shape[2], size[1], left, left + wide)
    return None if rows is None or columns is None else (rows, columns)


@cache
def matches_torch() -> bool:
    """Whether this build of torch makes the same bits both ways: looked at once a process, on noise."""
    import torch

    own = torch.Generator().manual_seed(0)
    noise = torch.randint(0, 256, (3, 97, 131), dtype=torch.uint8, generator=own)
    for size in ((66, 90), (61, 100), (201, 140)):
        box = (1, 2, size[0] - 3, size[1] - 5)
        bands = _bands(noise, size, box)
        try:
            made = None if bands is None else resize_with_bands(noise, *bands)
        except RuntimeError:  # a torch without sparse products
            return False
        if made is None or not made.equal(_by_torch(noise, size, box, "bilinear")):
            return False
    return True


def _by_torch(image: torch.Tensor, size: tuple[int, int], box: CropBox, by: Interpolation) -> torch.Tensor:
    import torch

    top, left, high, wide = box
    down, across = (image.shape[1], size[0]), (image.shape[2], size[1])
    rows = _used(down[0], *down, top + high, by)
    columns = _used(across[0], *across, left + wide, by)
    used = image[None, :, :rows, :columns]
    early, late = slice(left, left + wide), slice(None)
    if wide == 1:  # torch resizes a single column otherwise than the same one among others
        early, late = late, early
    strips = [_along(strip.float(), 3, across, by)[..., early] for strip in _strips(used)]
    narrow = strips[0] if len(strips) == 1 else torch.cat(strips, 2)
    values = _along(narrow, 2, down, by)[0, :, top : top + high, late]
    return values.clamp(0, 255).round_().to(torch.uint8)


def resize_and_crop_uint8(
    image: torch.Tensor,
    size: tuple[int, int],
    box: CropBox,
    interpolation: Interpolation,
    scale_denominator: int = 1,
    full_size: tuple[int, int] | None = None,
) -> torch.Tensor:
    """`resample` in 16-bit integers, as torchvision's `v2`: several times as fast, `bilinear` at most a level away.

    Args:
        image: uint8 `[c, h, w]`.
        size: height and width that all of the image would have.
        box: within `size`.
        by: the filter.
        shrunk: how many times smaller it was decoded.
        whole: its height and width before that; the last pixels of one that cannot be divided so reach beyond it.

    Returns:
        uint8 `[c, height, width]`.
    """
    top, left, high, wide = box
    sides = (
        image.shape[1:] if full_size is None else (full_size[0] / scale_denominator, full_size[1] / scale_denominator)
    )
    down, across = size[0] / sides[0], size[1] / sides[1]
    rows = _used(image.shape[1], sides[0], size[0], top + high, interpolation)
    columns = _used(image.shape[2], sides[1], size[1], left + wide, interpolation)
    reached = int(rows * down) >= top + high and int(columns * across) >= left + wide
    used = image[None, :, :rows, :columns]
    made = _scaled(used, down, across, interpolation) if reached else _resized(image[None], size, interpolation)
    return made[0, :, top : top + high, left : left + wide]


def _used(pixels: int, side: float, resized: int, end: int, by: Interpolation) -> int:
    """How many of a side's pixels decide the first `end` of the resized ones; a few more do no harm."""
    scale = side / resized
    used = int(scale * end + _SUPPORT[by] * max(scale, 1.0)) + 3
    # Torch passes over a side whose length stays: the cut must not make it look so.
    return pixels if used >= pixels or int(used * (resized / side)) == used else used


def _strips(image: torch.Tensor) -> Iterator[torch.Tensor]:
    """Views of a few whole rows each."""
    rows = max(1, _STRIP // image.shape[3])
    return iter(image.split(rows, 2))


def _along(image: torch.Tensor, dim: int, sides: tuple[int, int], by: Interpolation) -> torch.Tensor:
    """Resized along one dimension from one length to another, where the end of the image may be missing."""
    whole, resized = sides
    if whole == resized:
        return image
    if image.shape[dim] < whole:
        scale = resized / whole
        return _scaled(image, *((scale, 1.0) if dim == 2 else (1.0, scale)), by)
    size = list(image.shape[2:])
    size[dim - 2] = resized
    return _resized(image, (size[0], size[1]), by)


def _resized(image: torch.Tensor, size: tuple[int, int], by: Interpolation) -> torch.Tensor:
    from torch.nn.functional import interpolate

    return interpolate(image, size=size, mode=by, align_corners=False, antialias=True)


def _scaled(image: torch.Tensor, down: float, across: float, by: Interpolation) -> torch.Tensor:
    from torch.nn.functional import interpolate

    return interpolate(image, scale_factor=(down, across), mode=by, align_corners=False, antialias=True)


# Torch sums the pixels of a sample one by one, each in a fused multiply-add, as the sparse product does; from the fifth
# on its compiled loop takes four at a time and rounds otherwise.
_MOST_TAPS = 4


@dataclass(frozen=True, eq=False)
class BandMatrix:
    """How some neighbouring samples of a resized side follow from its pixels.

    Attributes:
        first, end: the pixels that count, the end excluded.
        weights: sparse (CSR) float32 `[samples, end - first]`.
    """

    start: int
    stop: int
    weights: torch.Tensor


@lru_cache(maxsize=256)  # images of a dataset share a few sizes; a band takes some ten KB
def make_band_matrix(input_size: int, output_size: int, start: int, stop: int) -> BandMatrix | None:
    """The band of a bilinear, antialiased resize; None where a sample hangs on more pixels than sum up alike.

    Args:
        whole: the side's length.
        resized: what it becomes.
        low, high: the samples that are wanted, the end excluded.
    """
    import torch

    scale = input_size / output_size
    reach = max(scale, 1.0)
    if 2 * reach > _MOST_TAPS:
        return None
    taps = int(2 * reach) + 4
    seen = _seen(input_size, output_size, taps)[start:stop]
    middles = (torch.arange(start, stop, dtype=torch.float64) + 0.5) * scale
    first = (middles - reach - 1).floor().long().clamp_(min=0)
    pixels = first[:, None] + torch.arange(taps)
    weights = seen.gather(1, pixels % taps) * (pixels < input_size)
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


def _packed(pixels: torch.Tensor, weights: torch.Tensor, counts: torch.Tensor) -> BandMatrix:
    import torch

    first, end = int(pixels.min()), int(pixels.max()) + 1
    rows = torch.zeros(len(counts) + 1, dtype=torch.long)
    torch.cumsum(counts, 0, out=rows[1:])
    with warnings.catch_warnings():  # once in a process torch says that such tensors are in beta state
        warnings.filterwarnings("ignore", message="Sparse CSR tensor support", category=UserWarning)
        matrix = torch.sparse_csr_tensor(
            rows, pixels - first, weights, size=(len(counts), end - first), check_invariants=False
        )
    return BandMatrix(first, end, matrix)


def resize_with_bands(image: torch.Tensor, rows: BandMatrix, columns: BandMatrix) -> torch.Tensor:
    """The image resized along its rows, then along its columns, of the pixels that count alone.

    Args:
        image: uint8 `[c, h, w]`; quickest with its channels last in memory.
        rows: which rows of the result, from which of the image.
        columns: likewise.

    Returns:
        uint8 `[c, height, width]`, with its channels last in memory.
    """
    import torch

    used = image[:, rows.start : rows.stop, columns.start : columns.stop]
    channels, high, wide = used.shape
    # A product runs along memory where what it sums over comes first.
    across = torch.empty(wide, channels, high).copy_(used.permute(2, 0, 1))
    narrow = columns.weights @ across.view(wide, channels * high)
    down = narrow.view(-1, high).t().contiguous()
    made = (rows.weights @ down).round_().to(torch.uint8)
    return made.view(len(made), -1, channels).permute(2, 0, 1)
