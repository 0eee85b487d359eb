"""Semantic segmentation: the class of each pixel, as an image of class ids, run lengths and counts of pixels."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
import pyarrow as pa

from batchjob.tasks.labels import look_up_labels
from batchjob.tasks.list_columns import build_struct_lists
from batchjob.tasks.masks import (
    RLE_FIELDS,
    build_rle_arrays,
    encode_png,
    encode_rle,
    input_geometry,
    resample_to_image,
)
from batchjob.tasks.postprocess import EXAMPLE_ROWS, Postprocess

if TYPE_CHECKING:
    import torch

    from batchjob.preprocessing.geometry import ImageGeometry

__all__ = ["SemanticPostprocess", "is_logit_map", "select_logits"]

_PIXEL_FIELDS = [pa.field("label_id", pa.int32()), pa.field("label", pa.string()), pa.field("pixels", pa.int64())]
_RUN_FIELDS = [pa.field("label_id", pa.int32()), *RLE_FIELDS]

_Array = np.ndarray[Any, Any]


@dataclass(frozen=True)
class SemanticPostprocess(Postprocess):
    """Postprocess of a model that gives logits for each pixel.

    Attributes:
        classes: Number of classes, at least 2.
        labels: Class names by id; None if there are none.
        mask: Encoding of the class ids; `none` writes only the counts of pixels.
        mask_threshold: Lowest probability of the class of a model that gives one logit per pixel.
        allow_nan: True accepts rows that hold NaN; such pixels show no class.
        original_size: True writes masks at the size of the image, False at that of the model's input.
    """

    classes: int
    labels: tuple[str, ...] | None
    mask: Literal["png", "rle", "none"]
    mask_threshold: float
    allow_nan: bool
    original_size: bool

    @property
    def fields(self) -> list[pa.Field]:
        mask_types = {"png": pa.binary(), "rle": pa.list_(pa.struct(_RUN_FIELDS))}
        pixels = pa.field("pixels", pa.list_(pa.struct(_PIXEL_FIELDS)))
        return [pixels] if self.mask == "none" else [pixels, pa.field("mask", mask_types[self.mask])]

    @property
    def _void(self) -> int:
        """Id of pixels that show no class."""
        return 255 if self.classes <= 255 else 65_535

    def on_device(self, output: Any) -> dict[str, torch.Tensor]:
        """Reduce logits to the most likely class: `ids` uint8 (or int32) `[n, h, w]`, and `finite` bool `[n]`."""
        import torch

        logits = select_logits(output).float()
        best, ids = logits.max(dim=1)
        if logits.shape[1] == 1:
            ids = (best.sigmoid() >= self.mask_threshold).long()
        finite_pixels = best.isfinite()
        dtype = torch.uint8 if self._void == 255 else torch.int32
        ids = ids.masked_fill(~finite_pixels, self._void).to(dtype)
        return {"ids": ids, "finite": finite_pixels.flatten(1).all(dim=1)}

    def columns(self, tensors: dict[str, torch.Tensor], geometries: Sequence[ImageGeometry]) -> list[pa.Array]:
        null_rows = self.null_rows(tensors)
        targets = geometries if self.original_size else [input_geometry(geometry) for geometry in geometries]
        maps = [
            None if is_null else resample_to_image(ids, target, self._void)
            for ids, target, is_null in zip(tensors["ids"].numpy(), targets, null_rows, strict=True)
        ]
        # The classes of null rows are none: an array `[0, 2]`.
        class_counts = [self._count_pixels(np.zeros(0, np.uint8) if ids is None else ids) for ids in maps]
        row_counts, flat = list(map(len, class_counts)), np.concatenate([np.zeros((0, 2), np.int64), *class_counts])
        class_ids, pixel_counts = pa.array(flat[:, 0].astype("int32")), pa.array(flat[:, 1].copy())
        pixel_columns = [class_ids, look_up_labels(self.labels, class_ids), pixel_counts]
        pixels = build_struct_lists(row_counts, pixel_columns, _PIXEL_FIELDS, null_rows)
        if self.mask == "none":
            return [pixels]
        if self.mask == "png":
            return [pixels, pa.array([None if ids is None else encode_png(ids) for ids in maps], pa.binary())]
        rle_arrays = _build_rle(maps, class_counts)
        return [pixels, build_struct_lists(row_counts, [class_ids, *rle_arrays], _RUN_FIELDS, null_rows)]

    def _count_pixels(self, ids: _Array) -> _Array:
        """Return the id and the pixels of each class in a map, the largest first: int64 `[c, 2]`."""
        counts = np.bincount(ids.reshape(-1), minlength=self.classes)[: self.classes]
        order = np.argsort(-counts, kind="stable")[: np.count_nonzero(counts)]
        return np.stack([order, counts[order]], axis=1)


def select_logits(output: Any) -> Any:
    """Return the logits of an output: the output itself, or `out` or `logits` of a dict; None if it has neither."""
    if isinstance(output, Mapping):
        return next((output[key] for key in ("out", "logits") if key in output), None)
    return output


def is_logit_map(logits: Any) -> bool:
    """Return True for a float tensor `[EXAMPLE_ROWS, classes, h, w]` that is not empty."""
    import torch

    return (
        isinstance(logits, torch.Tensor)
        and logits.is_floating_point()
        and logits.ndim == 4
        and len(logits) == EXAMPLE_ROWS
        and min(logits.shape) > 0
    )


def _build_rle(maps: Sequence[_Array | None], class_counts: Sequence[_Array]) -> list[pa.Array]:
    """Build the columns of `RLE_FIELDS` for each class of each map."""
    rle_by_row = [
        (ids.shape, encode_rle(ids, counts[:, 0].tolist()))
        for ids, counts in zip(maps, class_counts, strict=True)
        if ids is not None
    ]
    sizes = [(shape[0], shape[1]) for shape, masks in rle_by_row for _ in masks]
    return build_rle_arrays(sizes, [mask for _, masks in rle_by_row for mask in masks])
