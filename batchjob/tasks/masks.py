"""Segmentation masks: resample them to the image, and encode them as PNG, run lengths or bits."""

from __future__ import annotations

import io
from collections.abc import Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import numpy as np
import pyarrow as pa

from batchjob.tasks.list_columns import build_list_column

if TYPE_CHECKING:
    import torch

    from batchjob.preprocessing.geometry import ImageGeometry

__all__ = [
    "RLE_FIELDS",
    "build_rle_arrays",
    "encode_png",
    "encode_rle",
    "input_geometry",
    "pack_mask_bits",
    "resample_to_image",
    "unpack_mask_bits",
]

RLE_FIELDS = [pa.field("size", pa.list_(pa.int32())), pa.field("counts", pa.list_(pa.int32()))]
"""A mask in COCO's uncompressed run lengths. `size` is `[height, width]`. `counts` are pixels outside, inside, outside,
… in turn, column by column from the top left corner; the first count may be 0. A column of 7 pixels `0 0 1 1 1 0 1` has
the counts `[2, 3, 1, 1]`. Source: https://github.com/cocodataset/cocoapi, common/maskApi.h; pycocotools reads it with
`mask.frPyObjects`."""

_Array = np.ndarray[Any, Any]


def resample_to_image(ids: _Array, geometry: ImageGeometry, void: int) -> _Array:
    """Resample a map of class ids to the pixels of the image; each pixel takes the id nearest to its centre.

    Args:
        ids: Class ids `[h, w]`, which span the model's input and its padding, in any resolution.
        geometry: Position of the input within the image.
        void: Id for pixels that the crop cut off.
    """
    g = geometry
    height, width = ids.shape
    columns = _nearest_indices(g.width, g.scale_x, g.left, g.input_width, width / (g.input_width + g.pad_right))
    rows = _nearest_indices(g.height, g.scale_y, g.top, g.input_height, height / (g.input_height + g.pad_below))
    resampled: _Array = ids[np.ix_(rows.clip(0, height - 1), columns.clip(0, width - 1))]
    resampled[rows < 0] = void
    resampled[:, columns < 0] = void
    return resampled


def _nearest_indices(size: int, scale: float, cut: float, input_size: int, map_scale: float) -> _Array:
    """Return the index in the map of each pixel of one side of the image, int64 `[size]`; -1 where it was cut off.

    Example: 4 pixels at scale 0.5 have their centres at 0.25, 0.75, 1.25 and 1.75 of the input. A crop that cut 1 input
    pixel leaves -0.75, -0.25, 0.25 and 0.75. A map with 2 values per input pixel gives the indices -1, -1, 0 and 1.
    """
    centers = (np.arange(size) + 0.5) * scale - cut
    return np.where((centers < 0) | (centers >= input_size), -1, np.floor(centers * map_scale)).astype(np.int64)


def input_geometry(geometry: ImageGeometry) -> ImageGeometry:
    """Return the geometry that maps to the model's input without its padding, in place of the image."""
    width, height = geometry.input_width, geometry.input_height
    return replace(geometry, width=width, height=height, scale_x=1.0, scale_y=1.0, left=0.0, top=0.0)


def encode_png(ids: _Array) -> bytes:
    """Encode ids `[h, w]` as a PNG with one gray channel: 8 bits for uint8, 16 bits for wider types."""
    from PIL import Image

    buffer = io.BytesIO()
    Image.fromarray(ids if ids.dtype == np.uint8 else ids.astype(np.uint16)).save(buffer, "PNG")
    return buffer.getvalue()


def encode_rle(ids: _Array, class_ids: Sequence[int]) -> list[_Array]:
    """Return COCO's `counts` of each of these class ids in a map `[h, w]`, int32."""
    flat = ids.T.reshape(-1)
    starts = np.concatenate([[0], np.flatnonzero(flat[1:] != flat[:-1]) + 1]) if flat.size else np.zeros(0, np.int64)
    ends = np.append(starts[1:], flat.size) if flat.size else starts
    values = flat[starts]
    return [_run_counts(starts[values == one], ends[values == one], flat.size) for one in class_ids]


def _run_counts(starts: _Array, ends: _Array, size: int) -> _Array:
    """Return `counts` of the runs inside a mask; a run outside of it at the end is written only if it has pixels.

    Example: runs 2 to 5 and 6 to 7 of 7 pixels have the edges 2, 5, 6, 7 and the counts 2, 3, 1, 1.
    """
    edges = np.stack([starts, ends], axis=1).reshape(-1)
    counts = np.diff(edges, prepend=0)
    last = edges[-1] if edges.size else 0
    return np.append(counts, size - last).astype(np.int32) if last < size else counts.astype(np.int32)


def build_rle_arrays(sizes: Sequence[tuple[int, int]], counts: Sequence[_Array]) -> list[pa.Array]:
    """Build the columns of `RLE_FIELDS` from masks' sizes (height, width) and run lengths."""
    flat = np.concatenate([np.zeros(0, np.int32), *counts])
    pairs = pa.array([list(size) for size in sizes], RLE_FIELDS[0].type)
    return [pairs, build_list_column([len(one) for one in counts], pa.array(flat))]


def pack_mask_bits(masks: torch.Tensor, byte_count: int) -> torch.Tensor:
    """Pack masks to one bit per pixel, the highest bit first: an eighth of the bytes to copy to the host.

    Example: the mask `1 0 1 0 0 0 0 0 1` in 2 bytes is `[0b10100000, 0b10000000]`.

    Args:
        masks: Masks, bool `[k, h, w]`.
        byte_count: Bytes of each packed mask, at least h * w / 8.

    Returns:
        Packed masks, uint8 `[k, byte_count]`.
    """
    import torch

    count, height, width = masks.shape
    flat = torch.nn.functional.pad(masks.flatten(1), (0, byte_count * 8 - height * width))
    bit_values = 2 ** torch.arange(7, -1, -1, device=masks.device, dtype=torch.uint8)
    return (flat.view(count, byte_count, 8).to(torch.uint8) * bit_values).sum(dim=2, dtype=torch.uint8)


def unpack_mask_bits(packed: _Array, height: int, width: int) -> _Array:
    """Unpack one mask of `pack_mask_bits`, uint8 `[h, w]` of 0 and 1."""
    return np.unpackbits(packed, count=height * width).reshape(height, width)
