"""Readers of detector output: torchvision's lists of boxes and DETR's queries, as padded tensors of candidates."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar, Literal

from batchjob.errors import InvalidJob
from batchjob.tasks.model_output import output_format_error
from batchjob.tasks.postprocess import EXAMPLE_ROWS

if TYPE_CHECKING:
    import torch

__all__ = [
    "BoxCandidates",
    "DetrBoxReader",
    "TorchvisionBoxReader",
    "choose_box_reader",
    "gives_keypoints",
    "is_torchvision_output",
]

_TORCHVISION_FORM = "a list with a dict for each image of boxes [k, 4], labels [k] and scores [k] (torchvision)"
_DETR_FORM = "a dict of logits [n, q, classes] and pred_boxes [n, q, 4] (DETR)"
# Deformable DETR, RT-DETR and their successors return one of these keys. They score each class on its own.
_SIGMOID_KEYS = {"enc_topk_logits", "intermediate_reference_points", "init_reference_points"}


@dataclass(frozen=True)
class BoxCandidates:
    """All boxes that a model proposes for n images, padded to m boxes each.

    Attributes:
        boxes: Corners x_min, y_min, x_max, y_max, float32 `[n, m, 4]`.
        scores: Score of each box, float32 `[n, m]`; minus infinity where there is no box.
        labels: Class id of each box, int64 `[n, m]`.
        finite: True for images whose output has neither NaN nor infinity, bool `[n]`.
    """

    boxes: torch.Tensor
    scores: torch.Tensor
    labels: torch.Tensor
    finite: torch.Tensor


@dataclass(frozen=True)
class TorchvisionBoxReader:
    """Reader of torchvision's detector output: a dict per image of boxes in input pixels, labels and scores.

    Attributes:
        relative: False: boxes are in pixels of the model's input.
    """

    relative: ClassVar[bool] = False

    def __call__(self, output: Sequence[Mapping[str, torch.Tensor]]) -> BoxCandidates:
        import torch
        from torch.nn.utils.rnn import pad_sequence

        if not output:
            empty = torch.zeros(0, 0)
            return BoxCandidates(empty.view(0, 0, 4), empty, empty.long(), torch.zeros(0, dtype=torch.bool))
        boxes = [image["boxes"].float().reshape(-1, 4) for image in output]
        scores = [image["scores"].float() for image in output]
        finite = [b.isfinite().all() & s.isfinite().all() for b, s in zip(boxes, scores, strict=True)]
        return BoxCandidates(
            pad_sequence(boxes, batch_first=True),
            pad_sequence(scores, batch_first=True, padding_value=float("-inf")),
            pad_sequence([image["labels"].long() for image in output], batch_first=True),
            torch.stack(finite),
        )


@dataclass(frozen=True)
class DetrBoxReader:
    """Reader of the output of DETR and its successors: logits and relative boxes of a fixed number of queries.

    Attributes:
        relative: True: boxes are in shares of the input's width and height, padding included.
        sigmoid: True if each class has a score of its own, so that a query can give several candidates. False for a
            softmax over all classes, the last one meaning "no object".
    """

    relative: ClassVar[bool] = True
    sigmoid: bool

    def __call__(self, output: Mapping[str, torch.Tensor]) -> BoxCandidates:
        from torchvision.ops import box_convert

        logits, centers = output["logits"].float(), output["pred_boxes"].float()
        finite = logits.isfinite().flatten(1).all(dim=1) & centers.isfinite().flatten(1).all(dim=1)
        boxes = box_convert(centers, "cxcywh", "xyxy")
        if not self.sigmoid:
            scores, labels = logits.softmax(dim=2)[..., :-1].max(dim=2)
            return BoxCandidates(boxes, scores, labels, finite)
        # RT-DETR's own postprocessing takes as many candidates as there are queries, Deformable DETR's takes 100.
        queries, classes = logits.shape[1:]
        count = min(max(queries, 100), queries * classes)
        # Example: with 3 classes, index 7 of the flattened scores is query 7 // 3 = 2 and class 7 % 3 = 1.
        scores, indices = logits.sigmoid().flatten(1).topk(count, dim=1)
        query_indices = (indices // classes)[..., None].expand(-1, -1, 4)
        return BoxCandidates(boxes.gather(1, query_indices), scores, indices % classes, finite)


def choose_box_reader(
    output: Any,
    output_format: Literal["auto", "torchvision", "detr"],
    scores: Literal["auto", "softmax", "sigmoid"],
    label_count: int | None,
) -> TorchvisionBoxReader | DetrBoxReader:
    """Choose the reader for a detector's output.

    Args:
        output: Output for `EXAMPLE_ROWS` images.
        output_format: `task.format` of the job.
        scores: `task.scores` of the job: the meaning of DETR's logits. `auto`: sigmoid if there are as many logits as
            labels, softmax if there is one more.
        label_count: Number of class names; None if there are none.

    Raises:
        InvalidJob: If the output has neither format, or not the one that the job names.
    """
    if output_format != "detr" and is_torchvision_output(output):
        return TorchvisionBoxReader()
    if output_format != "torchvision" and _is_detr_output(output):
        return DetrBoxReader(_uses_sigmoid(output, scores, label_count))
    forms = {"torchvision": _TORCHVISION_FORM, "detr": _DETR_FORM}
    expected = forms.get(output_format, f"{_TORCHVISION_FORM} or {_DETR_FORM}")
    raise output_format_error(output, f"detection wants {expected}")


def is_torchvision_output(output: Any, *extra_keys: str) -> bool:
    """Return True if the output of the example batch has torchvision's format.

    Args:
        output: Output for `EXAMPLE_ROWS` images.
        extra_keys: Keys beside boxes, labels and scores that each image must have.
    """
    import torch

    keys = ("boxes", "labels", "scores", *extra_keys)
    return (
        isinstance(output, list | tuple)
        and len(output) == EXAMPLE_ROWS
        and all(isinstance(image, Mapping) for image in output)
        and all(isinstance(image.get(key), torch.Tensor) for image in output for key in keys)
        and all(image["boxes"].ndim == 2 and image["boxes"].shape[1] == 4 for image in output)
        and all(len({len(image[key]) for key in keys}) == 1 for image in output)
    )


def gives_keypoints(output: Any) -> bool:
    """Return True if a detector gives keypoints beside its boxes, as torchvision's Keypoint R-CNN does."""
    images = output if isinstance(output, list | tuple) else [output]
    return any(isinstance(image, Mapping) and any("keypoints" in str(key) for key in image) for image in images)


def _is_detr_output(output: Any) -> bool:
    import torch

    if not isinstance(output, Mapping):
        return False
    logits, boxes = output.get("logits"), output.get("pred_boxes")
    return (
        isinstance(logits, torch.Tensor)
        and isinstance(boxes, torch.Tensor)
        and logits.ndim == 3
        and len(logits) == EXAMPLE_ROWS
        and boxes.shape == (*logits.shape[:2], 4)
    )


def _uses_sigmoid(output: Mapping[str, torch.Tensor], scores: str, label_count: int | None) -> bool:
    logit_count = output["logits"].shape[2]
    if scores == "auto":
        if label_count in {logit_count, logit_count - 1}:
            return label_count == logit_count
        return logit_count == 1 or not _SIGMOID_KEYS.isdisjoint(output)
    if scores == "softmax" and logit_count < 2:
        raise InvalidJob(
            "task.scores: softmax takes the last logit for 'no object', and the model gives but one; write sigmoid"
        )
    return scores == "sigmoid"
