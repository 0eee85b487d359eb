"""`type: detection`: boxes with their classes and scores, in pixels of the original image."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

import pyarrow as pa
from pydantic import Field

from batchjob.errors import InvalidJob
from batchjob.tasks.boxes import BOX_FIELDS, BoxSelector, build_box_columns
from batchjob.tasks.detector_output import DetrBoxReader, TorchvisionBoxReader, choose_box_reader, gives_keypoints
from batchjob.tasks.labels import Labels, max_label_bytes, resolve_class_names
from batchjob.tasks.list_columns import build_struct_lists
from batchjob.tasks.postprocess import Postprocess
from batchjob.tasks.settings import TaskContext, TaskSettings

if TYPE_CHECKING:
    import torch

    from batchjob.preprocessing.geometry import ImageGeometry

__all__ = ["DetectionTask"]

_BOX_BYTES = 28  # 4 each for the corners, the id, the score and the offset of the label


class DetectionTask(TaskSettings):
    """Boxes of the things in an image.

    Attributes:
        threshold: Lowest score of a box.
        nms: Intersection over union, 0 to 1, above which the worse of two boxes of one class is dropped. If not given,
            only the model's own suppression applies.
        max_boxes: Maximum number of boxes in a row, the best first.
        labels: Class names by id, as a list, or a file of one a line, a JSON list, or a JSON object `id: label`. If not
            given, the names that the weights bring; null if they bring none.
        format: `torchvision`, a list of dicts with boxes in pixels; or `detr`, logits and relative boxes of queries.
        scores: Meaning of the logits of `detr`: `softmax`, the last class being "no object", or `sigmoid`, a score of
            its own for each class.
        keypoints: `refuse` a model that gives keypoints beside its boxes, for which there is no column, or `drop` them.
        allow_nan: True accepts rows whose output holds NaN, without the boxes that do.
    """

    type: Literal["detection"] = "detection"
    threshold: float = Field(default=0.05, ge=0, le=1)
    nms: float | None = Field(default=None, ge=0, le=1)
    max_boxes: int = Field(default=100, ge=1, le=10_000)
    labels: Labels = None
    format: Literal["auto", "torchvision", "detr"] = "auto"
    scores: Literal["auto", "softmax", "sigmoid"] = "auto"
    keypoints: Literal["refuse", "drop"] = "refuse"
    allow_nan: bool = False

    @property
    def row_bytes(self) -> int:
        """Upper bound of the bytes of a row's columns."""
        return self.max_boxes * (_BOX_BYTES + max_label_bytes(self.labels)) + 8

    def build_postprocess(self, output: Any, context: TaskContext) -> Postprocess:
        """Build the postprocess; see `TaskSettings`. The output must be in the `format`."""
        names = resolve_class_names(self.labels, None, context)
        box_reader = choose_box_reader(output, self.format, self.scores, len(names) if names is not None else None)
        if self.keypoints == "refuse" and gives_keypoints(output):
            raise InvalidJob(
                "the model gives keypoints beside its boxes, for which detection has no column; write the columns "
                "yourself (task.type: python), or task.keypoints: drop for the boxes alone"
            )
        if isinstance(box_reader, DetrBoxReader):
            class_count = output["logits"].shape[2] - (not box_reader.sigmoid)
            names = resolve_class_names(self.labels, class_count, context)
        selector = BoxSelector(self.threshold, self.nms, self.max_boxes)
        return _DetectionPostprocess(box_reader, selector, names, self.allow_nan)


@dataclass(frozen=True)
class _DetectionPostprocess(Postprocess):
    box_reader: TorchvisionBoxReader | DetrBoxReader
    selector: BoxSelector
    labels: tuple[str, ...] | None
    allow_nan: bool

    @property
    def fields(self) -> list[pa.Field]:
        return [pa.field("detections", pa.list_(pa.struct(BOX_FIELDS)))]

    def on_device(self, output: Any) -> dict[str, torch.Tensor]:
        """Select boxes: the tensors of `BoxSelector` except `order`."""
        selected = self.selector(self.box_reader(output))
        del selected["order"]
        return selected

    def columns(self, tensors: dict[str, torch.Tensor], geometries: Sequence[ImageGeometry]) -> list[pa.Array]:
        null_rows, relative = self.null_rows(tensors), self.box_reader.relative
        kept, columns = build_box_columns(tensors, geometries, self.labels, null_rows, relative=relative)
        return [build_struct_lists(kept.sum(axis=1), columns, BOX_FIELDS, null_rows)]
