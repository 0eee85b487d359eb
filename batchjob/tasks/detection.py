"""`type: detection`: boxes with their classes and scores, in pixels of the original image."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import pyarrow as pa
from pydantic import Field

from batchjob.errors import InvalidJob
from batchjob.tasks.boxes import BOX_FIELDS, BoxSelector, build_box_columns, filled_slots, map_boxes_to_image
from batchjob.tasks.detector_output import DetrBoxReader, TorchvisionBoxReader, choose_box_reader, gives_keypoints
from batchjob.tasks.labels import Labels, max_label_bytes, read_labels, resolve_class_names
from batchjob.tasks.list_columns import build_list_column
from batchjob.tasks.postprocess import Postprocess, PostprocessDefaults, finite_mask
from batchjob.tasks.settings import TaskSettings

if TYPE_CHECKING:
    import torch

    from batchjob.preprocessing.geometry import ImageGeometry
    from batchjob.storage.reader import Reader

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
            InvalidJob: If the output is not in the format, or the labels do not fit it.
            Unavailable: If the store of the label file cannot be reached.
        """
        names = resolve_class_names(self.labels, None, labels, reader)
        box_reader = choose_box_reader(output, self.format, self.scores, len(names) if names is not None else None)
        if self.keypoints == "refuse" and gives_keypoints(output):
            raise InvalidJob(
                "the model gives keypoints beside its boxes, for which detection has no column; write the columns "
                "yourself (task.type: python), or task.keypoints: drop for the boxes alone"
            )
        if isinstance(box_reader, DetrBoxReader):
            class_count = output["logits"].shape[2] - (not box_reader.sigmoid)
            names = resolve_class_names(self.labels, class_count, labels, reader)
        selector = BoxSelector(self.threshold, self.nms, self.max_boxes)
        return _DetectionPostprocess(box_reader, selector, names, self.allow_nan)


@dataclass(frozen=True)
class _DetectionPostprocess(PostprocessDefaults):
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
        valid = finite_mask(tensors) | self.allow_nan
        boxes, inside = map_boxes_to_image(tensors["boxes"].numpy(), geometries, relative=self.box_reader.relative)
        kept = inside & filled_slots(tensors) & valid[:, None]
        box_columns = build_box_columns(tensors, boxes, kept, self.labels)
        structs = pa.StructArray.from_arrays(box_columns, fields=BOX_FIELDS)
        return [build_list_column(kept.sum(axis=1), structs, ~valid)]
