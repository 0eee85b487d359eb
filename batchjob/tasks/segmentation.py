"""`type: segmentation`: the class of each pixel, or a mask for each instance."""

from __future__ import annotations

from typing import Any, Literal

from pydantic import Field

from batchjob.errors import InvalidJob
from batchjob.tasks.boxes import BoxSelector
from batchjob.tasks.detector_output import is_torchvision_output
from batchjob.tasks.instance_masks import InstancePostprocess
from batchjob.tasks.labels import Labels, max_label_bytes, resolve_class_names
from batchjob.tasks.model_output import output_format_error
from batchjob.tasks.postprocess import Postprocess
from batchjob.tasks.semantic_masks import SemanticPostprocess, is_logit_map, select_logits
from batchjob.tasks.settings import TaskContext, TaskSettings

__all__ = ["SegmentationTask"]

# Assumptions for the size of a row, while neither the classes nor the image sizes are known.
_TYPICAL_CLASSES = 32
_MASK_BYTES = 256 * 1024
_INSTANCE_MASK_BYTES = 8 * 1024
_LOGITS = "a tensor [n, classes, h, w] of logits, or a dict that holds one as out or logits"
_INSTANCES = "a list with a dict for each image of boxes, labels, scores and masks [k, 1, h, w] (torchvision)"
_MAX_CLASSES = 65_535  # the ids of 16 bits, without the one for pixels of no class


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

    def build_postprocess(self, output: Any, context: TaskContext) -> Postprocess:
        """Build the postprocess; see `TaskSettings`. The output must be a map of logits, or instances with masks."""
        original_size = self.size == "original"
        if self.format != "semantic" and is_torchvision_output(output, "masks"):
            names = resolve_class_names(self.labels, None, context)
            selector = BoxSelector(self.threshold, None, self.max_boxes)
            return InstancePostprocess(selector, self.mask_threshold, self.mask, names, self.allow_nan, original_size)
        logits = select_logits(output)
        if self.format == "instances" or not is_logit_map(logits):
            forms = {"semantic": _LOGITS, "instances": _INSTANCES}
            expected = forms.get(self.format, f"{_LOGITS}, or {_INSTANCES}")
            raise output_format_error(output, f"segmentation wants {expected}")
        # A single logit per pixel is the probability of one class against the background: two classes.
        classes = max(logits.shape[1], 2)
        if classes > _MAX_CLASSES:
            raise InvalidJob(f"the model gives {classes} classes; a mask of 16 bits holds {_MAX_CLASSES} at most")
        names = resolve_class_names(self.labels, classes, context)
        return SemanticPostprocess(classes, names, self.mask, self.mask_threshold, self.allow_nan, original_size)
