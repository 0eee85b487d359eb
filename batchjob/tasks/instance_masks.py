"""Instances with a mask each, as Mask R-CNN gives them, put back into the image."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

import pyarrow as pa

from batchjob.preprocessing.geometry import Frame
from batchjob.tasks.boxes import BOX_FIELDS, Lists, Selection, box_columns, in_image, listed, taken
from batchjob.tasks.masks import RLE_FIELDS, as_input, packed, placed, png, run_lengths, run_structs, unpacked
from batchjob.tasks.postprocess import faults, present
from batchjob.types import Fault

if TYPE_CHECKING:
    import numpy as np
    import torch

__all__ = ["Instances"]

_AREA = pa.field("pixels", pa.int64())
_MASKS = {"png": [pa.field("mask", pa.binary())], "rle": [pa.field("mask", pa.struct(RLE_FIELDS))], "none": []}


@dataclass(frozen=True)
class Instances:
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

    selection: Selection
    mask_threshold: float
    mask: Literal["png", "rle", "none"]
    labels: tuple[str, ...] | None
    allow_nan: bool
    original: bool
    truths: tuple[str, ...] = ()

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

        chosen = self.selection(Lists()(output))
        order, counts = chosen.pop("order"), chosen["count"].tolist()
        sizes = [tuple(image["masks"].shape[-2:]) for image in output]
        room = max((-(-height * width // 8) for height, width in sizes), default=0)
        masks = chosen["boxes"].new_zeros((len(sizes), self.selection.max_boxes, room), dtype=torch.uint8)
        finite = chosen["finite"].clone()
        for row, (image, count) in enumerate(zip(output, counts, strict=True)):
            own = image["masks"].reshape(-1, *sizes[row])[order[row, :count]]
            masks[row, :count] = packed(own >= self.mask_threshold, room)
            finite[row] &= own.isfinite().all()
        size = torch.tensor(sizes, dtype=torch.int32).reshape(-1, 2).to(masks.device)
        return {**chosen, "masks": masks, "mask_size": size, "finite": finite}

    def columns(self, tensors: dict[str, torch.Tensor], frames: Sequence[Frame]) -> list[pa.Array]:
        import numpy as np

        good = present(tensors) | self.allow_nan
        boxes, inside = in_image(tensors["boxes"].numpy(), frames, relative=False)
        kept = inside & taken(tensors) & good[:, None]
        masks = self._masks(tensors, frames, kept)
        area = pa.array(np.array([np.count_nonzero(mask) for mask in masks], np.int64))
        columns = [*box_columns(tensors, boxes, kept, self.labels), area, *self._written(masks)]
        return [listed(kept, good, columns, self._members)]

    def faults(self, tensors: dict[str, torch.Tensor]) -> list[Fault | None]:
        return faults(tensors, self.allow_nan)

    def tally(self, rows: pa.RecordBatch) -> dict[str, float]:  # noqa: ARG002
        return {}

    def _masks(
        self, tensors: Mapping[str, torch.Tensor], frames: Sequence[Frame], kept: np.ndarray[Any, Any]
    ) -> list[np.ndarray[Any, Any]]:
        """Those that are kept, uint8 `[h, w]` of 0 and 1, image after image."""
        bits, sizes = tensors["masks"].numpy(), tensors["mask_size"].tolist()
        return [
            placed(unpacked(bits[row, place], *sizes[row]), frame if self.original else as_input(frame), 0)
            for row, frame in enumerate(frames)
            for place in kept[row].nonzero()[0]
        ]

    def _written(self, masks: Sequence[np.ndarray[Any, Any]]) -> list[pa.Array]:
        if self.mask == "none":
            return []
        if self.mask == "png":
            return [pa.array([png(mask * 255) for mask in masks], pa.binary())]
        sizes = [(mask.shape[0], mask.shape[1]) for mask in masks]
        runs = run_structs(sizes, [run_lengths(mask, [1])[0] for mask in masks])
        return [pa.StructArray.from_arrays(runs, fields=RLE_FIELDS)]
