"""`type: detection`: boxes with their classes and scores, in pixels of the original image."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import pyarrow as pa
from pydantic import Field

from batchjob.preprocessing.geometry import ImageGeometry
from batchjob.tasks.boxes import (
    BOX_FIELDS,
    BoxSelector,
    DetrBoxReader,
    TorchvisionBoxReader,
    build_box_columns,
    build_struct_lists,
    choose_box_reader,
    filled_slots,
    map_boxes_to_image,
)
from batchjob.tasks.labels import Labels, max_label_bytes, read_labels, resolve_class_names
from batchjob.tasks.postprocess import Postprocess, finite_mask, nonfinite_errors
from batchjob.tasks.settings import TaskSettings
from batchjob.types import ErrorRecord

if TYPE_CHECKING:
    import torch

    from batchjob.storage.reader import Reader

__all__ = ["DetectionTask"]

_FIELDS = [pa.field("detections", pa.list_(pa.struct(BOX_FIELDS)))]


class DetectionTask(TaskSettings):
    """What is where in an image.

    Attributes:
        threshold: the least score of a box.
        nms: of two boxes of one class that overlap by more than this (intersection over union), the better alone is
            kept; the model's own choice where not given.
        max_boxes: that a row lists, the best first.
        labels: names by id, as a list, or a file of one a line, a JSON list, or a JSON object `id: label`. The
            weights' own names where not given; null where they have none either.
        format: `torchvision`, a list of dicts with boxes in pixels; or `detr`, logits and relative boxes of queries.
        scores: of `detr`: `softmax`, the last class being "no object", or `sigmoid`, each class by itself.
        allow_nan: True lets rows pass whose output holds NaN, less the boxes that do.
    """

    type: Literal["detection"] = "detection"
    threshold: float = Field(default=0.05, ge=0, le=1)
    nms: float | None = Field(default=None, ge=0, le=1)
    max_boxes: int = Field(default=100, ge=1, le=10_000)
    labels: Labels = None
    format: Literal["auto", "torchvision", "detr"] = "auto"
    scores: Literal["auto", "softmax", "sigmoid"] = "auto"
    allow_nan: bool = False

    @property
    def row_bytes(self) -> int:
        """A bound on the bytes that a row's column takes."""
        return self.max_boxes * (28 + max_label_bytes(self.labels)) + 8

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
            InvalidJob: the output is not of the format, or labels do not fit it.
            Unavailable: the store of the label file cannot be reached.
        """
        names = resolve_class_names(self.labels, None, labels, reader)
        read = choose_box_reader(output, self.format, self.scores, len(names) if names is not None else None)
        if isinstance(read, DetrBoxReader):
            names = resolve_class_names(self.labels, output["logits"].shape[2] - (not read.sigmoid), labels, reader)
        return _DetectionPostprocess(read, BoxSelector(self.threshold, self.nms, self.max_boxes), names, self.allow_nan)


@dataclass(frozen=True)
class _DetectionPostprocess:
    read: TorchvisionBoxReader | DetrBoxReader
    selection: BoxSelector
    labels: tuple[str, ...] | None
    allow_nan: bool
    truth_columns: tuple[str, ...] = ()

    @property
    def fields(self) -> list[pa.Field]:
        return list(_FIELDS)

    def on_device(self, output: Any) -> dict[str, torch.Tensor]:
        """What `Selection` says, of k = `max_boxes` places an image."""
        chosen = self.selection(self.read(output))
        del chosen["order"]
        return chosen

    def columns(self, tensors: dict[str, torch.Tensor], geometries: Sequence[ImageGeometry]) -> list[pa.Array]:
        good = finite_mask(tensors) | self.allow_nan
        boxes, inside = map_boxes_to_image(tensors["boxes"].numpy(), geometries, relative=self.read.relative)
        kept = inside & filled_slots(tensors) & good[:, None]
        return [build_struct_lists(kept, good, build_box_columns(tensors, boxes, kept, self.labels), BOX_FIELDS)]

    def find_errors(self, tensors: dict[str, torch.Tensor]) -> list[ErrorRecord | None]:
        return nonfinite_errors(tensors, self.allow_nan)

    def sum_metrics(self, rows: pa.RecordBatch) -> dict[str, float]:  # noqa: ARG002
        return {}
