"""Instance segmentation: boxes with a mask each, as Mask R-CNN gives them, mapped back to the image."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
import pyarrow as pa

from batchjob.tasks.boxes import BOX_FIELDS, BoxSelector, build_box_columns
from batchjob.tasks.detector_output import TorchvisionBoxReader
from batchjob.tasks.list_columns import build_struct_lists
from batchjob.tasks.masks import (
    RLE_FIELDS,
    build_rle_arrays,
    encode_png,
    encode_rle,
    input_geometry,
    pack_mask_bits,
    resample_to_image,
    unpack_mask_bits,
)
from batchjob.tasks.postprocess import Postprocess

if TYPE_CHECKING:
    import torch

    from batchjob.preprocessing.geometry import ImageGeometry

__all__ = ["InstancePostprocess"]

_AREA_FIELD = pa.field("pixels", pa.int64())
_MASK_FIELDS = {"png": [pa.field("mask", pa.binary())], "rle": [pa.field("mask", pa.struct(RLE_FIELDS))], "none": []}


@dataclass(frozen=True)
class InstancePostprocess(Postprocess):
    """Postprocess of a model that gives instances.

    Attributes:
        selector: Selection of the instances.
        mask_threshold: Lowest probability of a pixel that belongs to an instance.
        mask: Encoding of a mask; in a PNG, pixels of the instance are 255.
        labels: Class names by id; None if there are none.
        allow_nan: True accepts rows that hold NaN, without the boxes that do.
        original_size: True writes masks at the size of the image, False at that of the model's input.
    """

    selector: BoxSelector
    mask_threshold: float
    mask: Literal["png", "rle", "none"]
    labels: tuple[str, ...] | None
    allow_nan: bool
    original_size: bool

    @property
    def fields(self) -> list[pa.Field]:
        return [pa.field("detections", pa.list_(pa.struct(self._struct_fields)))]

    @property
    def _struct_fields(self) -> list[pa.Field]:
        return [*BOX_FIELDS, _AREA_FIELD, *_MASK_FIELDS[self.mask]]

    def on_device(self, output: Sequence[Mapping[str, torch.Tensor]]) -> dict[str, torch.Tensor]:
        """Select instances: the tensors of `BoxSelector` with k slots, except `order`, and the masks.

        `masks` uint8 `[n, k, bytes]` has one bit per pixel; `mask_size` int32 `[n, 2]` is height and width of the masks
        of an image.
        """
        import torch

        selected = self.selector(TorchvisionBoxReader()(output))
        order, counts = selected.pop("order"), selected["count"].tolist()
        sizes = [tuple(image["masks"].shape[-2:]) for image in output]
        byte_count = max((-(-height * width // 8) for height, width in sizes), default=0)
        masks = selected["boxes"].new_zeros((len(sizes), self.selector.max_boxes, byte_count), dtype=torch.uint8)
        finite = selected["finite"].clone()
        for row, (image, count) in enumerate(zip(output, counts, strict=True)):
            image_masks = image["masks"].reshape(-1, *sizes[row])[order[row, :count]]
            masks[row, :count] = pack_mask_bits(image_masks >= self.mask_threshold, byte_count)
            finite[row] &= image_masks.isfinite().all()
        mask_size = torch.tensor(sizes, dtype=torch.int32).reshape(-1, 2).to(masks.device)
        return {**selected, "masks": masks, "mask_size": mask_size, "finite": finite}

    def columns(self, tensors: dict[str, torch.Tensor], geometries: Sequence[ImageGeometry]) -> list[pa.Array]:
        null_rows = self.null_rows(tensors)
        kept, box_columns = build_box_columns(tensors, geometries, self.labels, null_rows, relative=False)
        masks = self._resample_masks(tensors, geometries, kept)
        area = pa.array(np.array([np.count_nonzero(mask) for mask in masks], np.int64))
        columns = [*box_columns, area, *self._encode_masks(masks)]
        return [build_struct_lists(kept.sum(axis=1), columns, self._struct_fields, null_rows)]

    def _resample_masks(
        self, tensors: Mapping[str, torch.Tensor], geometries: Sequence[ImageGeometry], kept: np.ndarray[Any, Any]
    ) -> list[np.ndarray[Any, Any]]:
        """Return the masks of the kept slots, uint8 `[h, w]` of 0 and 1, image after image."""
        packed, sizes = tensors["masks"].numpy(), tensors["mask_size"].tolist()
        targets = geometries if self.original_size else [input_geometry(geometry) for geometry in geometries]
        return [
            resample_to_image(unpack_mask_bits(packed[row, slot], *sizes[row]), target, 0)
            for row, target in enumerate(targets)
            for slot in kept[row].nonzero()[0]
        ]

    def _encode_masks(self, masks: Sequence[np.ndarray[Any, Any]]) -> list[pa.Array]:
        if self.mask == "none":
            return []
        if self.mask == "png":
            return [pa.array([encode_png(mask * 255) for mask in masks], pa.binary())]
        sizes = [(mask.shape[0], mask.shape[1]) for mask in masks]
        rle_arrays = build_rle_arrays(sizes, [encode_rle(mask, [1])[0] for mask in masks])
        return [pa.StructArray.from_arrays(rle_arrays, fields=RLE_FIELDS)]
