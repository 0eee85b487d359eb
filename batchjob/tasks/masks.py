"""Maps of class ids: from the model's input back to the image's pixels, and to PNG bytes, run lengths and counts."""

from __future__ import annotations

import io
from collections.abc import Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import pyarrow as pa

if TYPE_CHECKING:
    import numpy as np
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
"""A mask as COCO's annotations write it uncompressed: `size` is `[height, width]`; `counts` tells how many pixels are
outside, inside, outside, … in turn, from the top left corner down, column by column, beginning with outside (maybe 0).
Source: https://github.com/cocodataset/cocoapi, common/maskApi.h; pycocotools reads it with `mask.frPyObjects`."""


def resample_to_image(ids: np.ndarray[Any, Any], geometry: ImageGeometry, void: int) -> np.ndarray[Any, Any]:
    """The map on the image's own pixels, each with the id that lies nearest to its centre.

    Args:
        ids: `[h, w]`, spanning the model's input with its padding, in whatever resolution.
        frame: where that lies in the image.
        void: for pixels that the crop cut off.
    """
    import numpy as np

    height, width = ids.shape
    columns = _nearest(
        geometry.width,
        geometry.scale_x,
        geometry.left,
        geometry.input_width,
        width / (geometry.input_width + geometry.pad_right),
    )
    rows = _nearest(
        geometry.height,
        geometry.scale_y,
        geometry.top,
        geometry.input_height,
        height / (geometry.input_height + geometry.pad_below),
    )
    made: np.ndarray[Any, Any] = ids[np.ix_(rows.clip(0, height - 1), columns.clip(0, width - 1))]
    made[rows < 0] = void
    made[:, columns < 0] = void
    return made


def _nearest(size: int, scale: float, cut: float, limit: int, ratio: float) -> np.ndarray[Any, Any]:
    """For each pixel of an image, which one of the map it is along one side; -1 where it was cut off."""
    import numpy as np

    inputs = (np.arange(size) + 0.5) * scale - cut
    return np.where((inputs < 0) | (inputs >= limit), -1, np.floor(inputs * ratio)).astype(np.int64)


def input_geometry(geometry: ImageGeometry) -> ImageGeometry:
    """The frame of the model's input itself, its padding left out."""
    width, height = geometry.input_width, geometry.input_height
    return replace(geometry, width=width, height=height, scale_x=1.0, scale_y=1.0, left=0.0, top=0.0)


def encode_png(ids: np.ndarray[Any, Any]) -> bytes:
    """One gray channel, of 8 bits for uint8 `[h, w]`, of 16 for anything wider."""
    import numpy as np
    from PIL import Image

    spool = io.BytesIO()
    Image.fromarray(ids if ids.dtype == np.uint8 else ids.astype(np.uint16)).save(spool, "PNG")
    return spool.getvalue()


def encode_rle(ids: np.ndarray[Any, Any], wanted: Sequence[int]) -> list[np.ndarray[Any, Any]]:
    """COCO's `counts` of each of these ids in a map `[h, w]`, int32."""
    import numpy as np

    flat = ids.T.reshape(-1)
    starts = np.concatenate([[0], np.flatnonzero(flat[1:] != flat[:-1]) + 1]) if flat.size else np.zeros(0, np.int64)
    ends = np.append(starts[1:], flat.size) if flat.size else starts
    values = flat[starts]
    return [_counts(starts[values == one], ends[values == one], flat.size) for one in wanted]


def _counts(starts: np.ndarray[Any, Any], ends: np.ndarray[Any, Any], size: int) -> np.ndarray[Any, Any]:
    """Lengths between the edges of what is inside; nothing is said of an outside of no pixels at the end."""
    import numpy as np

    edges = np.stack([starts, ends], axis=1).reshape(-1)
    counts = np.diff(edges, prepend=0)
    last = edges[-1] if edges.size else 0
    return np.append(counts, size - last).astype(np.int32) if last < size else counts.astype(np.int32)


def build_rle_arrays(sizes: Sequence[tuple[int, int]], counts: Sequence[np.ndarray[Any, Any]]) -> list[pa.Array]:
    """`RLE_FIELDS` of masks of these sizes (height, width)."""
    import numpy as np

    ends = np.zeros(len(counts) + 1, np.int32)
    np.cumsum([len(one) for one in counts], out=ends[1:])
    flat = np.concatenate([np.zeros(0, np.int32), *counts])
    pairs = pa.array([list(size) for size in sizes], RLE_FIELDS[0].type)
    return [pairs, pa.ListArray.from_arrays(pa.array(ends), pa.array(flat), type=RLE_FIELDS[1].type)]


def pack_mask_bits(masks: torch.Tensor, room: int) -> torch.Tensor:
    """Masks, bool `[k, h, w]`, as bits, first the highest: uint8 `[k, room]`."""
    import torch

    count, height, width = masks.shape
    flat = torch.nn.functional.pad(masks.flatten(1), (0, room * 8 - height * width))
    weights = 2 ** torch.arange(7, -1, -1, device=masks.device, dtype=torch.uint8)
    return (flat.view(count, room, 8).to(torch.uint8) * weights).sum(dim=2, dtype=torch.uint8)


def unpack_mask_bits(bits: np.ndarray[Any, Any], height: int, width: int) -> np.ndarray[Any, Any]:
    """One of them again: uint8 `[h, w]` of 0 and 1."""
    import numpy as np

    return np.unpackbits(bits, count=height * width).reshape(height, width)
