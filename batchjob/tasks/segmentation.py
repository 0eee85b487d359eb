"""`type: segmentation`: which class each pixel shows, or a mask for each thing that was found."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import pyarrow as pa
from pydantic import Field

from batchjob.errors import InvalidJob
from batchjob.preprocessing.geometry import ImageGeometry
from batchjob.tasks.boxes import BoxSelector, is_torchvision_output, output_format_error
from batchjob.tasks.instance_masks import InstancePostprocess
from batchjob.tasks.labels import Labels, look_up_labels, max_label_bytes, read_labels, resolve_class_names
from batchjob.tasks.masks import RLE_FIELDS, build_rle_arrays, encode_png, encode_rle, input_geometry, resample_to_image
from batchjob.tasks.postprocess import EXAMPLE_ROWS, Postprocess, finite_mask, nonfinite_errors
from batchjob.tasks.settings import TaskSettings
from batchjob.types import ErrorRecord

if TYPE_CHECKING:
    import numpy as np
    import torch

    from batchjob.storage.reader import Reader

__all__ = ["SegmentationTask"]

_CLASSES = 32  # that an image is taken to show at most, for the bound on its row
_MASK_BYTES = 256 * 1024
_INSTANCE_BYTES = 8 * 1024
_LOGITS = "a tensor [n, classes, h, w] of logits, or a dict that holds one as out or logits"
_INSTANCES = "a list with a dict for each image of boxes, labels, scores and masks [k, 1, h, w] (torchvision)"
_PIXEL_FIELDS = [pa.field("label_id", pa.int32()), pa.field("label", pa.string()), pa.field("pixels", pa.int64())]
_RUN_FIELDS = [pa.field("label_id", pa.int32()), *RLE_FIELDS]
_MOST_CLASSES = 65_535  # 16 bits, less the id of pixels that show none


class SegmentationTask(TaskSettings):
    """Which pixels show what.

    Attributes:
        mask: `png`, one image of class ids (255, or 65535 where there are more than 255 classes, for pixels that the
            crop cut off); `rle`, run lengths as COCO writes them, class by class; or `none`, only counts of pixels.
        size: of the masks: as the `original` image, by the nearest pixel; or as the model's `input`.
        threshold: the least score of an instance.
        max_boxes: instances that a row lists, the best first.
        mask_threshold: from which probability on a pixel belongs to an instance, or to the class of a model of one.
        labels: names by id, as a list, or a file of one a line, a JSON list, or a JSON object `id: label`. The
            weights' own names where not given; null where they have none either.
        format: `semantic`, a class for each pixel; or `instances`, as torchvision's Mask R-CNN gives them.
        allow_nan: True lets rows pass whose output holds NaN; such pixels count as cut off.
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
        """What a row usually takes at most; the images' sizes are not known yet."""
        label = max_label_bytes(self.labels)
        instances = self.max_boxes * (36 + label) if self.format == "instances" else 0
        if self.mask == "none":
            return instances + _CLASSES * (12 + label)
        masks = self.max_boxes * _INSTANCE_BYTES if self.format == "instances" else _MASK_BYTES
        return instances + masks + _CLASSES * (12 + label)

    def check(self, reader: Reader, base: Path) -> None:  # noqa: ARG002 - one face for all tasks
        """Reads the label file, if there is one, without torch. Raises InvalidJob, Unavailable."""
        if isinstance(self.labels, str):
            read_labels(reader, self.labels)

    def build_postprocess(self, output: Any, labels: tuple[str, ...] | None, reader: Reader, base: Path) -> Postprocess:  # noqa: ARG002
        """Looks at one output before work starts.

        Args:
            output: what the model gave for `EXAMPLE_ROWS` images.
            labels: what the weights bring.
            reader: for a label file.
            base: of no use here.

        Raises:
            InvalidJob: the output is neither a map of logits nor instances with masks, or labels do not fit it.
            Unavailable: the store of the label file cannot be reached.
        """
        if self.format != "semantic" and is_torchvision_output(output, "masks"):
            names = resolve_class_names(self.labels, None, labels, reader)
            original = self.size == "original"
            chosen = BoxSelector(self.threshold, None, self.max_boxes)
            return InstancePostprocess(chosen, self.mask_threshold, self.mask, names, self.allow_nan, original)
        logits = _logits(output)
        if self.format == "instances" or not _is_map(logits):
            wanted = {"semantic": _LOGITS, "instances": _INSTANCES}.get(self.format, f"{_LOGITS}, or {_INSTANCES}")
            raise output_format_error(output, f"segmentation wants {wanted}")
        classes = max(logits.shape[1], 2)
        if classes > _MOST_CLASSES:
            raise InvalidJob(f"the model gives {classes} classes; a mask of 16 bits holds {_MOST_CLASSES} at most")
        names = resolve_class_names(self.labels, classes, labels, reader)
        return _SemanticPostprocess(
            classes, names, self.mask, self.mask_threshold, self.allow_nan, original=self.size == "original"
        )


def _logits(output: Any) -> Any:
    if isinstance(output, Mapping):
        return next((output[key] for key in ("out", "logits") if key in output), None)
    return output


def _is_map(logits: Any) -> bool:
    import torch

    return (
        isinstance(logits, torch.Tensor)
        and logits.is_floating_point()
        and logits.ndim == 4
        and len(logits) == EXAMPLE_ROWS
        and min(logits.shape) > 0
    )


@dataclass(frozen=True)
class _SemanticPostprocess:
    classes: int
    labels: tuple[str, ...] | None
    mask: Literal["png", "rle", "none"]
    mask_threshold: float
    allow_nan: bool
    original: bool
    truth_columns: tuple[str, ...] = ()

    @property
    def fields(self) -> list[pa.Field]:
        masks = {"png": pa.binary(), "rle": pa.list_(pa.struct(_RUN_FIELDS))}
        kind = masks.get(self.mask)
        counts = pa.field("pixels", pa.list_(pa.struct(_PIXEL_FIELDS)))
        return [counts] if kind is None else [counts, pa.field("mask", kind)]

    @property
    def _void(self) -> int:
        """The id of pixels that show no class."""
        return 255 if self.classes <= 255 else 65_535

    def on_device(self, output: Any) -> dict[str, torch.Tensor]:
        """`ids` uint8 (or int32) `[n, h, w]`: of the likeliest class; `finite` bool `[n]`."""
        import torch

        logits = _logits(output).float()
        best, ids = logits.max(dim=1)
        if logits.shape[1] == 1:
            ids = (best.sigmoid() >= self.mask_threshold).long()
        sound = best.isfinite()
        dtype = torch.uint8 if self._void == 255 else torch.int32
        return {"ids": ids.masked_fill(~sound, self._void).to(dtype), "finite": sound.flatten(1).all(dim=1)}

    def columns(self, tensors: dict[str, torch.Tensor], geometries: Sequence[ImageGeometry]) -> list[pa.Array]:
        good = (finite_mask(tensors) | self.allow_nan).tolist()
        maps = [
            resample_to_image(ids, frame if self.original else input_geometry(frame), self._void) if fine else None
            for ids, frame, fine in zip(tensors["ids"].numpy(), geometries, good, strict=True)
        ]
        counted = [None if one is None else self._counted(one) for one in maps]
        pixels = _lists(counted, _PIXEL_FIELDS, self._pixel_columns)
        if self.mask == "none":
            return [pixels]
        if self.mask == "png":
            return [pixels, pa.array([None if one is None else encode_png(one) for one in maps], pa.binary())]
        return [pixels, self._runs(maps, counted)]

    def find_errors(self, tensors: dict[str, torch.Tensor]) -> list[ErrorRecord | None]:
        return nonfinite_errors(tensors, self.allow_nan)

    def sum_metrics(self, rows: pa.RecordBatch) -> dict[str, float]:  # noqa: ARG002
        return {}

    def _counted(self, ids: np.ndarray[Any, Any]) -> np.ndarray[Any, Any]:
        """Classes that are there and their pixels, the largest first: int64 `[c, 2]`."""
        import numpy as np

        counts = np.bincount(ids.reshape(-1), minlength=self.classes)[: self.classes]
        order = np.argsort(-counts, kind="stable")[: np.count_nonzero(counts)]
        return np.stack([order, counts[order]], axis=1)

    def _pixel_columns(self, counted: np.ndarray[Any, Any]) -> list[pa.Array]:
        ids = counted[:, 0].astype("int32")
        return [pa.array(ids), look_up_labels(self.labels, ids), pa.array(counted[:, 1].copy())]

    def _runs(
        self, maps: Sequence[np.ndarray[Any, Any] | None], counted: Sequence[np.ndarray[Any, Any] | None]
    ) -> pa.Array:
        shown = [
            (one.shape, encode_rle(one, own[:, 0].tolist()))
            for one, own in zip(maps, counted, strict=True)
            if one is not None and own is not None
        ]
        sizes = [(shape[0], shape[1]) for shape, runs in shown for _ in runs]
        structs = build_rle_arrays(sizes, [run for _, runs in shown for run in runs])
        return _lists(counted, _RUN_FIELDS, lambda flat: [pa.array(flat[:, 0].astype("int32")), *structs])


def _lists(counted: Sequence[Any], fields: Sequence[pa.Field], columns: Any) -> pa.Array:
    """For each row a list of structs, as many as it counts classes; null where it is None."""
    import numpy as np

    ends = np.zeros(len(counted) + 1, np.int32)
    np.cumsum([0 if own is None else len(own) for own in counted], out=ends[1:])
    flat = np.concatenate([np.zeros((0, 2), np.int64), *(own for own in counted if own is not None)])
    structs = pa.StructArray.from_arrays(columns(flat), fields=list(fields))
    absent = pa.array([own is None for own in counted], pa.bool_())
    return pa.ListArray.from_arrays(pa.array(ends), structs, type=pa.list_(pa.struct(list(fields))), mask=absent)
