"""`type: segmentation`: the class of each pixel, or a mask for each instance."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
import pyarrow as pa
from pydantic import Field

from batchjob.errors import InvalidJob
from batchjob.tasks.boxes import BoxSelector
from batchjob.tasks.detector_output import is_torchvision_output
from batchjob.tasks.instance_masks import InstancePostprocess
from batchjob.tasks.labels import Labels, look_up_labels, max_label_bytes, read_labels, resolve_class_names
from batchjob.tasks.list_columns import build_list_column
from batchjob.tasks.masks import (
    RLE_FIELDS,
    build_rle_arrays,
    encode_png,
    encode_rle,
    input_geometry,
    resample_to_image,
)
from batchjob.tasks.model_output import output_format_error
from batchjob.tasks.postprocess import EXAMPLE_ROWS, Postprocess, PostprocessDefaults, finite_mask
from batchjob.tasks.settings import TaskSettings

if TYPE_CHECKING:
    import torch

    from batchjob.preprocessing.geometry import ImageGeometry
    from batchjob.storage.reader import Reader

__all__ = ["SegmentationTask"]

# Assumptions for the size of a row, while neither the classes nor the image sizes are known.
_TYPICAL_CLASSES = 32
_MASK_BYTES = 256 * 1024
_INSTANCE_MASK_BYTES = 8 * 1024
_LOGITS = "a tensor [n, classes, h, w] of logits, or a dict that holds one as out or logits"
_INSTANCES = "a list with a dict for each image of boxes, labels, scores and masks [k, 1, h, w] (torchvision)"
_PIXEL_FIELDS = [pa.field("label_id", pa.int32()), pa.field("label", pa.string()), pa.field("pixels", pa.int64())]
_RUN_FIELDS = [pa.field("label_id", pa.int32()), *RLE_FIELDS]
_MAX_CLASSES = 65_535  # the ids of 16 bits, without the one for pixels of no class

_Array = np.ndarray[Any, Any]


class SegmentationTask(TaskSettings):
    """The pixels that show something.

    Attributes:
        mask: `png`, an image of class ids (255, or 65535 if there are more than 255 classes, for pixels that the crop
            cut off); `rle`, COCO's run lengths, class by class; or `none`, only counts of pixels.
        size: Size of the masks: that of the `original` image, by the nearest pixel; or that of the model's `input`.
        threshold: Lowest score of an instance.
        max_boxes: Maximum number of instances in a row, the best first.
        mask_threshold: Lowest probability of a pixel that belongs to an instance, or to the class of a model of one
            class.
        labels: Class names by id, as a list, or a file of one a line, a JSON list, or a JSON object `id: label`. If not
            given, the names that the weights bring; null if they bring none.
        format: `semantic`, a class for each pixel; or `instances`, in the format of torchvision's Mask R-CNN.
        allow_nan: True accepts rows whose output holds NaN; such pixels count as cut off.
    """

    type: Literal["segmentation"] = "segmentation"
    mask: Literal["png", "rle", "none"] = "png"
    size: Literal["original", "input"] = "original"
    threshold: float = Field(default=0.5, ge=0, le=1)
    max_boxes: int = Field(default=100, ge=1, le=10_000)
    mask_threshold: float = Field(default=0.5, gt=0, lt=1)
    labels: Labels = None
    format: Literal["auto", "semantic", "instances"] = "auto"
    allow_nan: bool = False

    @property
    def row_bytes(self) -> int:
        """Bytes of a row's columns, a usual maximum: the sizes of the images are not known yet."""
        label = max_label_bytes(self.labels)
        instances = self.max_boxes * (36 + label) if self.format == "instances" else 0
        if self.mask == "none":
            return instances + _TYPICAL_CLASSES * (12 + label)
        masks = self.max_boxes * _INSTANCE_MASK_BYTES if self.format == "instances" else _MASK_BYTES
        return instances + masks + _TYPICAL_CLASSES * (12 + label)

    def check(self, reader: Reader, folder: Path) -> None:  # noqa: ARG002
        """Read the label file, if there is one. Raises InvalidJob, Unavailable."""
        if isinstance(self.labels, str):
            read_labels(reader, self.labels)

    def build_postprocess(
        self,
        output: Any,
        labels: tuple[str, ...] | None,
        reader: Reader,
        folder: Path,  # noqa: ARG002
    ) -> Postprocess:
        """Build the postprocess for a model, from its output for an example batch.

        Args:
            output: Output of the model for `EXAMPLE_ROWS` images.
            labels: Class names that the weights bring.
            reader: Reader for a label file.
            folder: Not used.

        Raises:
            InvalidJob: If the output is neither a map of logits nor instances with masks, or the labels do not fit it.
            Unavailable: If the store of the label file cannot be reached.
        """
        original_size = self.size == "original"
        if self.format != "semantic" and is_torchvision_output(output, "masks"):
            names = resolve_class_names(self.labels, None, labels, reader)
            selector = BoxSelector(self.threshold, None, self.max_boxes)
            return InstancePostprocess(selector, self.mask_threshold, self.mask, names, self.allow_nan, original_size)
        logits = _select_logits(output)
        if self.format == "instances" or not _is_logit_map(logits):
            forms = {"semantic": _LOGITS, "instances": _INSTANCES}
            raise output_format_error(
                output, f"segmentation wants {forms.get(self.format, f'{_LOGITS}, or {_INSTANCES}')}"
            )
        # A single logit per pixel is the probability of one class against the background: two classes.
        classes = max(logits.shape[1], 2)
        if classes > _MAX_CLASSES:
            raise InvalidJob(f"the model gives {classes} classes; a mask of 16 bits holds {_MAX_CLASSES} at most")
        names = resolve_class_names(self.labels, classes, labels, reader)
        return _SemanticPostprocess(classes, names, self.mask, self.mask_threshold, self.allow_nan, original_size)


@dataclass(frozen=True)
class _SemanticPostprocess(PostprocessDefaults):
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

        logits = _select_logits(output).float()
        best, ids = logits.max(dim=1)
        if logits.shape[1] == 1:
            ids = (best.sigmoid() >= self.mask_threshold).long()
        finite_pixels = best.isfinite()
        dtype = torch.uint8 if self._void == 255 else torch.int32
        ids = ids.masked_fill(~finite_pixels, self._void).to(dtype)
        return {"ids": ids, "finite": finite_pixels.flatten(1).all(dim=1)}

    def columns(self, tensors: dict[str, torch.Tensor], geometries: Sequence[ImageGeometry]) -> list[pa.Array]:
        valid = (finite_mask(tensors) | self.allow_nan).tolist()
        targets = geometries if self.original_size else [input_geometry(geometry) for geometry in geometries]
        maps = [
            resample_to_image(ids, target, self._void) if is_valid else None
            for ids, target, is_valid in zip(tensors["ids"].numpy(), targets, valid, strict=True)
        ]
        class_counts = [None if ids is None else self._count_pixels(ids) for ids in maps]
        pixels = _build_class_lists(class_counts, _PIXEL_FIELDS, self._build_pixel_columns)
        if self.mask == "none":
            return [pixels]
        if self.mask == "png":
            return [pixels, pa.array([None if ids is None else encode_png(ids) for ids in maps], pa.binary())]
        return [pixels, _build_run_lists(maps, class_counts)]

    def _count_pixels(self, ids: _Array) -> _Array:
        """Return the id and the pixels of each class in a map, the largest first: int64 `[c, 2]`."""
        counts = np.bincount(ids.reshape(-1), minlength=self.classes)[: self.classes]
        order = np.argsort(-counts, kind="stable")[: np.count_nonzero(counts)]
        return np.stack([order, counts[order]], axis=1)

    def _build_pixel_columns(self, class_counts: _Array) -> list[pa.Array]:
        ids = class_counts[:, 0].astype("int32")
        return [pa.array(ids), look_up_labels(self.labels, ids), pa.array(class_counts[:, 1].copy())]


def _select_logits(output: Any) -> Any:
    if isinstance(output, Mapping):
        return next((output[key] for key in ("out", "logits") if key in output), None)
    return output


def _is_logit_map(logits: Any) -> bool:
    import torch

    return (
        isinstance(logits, torch.Tensor)
        and logits.is_floating_point()
        and logits.ndim == 4
        and len(logits) == EXAMPLE_ROWS
        and min(logits.shape) > 0
    )


def _build_run_lists(maps: Sequence[_Array | None], class_counts: Sequence[_Array | None]) -> pa.Array:
    """Build the column of run lengths: for each row a struct of `_RUN_FIELDS` for each class in its map."""
    rle_by_row = [
        (ids.shape, encode_rle(ids, counts[:, 0].tolist()))
        for ids, counts in zip(maps, class_counts, strict=True)
        if ids is not None and counts is not None
    ]
    sizes = [(shape[0], shape[1]) for shape, masks in rle_by_row for _ in masks]
    rle_arrays = build_rle_arrays(sizes, [mask for _, masks in rle_by_row for mask in masks])
    return _build_class_lists(
        class_counts, _RUN_FIELDS, lambda flat: [pa.array(flat[:, 0].astype("int32")), *rle_arrays]
    )


def _build_class_lists(
    class_counts: Sequence[_Array | None],
    fields: Sequence[pa.Field],
    build_columns: Callable[[_Array], list[pa.Array]],
) -> pa.Array:
    """Build a column with a struct for each class of a row; null for rows without a map.

    Args:
        class_counts: Id and pixels of the classes of each row, `[c, 2]`; None for null rows.
        fields: Fields of the structs.
        build_columns: Builds the structs' columns from the ids and pixels of all rows, `[total, 2]`.
    """
    flat = np.concatenate([np.zeros((0, 2), np.int64), *(counts for counts in class_counts if counts is not None)])
    structs = pa.StructArray.from_arrays(build_columns(flat), fields=list(fields))
    null_rows = np.array([counts is None for counts in class_counts], np.bool_)
    return build_list_column([0 if counts is None else len(counts) for counts in class_counts], structs, null_rows)
