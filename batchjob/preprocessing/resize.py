"""Resize and crop in one step, bit-identical to torchvision's antialiased uint8 resize, reading only the pixels needed.

`resize_and_crop` is exact; `resize_and_crop_uint8` is several times as fast and, for bilinear, at most one level of
255 away.
"""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache, lru_cache
from typing import Literal

import torch
from torch.nn.functional import interpolate

from batchjob.preprocessing.geometry import CropBox

__all__ = [
    "BandMatrix",
    "Interpolation",
    "make_band_matrix",
    "matches_torch",
    "resize_and_crop",
    "resize_and_crop_uint8",
    "resize_with_bands",
]

Interpolation = Literal["bilinear", "bicubic"]

_FILTER_RADIUS = {"bilinear": 1.0, "bicubic": 2.0}  # half the filter's width, in pixels of the smaller image
_STRIP_PIXELS = 1 << 16  # pixels that are float at the same time: few enough to stay in the CPU's cache

# Torch sums the pixels of a sample one by one, each in a fused multiply-add, and so does the sparse product. From the
# fifth pixel on, torch's compiled loop takes four at a time and rounds differently.
_MAX_TAPS = 4


def resize_and_crop(
    image: torch.Tensor, size: tuple[int, int], box: CropBox, interpolation: Interpolation
) -> torch.Tensor:
    """Resize an image and return one part of it, with the bits of `torchvision.transforms.functional.resize`.

    Torch resizes along the rows first, then along the columns, and computes each output sample by itself. So the rows
    below and the columns right of the pixels used are left out, and after the first pass all columns outside the box.
    Pixels above and to the left of the box stay: sample positions are computed from the image's corner, and from
    another origin they would be rounded differently.

    Args:
        image: uint8 `[c, h, w]`.
        size: Height and width that the whole image would get.
        box: Part to return, within `size`.
        interpolation: Filter of the resize; always antialiased.

    Returns:
        uint8 `[c, height, width]` of the box.
    """
    if interpolation == "bilinear":
        bands = _make_band_matrices(image, size, box)
        if bands is not None and matches_torch():
            return resize_with_bands(image, *bands)
    return _resize_with_interpolate(image, size, box, interpolation)


def resize_and_crop_uint8(
    image: torch.Tensor,
    size: tuple[int, int],
    box: CropBox,
    interpolation: Interpolation,
    scale_denominator: int = 1,
    full_size: tuple[int, int] | None = None,
) -> torch.Tensor:
    """Resize and crop in 16-bit integers, as torchvision's `v2` does: bilinear is at most one level of 255 away.

    Several times as fast as `resize_and_crop`.

    Example: a JPEG of 375x501 decoded at `scale_denominator=2` has 188x251 pixels, rounded up. Its sides count as
    187.5 and 250.5, so that samples keep their positions; the last row and column reach beyond the image.

    Args:
        image: uint8 `[c, h, w]`.
        size: Height and width that the whole image would get.
        box: Part to return, within `size`.
        interpolation: Filter of the resize; always antialiased.
        scale_denominator: Factor by which the decoder reduced the image.
        full_size: Height and width before that reduction; those of `image` if None.

    Returns:
        uint8 `[c, height, width]` of the box.
    """
    top, left, height, width = box
    side_y, side_x = (side / scale_denominator for side in full_size) if full_size is not None else image.shape[1:]
    scale_y, scale_x = size[0] / side_y, size[1] / side_x
    rows = _count_used_pixels(image.shape[1], side_y, size[0], top + height, interpolation)
    columns = _count_used_pixels(image.shape[2], side_x, size[1], left + width, interpolation)
    box_is_covered = int(rows * scale_y) >= top + height and int(columns * scale_x) >= left + width
    if box_is_covered:
        resized = _interpolate_by_scale(image[None, :, :rows, :columns], scale_y, scale_x, interpolation)
    else:
        resized = _interpolate_to_size(image[None], size, interpolation)
    return resized[0, :, top : top + height, left : left + width]


@cache
def matches_torch() -> bool:
    """Compare both ways of `resize_and_crop` on noise, once a process: do they give the same bits in this torch?"""
    generator = torch.Generator().manual_seed(0)
    noise = torch.randint(0, 256, (3, 97, 131), dtype=torch.uint8, generator=generator)
    for size in ((66, 90), (61, 100), (201, 140)):
        box = (1, 2, size[0] - 3, size[1] - 5)
        bands = _make_band_matrices(noise, size, box)
        try:
            resized = None if bands is None else resize_with_bands(noise, *bands)
        except RuntimeError:  # a torch without sparse products
            return False
        if resized is None or not resized.equal(_resize_with_interpolate(noise, size, box, "bilinear")):
            return False
    return True


# -- with torch's own interpolate --------------------------------------------------------------------------------


def _resize_with_interpolate(
    image: torch.Tensor, size: tuple[int, int], box: CropBox, interpolation: Interpolation
) -> torch.Tensor:
    top, left, height, width = box
    rows = _count_used_pixels(image.shape[1], image.shape[1], size[0], top + height, interpolation)
    columns = _count_used_pixels(image.shape[2], image.shape[2], size[1], left + width, interpolation)
    used = image[None, :, :rows, :columns]
    first_cut, last_cut = slice(left, left + width), slice(None)
    if width == 1:  # torch resizes a single column in another way than the same column among others
        first_cut, last_cut = last_cut, first_cut
    strips = [
        _resize_dimension(strip.float(), 3, image.shape[2], size[1], interpolation)[..., first_cut]
        for strip in _split_into_strips(used)
    ]
    narrow = strips[0] if len(strips) == 1 else torch.cat(strips, 2)
    resized = _resize_dimension(narrow, 2, image.shape[1], size[0], interpolation)
    return resized[0, :, top : top + height, last_cut].clamp(0, 255).round_().to(torch.uint8)


def _count_used_pixels(available: int, side: float, resized: int, end: int, interpolation: Interpolation) -> int:
    """Count the pixels of a side that decide its first `end` resized samples; a few more do no harm.

    Example: 500 columns resized to 341, of which the first 282 are needed: 282 * 500 / 341 is 413.5, the bilinear
    filter reaches 1.5 further, and 3 are added: 417 columns.

    Args:
        available: Pixels of the side that are there.
        side: Length of the side; a fraction where a decoder reduced it.
        resized: Length of the side after the resize.
        end: End of the samples that are needed.
        interpolation: Filter of the resize.
    """
    scale = side / resized
    used = int(scale * end + _FILTER_RADIUS[interpolation] * max(scale, 1.0)) + 3
    # Torch skips a side whose length does not change. The cut must not make it look like that.
    return available if used >= available or int(used * (resized / side)) == used else used


def _split_into_strips(image: torch.Tensor) -> Iterator[torch.Tensor]:
    """Split an image `[1, c, h, w]` into views of a few whole rows each."""
    rows = max(1, _STRIP_PIXELS // image.shape[3])
    return iter(image.split(rows, 2))


def _resize_dimension(
    image: torch.Tensor, dim: int, length: int, resized: int, interpolation: Interpolation
) -> torch.Tensor:
    """Resize `[1, c, h, w]` along one dimension from one length to another; the end of the image may be missing."""
    if length == resized:
        return image
    if image.shape[dim] < length:
        scale = resized / length
        scales = (scale, 1.0) if dim == 2 else (1.0, scale)
        return _interpolate_by_scale(image, *scales, interpolation)
    size = list(image.shape[2:])
    size[dim - 2] = resized
    return _interpolate_to_size(image, (size[0], size[1]), interpolation)


def _interpolate_to_size(image: torch.Tensor, size: tuple[int, int], interpolation: Interpolation) -> torch.Tensor:
    return interpolate(image, size=size, mode=interpolation, align_corners=False, antialias=True)


def _interpolate_by_scale(
    image: torch.Tensor, scale_y: float, scale_x: float, interpolation: Interpolation
) -> torch.Tensor:
    return interpolate(image, scale_factor=(scale_y, scale_x), mode=interpolation, align_corners=False, antialias=True)


# -- as a product of sparse matrices, in half of torch's time ----------------------------------------------------


@dataclass(frozen=True, eq=False)
class BandMatrix:
    """Linear map from the pixels of a side to some neighbouring samples of the resized side.

    Attributes:
        start: First pixel with a weight.
        stop: End of the pixels with a weight, exclusive.
        weights: Sparse (CSR) float32 `[samples, stop - start]`.
    """

    start: int
    stop: int
    weights: torch.Tensor


def resize_with_bands(image: torch.Tensor, rows: BandMatrix, columns: BandMatrix) -> torch.Tensor:
    """Resize an image along its rows, then along its columns, from the pixels that count alone.

    Args:
        image: uint8 `[c, h, w]`; fastest with channels last in memory.
        rows: Matrix from the image's rows to the rows of the result.
        columns: Matrix from the image's columns to the columns of the result.

    Returns:
        uint8 `[c, height, width]`, with channels last in memory.
    """
    used = image[:, rows.start : rows.stop, columns.start : columns.stop]
    channels, height, width = used.shape
    # A sparse product runs along memory if the dimension it sums over comes first.
    columns_first = torch.empty(width, channels, height).copy_(used.permute(2, 0, 1))
    narrow = columns.weights @ columns_first.view(width, channels * height)
    rows_first = narrow.view(-1, height).t().contiguous()
    resized = (rows.weights @ rows_first).round_().to(torch.uint8)
    return resized.view(len(resized), -1, channels).permute(2, 0, 1)


def _make_band_matrices(
    image: torch.Tensor, size: tuple[int, int], box: CropBox
) -> tuple[BandMatrix, BandMatrix] | None:
    """Make the matrices of rows and columns; None where one of them is impossible."""
    if 1 in size:  # torch sums in another order where it resizes to a single row or column
        return None
    top, left, height, width = box
    rows = make_band_matrix(image.shape[1], size[0], top, top + height)
    columns = None if rows is None else make_band_matrix(image.shape[2], size[1], left, left + width)
    return None if rows is None or columns is None else (rows, columns)


@lru_cache(maxsize=256)  # images of one dataset share a few sizes; a matrix takes some 10 KB
def make_band_matrix(input_size: int, output_size: int, start: int, stop: int) -> BandMatrix | None:
    """Make the matrix of a bilinear, antialiased resize of one side, with torch's own weights.

    Example: from 500 to 341 pixels, sample 58 has its centre at (58 + 0.5) * 500 / 341 = 85.8, so with a reach of
    1.47 the pixels with centres from 84.3 to 87.2 have a weight: 84, 85 and 86.

    Args:
        input_size: Length of the side.
        output_size: Length after the resize.
        start: First sample that is needed.
        stop: End of the samples that are needed, exclusive.

    Returns:
        The matrix; None where a sample depends on more pixels than torch sums up one by one.
    """
    scale = input_size / output_size
    reach = max(scale, 1.0)
    if 2 * reach > _MAX_TAPS:
        return None
    taps = int(2 * reach) + 4
    torch_weights = _read_torch_weights(input_size, output_size, taps)[start:stop]
    centers = (torch.arange(start, stop, dtype=torch.float64) + 0.5) * scale
    first_pixels = (centers - reach - 1).floor().long().clamp_(min=0)
    pixels = first_pixels[:, None] + torch.arange(taps)
    weights = torch_weights.gather(1, pixels % taps) * (pixels < input_size)
    used = weights != 0
    if int(used.sum(1).max()) > _MAX_TAPS:
        return None
    return _pack_band_matrix(pixels[used], weights[used], used.sum(1))


def _read_torch_weights(input_size: int, output_size: int, taps: int) -> torch.Tensor:
    """Read torch's own weights `[output_size, taps]` off resized unit vectors.

    All pixels are read in one resize: the weight of pixel p stands in column p modulo `taps`. At most `taps` pixels
    have a weight for one sample, so none hides another.
    """
    units = torch.zeros(1, 1, input_size, taps)
    pixels = torch.arange(input_size)
    units[0, 0, pixels, pixels % taps] = 1.0
    return interpolate(units, size=(output_size, taps), mode="bilinear", align_corners=False, antialias=True)[0, 0]


def _pack_band_matrix(pixels: torch.Tensor, weights: torch.Tensor, counts: torch.Tensor) -> BandMatrix:
    """Pack weights into a CSR matrix.

    Args:
        pixels: Pixel of each weight, sample after sample.
        weights: Weights in the same order.
        counts: Weights of each sample.
    """
    start, stop = int(pixels.min()), int(pixels.max()) + 1
    row_ends = torch.zeros(len(counts) + 1, dtype=torch.long)
    torch.cumsum(counts, 0, out=row_ends[1:])
    with warnings.catch_warnings():  # torch warns once a process that such tensors are in beta state
        warnings.filterwarnings("ignore", message="Sparse CSR tensor support", category=UserWarning)
        matrix = torch.sparse_csr_tensor(
            row_ends, pixels - start, weights, size=(len(counts), stop - start), check_invariants=False
        )
    return BandMatrix(start, stop, matrix)
