"""Scored boxes: as detectors give them, cut to a fixed number on the device, put back into the image on the host."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar, Literal

import pyarrow as pa

from batchjob.errors import InvalidJob
from batchjob.tasks.labels import look_up_labels
from batchjob.tasks.postprocess import EXAMPLE_ROWS, describe_output

if TYPE_CHECKING:
    import numpy as np
    import torch

    from batchjob.preprocessing.geometry import ImageGeometry

__all__ = [
    "BOX_FIELDS",
    "BoxSelector",
    "Candidates",
    "DetrBoxReader",
    "TorchvisionBoxReader",
    "build_box_columns",
    "build_struct_lists",
    "choose_box_reader",
    "filled_slots",
    "is_torchvision_output",
    "map_boxes_to_image",
]

BOX_FIELDS = [
    pa.field("label_id", pa.int32()),
    pa.field("label", pa.string()),
    pa.field("score", pa.float32()),
    *(pa.field(name, pa.float32()) for name in ("x_min", "y_min", "x_max", "y_max")),
]
_LISTS = "a list with a dict for each image of boxes [k, 4], labels [k] and scores [k] (torchvision)"
_QUERIES = "a dict of logits [n, q, classes] and pred_boxes [n, q, 4] (DETR)"
_ADVICE = "wrap the model (model.type: python), or use another task"
# What DETRs return that score each class by itself.
_SIGMOID_KEYS = {"enc_topk_logits", "intermediate_reference_points", "init_reference_points"}


@dataclass(frozen=True)
class Candidates:
    """What a model proposes for n images, m boxes each.

    Attributes:
        boxes: float32 `[n, m, 4]`: x_min, y_min, x_max, y_max.
        scores: float32 `[n, m]`, minus infinity where there is no box.
        labels: int64 `[n, m]`.
        finite: bool `[n]`: no NaN, no infinity in the model's output.
    """

    boxes: torch.Tensor
    scores: torch.Tensor
    labels: torch.Tensor
    finite: torch.Tensor


@dataclass(frozen=True)
class TorchvisionBoxReader:
    """Reads what torchvision's detectors give: for each image a dict of its boxes in pixels, its labels and scores."""

    relative: ClassVar[bool] = False

    def __call__(self, output: Sequence[Mapping[str, torch.Tensor]]) -> Candidates:
        import torch
        from torch.nn.utils.rnn import pad_sequence

        if not output:
            none = torch.zeros(0, 0)
            return Candidates(none.view(0, 0, 4), none, none.long(), torch.zeros(0, dtype=torch.bool))
        boxes = [image["boxes"].float().reshape(-1, 4) for image in output]
        scores = [image["scores"].float() for image in output]
        finite = [own.isfinite().all() & where.isfinite().all() for own, where in zip(scores, boxes, strict=True)]
        return Candidates(
            pad_sequence(boxes, batch_first=True),
            pad_sequence(scores, batch_first=True, padding_value=float("-inf")),
            pad_sequence([image["labels"].long() for image in output], batch_first=True),
            torch.stack(finite),
        )


@dataclass(frozen=True)
class DetrBoxReader:
    """Reads what DETR and its kin give: logits and boxes of a fixed number of queries.

    Attributes:
        sigmoid: each class has a score of its own, and a query may be several; else the last class is "no object".
    """

    relative: ClassVar[bool] = True
    sigmoid: bool

    def __call__(self, output: Mapping[str, torch.Tensor]) -> Candidates:
        from torchvision.ops import box_convert

        logits, centres = output["logits"].float(), output["pred_boxes"].float()
        finite = logits.isfinite().flatten(1).all(dim=1) & centres.isfinite().flatten(1).all(dim=1)
        boxes = box_convert(centres, "cxcywh", "xyxy")
        if not self.sigmoid:
            scores, labels = logits.softmax(dim=2)[..., :-1].max(dim=2)
            return Candidates(boxes, scores, labels, finite)
        # As many as there are queries, which is what RT-DETR's own post-processing takes; 100, as Deformable DETR's.
        queries, classes = logits.shape[1:]
        most = min(max(queries, 100), queries * classes)
        scores, places = logits.sigmoid().flatten(1).topk(most, dim=1)
        owners = (places // classes)[..., None].expand(-1, -1, 4)
        return Candidates(boxes.gather(1, owners), scores, places % classes, finite)


@dataclass(frozen=True)
class BoxSelector:
    """Which candidates become detections.

    Attributes:
        threshold: the least score.
        nms: of two boxes of one class that overlap by more than this (intersection over union) the better stays;
            None leaves both.
        max_boxes: the best so many of an image.
    """

    threshold: float
    nms: float | None
    max_boxes: int

    def __call__(self, found: Candidates) -> dict[str, torch.Tensor]:
        """The best first, `max_boxes` places each, of which `count` are taken.

        `boxes` float32 `[n, k, 4]`, `score` float32, `label_id` int32 and `order` int64 `[n, k]` (place among the
        candidates), `count` int32 and `finite` bool `[n]`.
        """
        import torch
        from torch.nn.functional import pad

        scores = self._suppressed(found, self._eligible(found))
        # Stable, so that equals stay in the model's own order.
        scores, order = scores.sort(dim=1, descending=True, stable=True)
        scores, order = scores[:, : self.max_boxes], order[:, : self.max_boxes]
        room = self.max_boxes - scores.shape[1]
        count = scores.isfinite().sum(dim=1, dtype=torch.int32)
        return {
            "boxes": pad(found.boxes.gather(1, order[..., None].expand(-1, -1, 4)), (0, 0, 0, room)),
            "score": pad(scores, (0, room)),
            "label_id": pad(found.labels.gather(1, order), (0, room)).to(torch.int32),
            "order": pad(order, (0, room)),
            "count": count,
            "finite": found.finite,
        }

    def _eligible(self, found: Candidates) -> torch.Tensor:
        """The scores; minus infinity where one is too low, or something is not a number."""
        sound = found.scores.isfinite() & found.boxes.isfinite().all(dim=2) & (found.scores >= self.threshold)
        return found.scores.masked_fill(~sound, float("-inf"))

    def _suppressed(self, found: Candidates, scores: torch.Tensor) -> torch.Tensor:
        import torch
        from torchvision.ops import batched_nms

        if self.nms is None:
            return scores
        rest = torch.full_like(scores, float("-inf"))
        for image, own in enumerate(scores):
            alive = own.isfinite().nonzero()[:, 0]
            kept = alive[batched_nms(found.boxes[image, alive], own[alive], found.labels[image, alive], self.nms)]
            rest[image, kept] = own[kept]
        return rest


def choose_box_reader(
    output: Any,
    output_format: Literal["auto", "torchvision", "detr"],
    scores: Literal["auto", "softmax", "sigmoid"],
    label_count: int | None,
) -> TorchvisionBoxReader | DetrBoxReader:
    """How the output of a detector is read.

    Args:
        output: what it gave for `EXAMPLE_ROWS` images.
        form: what the job says it is.
        scores: what the job says of DETR's logits. `auto`: as many logits as labels mean sigmoid, one more softmax.
        labels: how many names of classes there are, where there are any.

    Raises:
        InvalidJob: it is neither form, or not the one the job names; the sentence says what came.
    """
    if output_format != "detr" and is_torchvision_output(output):
        return TorchvisionBoxReader()
    if output_format != "torchvision" and _is_queries(output):
        return DetrBoxReader(_sigmoid(output, scores, label_count))
    wanted = {"torchvision": _LISTS, "detr": _QUERIES}.get(output_format, f"{_LISTS} or {_QUERIES}")
    raise output_format_error(output, f"detection wants {wanted}")


def is_torchvision_output(output: Any, *extra_keys: str) -> bool:
    """Whether it is torchvision's form, with these keys too."""
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


def _is_queries(output: Any) -> bool:
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


def _sigmoid(output: Mapping[str, torch.Tensor], scores: str, labels: int | None) -> bool:
    logits = output["logits"].shape[2]
    if scores == "auto":
        known = labels in {logits, logits - 1}
        return labels == logits if known else logits == 1 or not _SIGMOID_KEYS.isdisjoint(output)
    if scores == "softmax" and logits < 2:
        raise InvalidJob(
            "task.scores: softmax takes the last logit for 'no object', and the model gives but one; write sigmoid"
        )
    return scores == "sigmoid"


def output_format_error(output: Any, wanted: str) -> InvalidJob:
    """The error that says what came, what was wanted, and what can be done."""
    first = "return something from its forward()" if output is None else "pick one of several with model.output"
    came = f"the model gives {_told(output)} for a batch of {EXAMPLE_ROWS}"
    return InvalidJob(f"{came}, but {wanted}; {first}, or {_ADVICE}")


def _told(output: Any) -> str:
    """Also what the dicts within a list or a dict hold."""
    if isinstance(output, Mapping):
        parts = (f"{key} {describe_output(value)}" for key, value in list(output.items())[:8])
        return f"{describe_output(output)} ({', '.join(parts)})"
    if isinstance(output, list | tuple) and output and isinstance(output[0], Mapping):
        return f"a {type(output).__name__} of {len(output)}, the first {_told(output[0])}"
    return describe_output(output)


def map_boxes_to_image(
    boxes: np.ndarray[Any, Any], geometries: Sequence[ImageGeometry], *, relative: bool
) -> tuple[np.ndarray[Any, Any], np.ndarray[Any, np.dtype[np.bool_]]]:
    """Boxes in pixels of the upright image, cut at its edges; and which are not wholly outside (in padding).

    Args:
        boxes: float32 `[n, k, 4]`, in pixels of the model's input.
        frames: of n rows.
        relative: they are parts of the input's width and height instead, padding included.
    """
    import numpy as np

    if relative:
        inputs = [(frame.input_width + frame.pad_right, frame.input_height + frame.pad_below) for frame in geometries]
        boxes = boxes * _both(inputs)
    cut = _both([(frame.left, frame.top) for frame in geometries])
    scale = _both([(frame.scale_x, frame.scale_y) for frame in geometries])
    size = _both([(frame.width, frame.height) for frame in geometries])
    placed = (boxes + cut) / scale
    inside = (placed[..., 2:] >= 0).all(axis=2) & (placed[..., :2] <= size[..., :2]).all(axis=2)
    return np.clip(placed, 0, size).astype(np.float32), inside


def _both(pairs: Sequence[tuple[float, float]]) -> np.ndarray[Any, Any]:
    """x and y of each row, for either corner: float64 `[n, 1, 4]`."""
    import numpy as np

    return np.tile(np.asarray(pairs, np.float64).reshape(-1, 1, 2), 2)


def filled_slots(tensors: Mapping[str, torch.Tensor]) -> np.ndarray[Any, np.dtype[np.bool_]]:
    """bool `[n, k]`: which of the places that `Selection` gave hold a box."""
    import numpy as np

    count, places = tensors["count"].numpy(), tensors["score"].shape[1]
    filled: np.ndarray[Any, np.dtype[np.bool_]] = np.arange(places) < count[:, None]
    return filled


def build_box_columns(
    tensors: Mapping[str, torch.Tensor],
    boxes: np.ndarray[Any, Any],
    kept: np.ndarray[Any, np.dtype[np.bool_]],
    labels: tuple[str, ...] | None,
) -> list[pa.Array]:
    """`BOX_FIELDS` of the boxes that are kept, image after image."""
    ids = tensors["label_id"].numpy()[kept]
    corners = boxes[kept]
    return [
        pa.array(ids),
        look_up_labels(labels, ids),
        pa.array(tensors["score"].numpy()[kept]),
        *(pa.array(corners[:, side].copy()) for side in range(4)),
    ]


def build_struct_lists(
    kept: np.ndarray[Any, np.dtype[np.bool_]],
    good: np.ndarray[Any, np.dtype[np.bool_]],
    columns: Sequence[pa.Array],
    fields: Sequence[pa.Field],
) -> pa.Array:
    """A list of structs for each row.

    Args:
        kept: bool `[n, k]`: which places are taken.
        good: bool `[n]`: rows that have a list; the others are null.
        columns: the structs' members, of all taken places in their order.
        fields: their fields.
    """
    import numpy as np

    ends = np.zeros(len(good) + 1, np.int32)
    np.cumsum(kept.sum(axis=1), out=ends[1:])
    structs = pa.StructArray.from_arrays(list(columns), fields=list(fields))
    return pa.ListArray.from_arrays(
        pa.array(ends), structs, type=pa.list_(pa.struct(list(fields))), mask=pa.array(~good)
    )
