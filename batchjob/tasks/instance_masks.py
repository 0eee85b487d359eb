"""Instances with a mask each, as Mask R-CNN gives them, put back into the image."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

import pyarrow as pa

from batchjob.preprocessing.geometry import ImageGeometry
from batchjob.tasks.boxes import (
    BOX_FIELDS,
    BoxSelector,
    TorchvisionBoxReader,
    build_box_columns,
    build_struct_lists,
    filled_slots,
    map_boxes_to_image,
)
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
from batchjob.tasks.postprocess import finite_mask, nonfinite_errors
from batchjob.types import ErrorRecord

if TYPE_CHECKING:
    import numpy as np
    import torch

__all__ = ["InstancePostprocess"]

_AREA = pa.field("pixels", pa.int64())
_MASKS = {"png": [pa.field("mask", pa.binary())], "rle": [pa.field("mask", pa.struct(RLE_FIELDS))], "none": []}


@dataclass(frozen=True)
class InstancePostprocess:
    """A task that has seen that its model gives instances.

    Attributes:
        selection: which of them count.
        mask_threshold: from which probability on a pixel belongs to an instance.
        mask: how it is written; in a PNG 255 is inside.
        labels: names by id.
        allow_nan: rows that hold NaN pass, less the boxes that do.
        original: masks have the size of the image, not of the model's input.
        truths: none.
    """

    selection: BoxSelector
    mask_threshold: float
    mask: Literal["png", "rle", "none"]
    labels: tuple[str, ...] | None
    allow_nan: bool
    original: bool
    truth_columns: tuple[str, ...] = ()

    @property
    def fields(self) -> list[pa.Field]:
        return [pa.field("detections", pa.list_(pa.struct(self._members)))]

    @property
    def _members(self) -> list[pa.Field]:
        return [*BOX_FIELDS, _AREA, *_MASKS[self.mask]]

    def on_device(self, output: Sequence[Mapping[str, torch.Tensor]]) -> dict[str, torch.Tensor]:
        """What `Selection` says, of k places an image, and their masks.

        `masks` uint8 `[n, k, bytes]`, a bit a pixel; `mask_size` int32 `[n, 2]`: height and width of an image's.
        """
        import torch

        chosen = self.selection(TorchvisionBoxReader()(output))
        order, counts = chosen.pop("order"), chosen["count"].tolist()
        sizes = [tuple(image["masks"].shape[-2:]) for image in output]
        room = max((-(-height * width // 8) for height, width in sizes), default=0)
        masks = chosen["boxes"].new_zeros((len(sizes), self.selection.max_boxes, room), dtype=torch.uint8)
        finite = chosen["finite"].clone()
        for row, (image, count) in enumerate(zip(output, counts, strict=True)):
            own = image["masks"].reshape(-1, *sizes[row])[order[row, :count]]
            masks[row, :count] = pack_mask_bits(own >= self.mask_threshold, room)
            finite[row] &= own.isfinite().all()
        size = torch.tensor(sizes, dtype=torch.int32).reshape(-1, 2).to(masks.device)
        return {**chosen, "masks": masks, "mask_size": size, "finite": finite}

    def columns(self, tensors: dict[str, torch.Tensor], geometries: Sequence[ImageGeometry]) -> list[pa.Array]:
        import numpy as np

        good = finite_mask(tensors) | self.allow_nan
        boxes, inside = map_boxes_to_image(tensors["boxes"].numpy(), geometries, relative=False)
        kept = inside & filled_slots(tensors) & good[:, None]
        masks = self._masks(tensors, geometries, kept)
        area = pa.array(np.array([np.count_nonzero(mask) for mask in masks], np.int64))
        columns = [*build_box_columns(tensors, boxes, kept, self.labels), area, *self._written(masks)]
        return [build_struct_lists(kept, good, columns, self._members)]

    def find_errors(self, tensors: dict[str, torch.Tensor]) -> list[ErrorRecord | None]:
        return nonfinite_errors(tensors, self.allow_nan)

    def sum_metrics(self, rows: pa.RecordBatch) -> dict[str, float]:  # noqa: ARG002
        return {}

    def _masks(
        self, tensors: Mapping[str, torch.Tensor], frames: Sequence[ImageGeometry], kept: np.ndarray[Any, Any]
    ) -> list[np.ndarray[Any, Any]]:
        """Those that are kept, uint8 `[h, w]` of 0 and 1, image after image."""
        bits, sizes = tensors["masks"].numpy(), tensors["mask_size"].tolist()
        return [
            resample_to_image(
                unpack_mask_bits(bits[row, place], *sizes[row]), frame if self.original else input_geometry(frame), 0
            )
            for row, frame in enumerate(frames)
            for place in kept[row].nonzero()[0]
        ]

    def _written(self, masks: Sequence[np.ndarray[Any, Any]]) -> list[pa.Array]:
        if self.mask == "none":
            return []
        if self.mask == "png":
            return [pa.array([encode_png(mask * 255) for mask in masks], pa.binary())]
        sizes = [(mask.shape[0], mask.shape[1]) for mask in masks]
        runs = build_rle_arrays(sizes, [encode_rle(mask, [1])[0] for mask in masks])
        return [pa.StructArray.from_arrays(runs, fields=RLE_FIELDS)]
