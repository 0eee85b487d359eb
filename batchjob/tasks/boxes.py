"""Detection boxes: select the best on the device, map them to pixels of the image, and build their Arrow columns."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import pyarrow as pa

from batchjob.tasks.labels import CLASS_FIELDS, look_up_labels
from batchjob.tasks.postprocess import Mask

if TYPE_CHECKING:
    import torch

    from batchjob.preprocessing.geometry import ImageGeometry
    from batchjob.tasks.detector_output import BoxCandidates

__all__ = ["BOX_FIELDS", "BoxSelector", "build_box_columns", "map_boxes_to_image"]

BOX_FIELDS = [*CLASS_FIELDS, *(pa.field(name, pa.float32()) for name in ("x_min", "y_min", "x_max", "y_max"))]
"""Fields of a box; corners in pixels of the upright image."""


@dataclass(frozen=True)
class BoxSelector:
    """Selection of a fixed number of slots per image from all candidates, the best boxes first.

    A fixed number keeps the tensors rectangular, so that they are copied to the host at once.

    Attributes:
        threshold: Lowest score of a selected box.
        nms: Intersection over union, 0 to 1, above which the worse of two boxes of one class is dropped; None keeps
            both.
        max_boxes: Number of slots per image.
    """

    threshold: float
    nms: float | None
    max_boxes: int

    def __call__(self, candidates: BoxCandidates) -> dict[str, torch.Tensor]:
        """Select the best boxes of n images.

        Returns:
            Tensors with k = `max_boxes` slots, of which the first `count` are filled: `boxes` float32 `[n, k, 4]`,
            `score` float32 `[n, k]`, `label_id` int32 `[n, k]`, `order` int64 `[n, k]` (index among the candidates),
            `count` int32 `[n]` and `finite` bool `[n]`.
        """
        import torch
        from torch.nn.functional import pad

        scores = self._suppress_overlaps(candidates, self._mask_unsuitable(candidates))
        # A stable sort keeps boxes with equal scores in the model's own order.
        scores, order = scores.sort(dim=1, descending=True, stable=True)
        scores, order = scores[:, : self.max_boxes], order[:, : self.max_boxes]
        free_slots = self.max_boxes - scores.shape[1]
        count = scores.isfinite().sum(dim=1, dtype=torch.int32)
        return {
            "boxes": pad(candidates.boxes.gather(1, order[..., None].expand(-1, -1, 4)), (0, 0, 0, free_slots)),
            "score": pad(scores, (0, free_slots)),
            "label_id": pad(candidates.labels.gather(1, order), (0, free_slots)).to(torch.int32),
            "order": pad(order, (0, free_slots)),
            "count": count,
            "finite": candidates.finite,
        }

    def _mask_unsuitable(self, candidates: BoxCandidates) -> torch.Tensor:
        """Return the scores, minus infinity for those below the threshold and for boxes that are not finite."""
        boxes, scores = candidates.boxes, candidates.scores
        suitable = scores.isfinite() & boxes.isfinite().all(dim=2) & (scores >= self.threshold)
        return scores.masked_fill(~suitable, float("-inf"))

    def _suppress_overlaps(self, candidates: BoxCandidates, scores: torch.Tensor) -> torch.Tensor:
        """Return the scores after non-maximum suppression, minus infinity for the boxes that it drops."""
        import torch
        from torchvision.ops import batched_nms

        if self.nms is None:
            return scores
        remaining = torch.full_like(scores, float("-inf"))
        for image, image_scores in enumerate(scores):
            boxes, labels = candidates.boxes[image], candidates.labels[image]
            indices = image_scores.isfinite().nonzero()[:, 0]
            kept = indices[batched_nms(boxes[indices], image_scores[indices], labels[indices], self.nms)]
            remaining[image, kept] = image_scores[kept]
        return remaining


def map_boxes_to_image(
    boxes: np.ndarray[Any, Any], geometries: Sequence[ImageGeometry], *, relative: bool
) -> tuple[np.ndarray[Any, Any], Mask]:
    """Map boxes from the model's input to the upright image.

    Example: an image of 400 pixels resized to 200 (scale 0.5), of which a crop cuts 20 pixels on the left: x 30 of the
    input is x (30 + 20) / 0.5 = 100 of the image.

    Args:
        boxes: Corners in the model's input, float32 `[n, k, 4]`.
        geometries: Position of the input within its image, one for each of the n images.
        relative: True if the corners are shares of the input's width and height, padding included; False for pixels.

    Returns:
        Corners in pixels of the image, clipped at its edges, float32 `[n, k, 4]`; and a mask, bool `[n, k]`, that is
        False for boxes wholly outside the image, in the padding.
    """
    if relative:
        input_sizes = [(g.input_width + g.pad_right, g.input_height + g.pad_below) for g in geometries]
        boxes = boxes * _pairs_for_corners(input_sizes)
    cut = _pairs_for_corners([(g.left, g.top) for g in geometries])
    scale = _pairs_for_corners([(g.scale_x, g.scale_y) for g in geometries])
    size = _pairs_for_corners([(g.width, g.height) for g in geometries])
    mapped = (boxes + cut) / scale
    inside = (mapped[..., 2:] >= 0).all(axis=2) & (mapped[..., :2] <= size[..., :2]).all(axis=2)
    return np.clip(mapped, 0, size).astype(np.float32), inside


def build_box_columns(
    tensors: Mapping[str, torch.Tensor],
    geometries: Sequence[ImageGeometry],
    labels: tuple[str, ...] | None,
    null_rows: Mask,
    *,
    relative: bool,
) -> tuple[Mask, list[pa.Array]]:
    """Build the columns of `BOX_FIELDS` for the boxes in the image, image after image.

    Args:
        tensors: Result of `BoxSelector`, on the host.
        geometries: See `map_boxes_to_image`.
        labels: Class names by id; None if there are none.
        null_rows: Images without boxes, bool `[n]`.
        relative: See `map_boxes_to_image`.

    Returns:
        The slots whose boxes are written, bool `[n, k]`, and the columns.
    """
    boxes, inside = map_boxes_to_image(tensors["boxes"].numpy(), geometries, relative=relative)
    scores = tensors["score"].numpy()
    # Of 4 slots with count 2 the first two hold a box.
    is_filled = np.arange(scores.shape[1]) < tensors["count"].numpy()[:, None]
    kept: Mask = inside & is_filled & ~null_rows[:, None]
    ids, corners = pa.array(tensors["label_id"].numpy()[kept]), boxes[kept]
    sides = [pa.array(corners[:, side].copy()) for side in range(4)]
    return kept, [ids, look_up_labels(labels, ids), pa.array(scores[kept]), *sides]


def _pairs_for_corners(pairs: Sequence[tuple[float, float]]) -> np.ndarray[Any, Any]:
    """Repeat an (x, y) pair of each image for both corners of its boxes: float64 `[n, 1, 4]`."""
    return np.tile(np.asarray(pairs, np.float64).reshape(-1, 1, 2), 2)
