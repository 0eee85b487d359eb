"""Comparison of a model's outputs with those of the same model run another way, and the limits for each config."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from batchjob.inference.execution_config import ExecutionConfig, Precision

__all__ = ["Agreement", "OutputComparison", "compare_outputs", "measure_agreement"]

# Limits of each precision: the largest deviation and the smallest cosine similarity.
_MAX_DEVIATION: dict[Precision, float] = {"fp32": 1e-3, "tf32": 1e-2, "bf16": 5e-2, "fp16": 1e-2, "fp64": 1e-3}
_MIN_COSINE: dict[Precision, float] = {"fp32": 0.9999, "tf32": 0.999, "bf16": 0.99, "fp16": 0.999, "fp64": 0.9999}
_QUANTIZED_LIMITS = 0.2, 0.97
_MIN_AGREEMENT = 0.99

# Norm, relative to the largest value, below which a vector has no direction that could be compared.
_ZERO_NORM = 1e-6
# Distance of the two largest values, relative to the largest value, below which rounding decides the class.
_UNDECIDED_MARGIN = 0.01
# Distance of the two largest values of a row, relative to its range, below which they count as equal.
_NEAR_TIE = 1e-3
# Detections: boxes of an image that must be found again even if no score is high.
_TOP_BOXES = 5
# Detections: intersection over union from which two boxes are the same.
_SAME_BOX_IOU = 0.9
# Detections: score from which a box must be found again.
_MIN_SCORE = 0.3


@dataclass(frozen=True)
class OutputComparison:
    """Distance of outputs from the reference; the field names are keys of stored JSON.

    Attributes:
        deviation: Largest difference, divided by the largest magnitude of the reference.
        cosine: Smallest cosine similarity of an image's outputs with the reference.
        agreement: Share from 0 to 1 of images with the same class (of those where the reference is decided), of
            integer values that are equal, or of boxes of either side that the other one has too.
    """

    deviation: float
    cosine: float
    agreement: float

    def rejection(self, config: ExecutionConfig) -> str | None:
        """Return the reason why outputs under this config are too far from the reference; None if they are not."""
        max_deviation, min_cosine = _MAX_DEVIATION[config.precision], _MIN_COSINE[config.precision]
        if config.quantize != "none":
            max_deviation, min_cosine = _QUANTIZED_LIMITS
        if not self.deviation <= max_deviation:  # true of NaN too
            return f"deviates by {self.deviation:.1e} of the largest value, {max_deviation:.0e} is allowed"
        if self.cosine < min_cosine:
            return f"cosine {self.cosine:.5f}, at least {min_cosine} is wanted"
        if self.agreement < _MIN_AGREEMENT:
            return f"agrees on {self.agreement:.1%}, at least {_MIN_AGREEMENT:.0%} is wanted"
        return None


@dataclass(frozen=True)
class Agreement:
    """Things in two outputs that can only be equal or not, counted over all images.

    Attributes:
        things: Noun of what is compared: `image` (its class), `box`, or `value` (integers).
        same: Things that are equal.
        compared: Things that were compared.
        undecided: Images left out, whose two largest outputs are nearly equal, so that rounding decides their class.
    """

    things: str
    same: int
    compared: int
    undecided: int = 0

    @property
    def share(self) -> float | None:
        """Share of equal things from 0 to 1; None if nothing could be compared."""
        return self.same / self.compared if self.compared else None

    def describe(self) -> str:
        """Return the counts in words: `29 of 31 images keep their class (93.5%), 1 is undecided`."""
        plural = {"box": "boxes"}.get(self.things, f"{self.things}s")
        verb = "keep their class" if self.things == "image" else "are the same"
        share = "" if self.share is None else f" ({self.share:.1%})"
        undecided = f", {self.undecided} undecided (two classes nearly equal)" if self.undecided else ""
        return f"{self.same} of {self.compared} {plural} {verb}{share}{undecided}"


def measure_agreement(reference: Any, output: Any, *, argmax_is_class: bool) -> Agreement | None:
    """Count classes, boxes or integers that are equal in two outputs; None if the outputs hold nothing of that kind.

    Args:
        reference: Output of the model run in the plain way.
        output: Output of the model run in another way, for the same images.
        argmax_is_class: See `compare_outputs`.
    """
    if _is_detections(reference):
        boxes, matched, _ = _count_matches(reference, output)
        return Agreement("box", matched, boxes)
    pairs = list(zip(_tensors_of(reference), _tensors_of(output), strict=True))
    for expected, actual in pairs:
        if argmax_is_class and expected.is_floating_point() and expected.ndim == 2 and expected.shape[1] > 1:
            return _count_classes(expected.detach().cpu().float(), actual.detach().cpu().float())
    integers = [(expected, actual) for expected, actual in pairs if not expected.is_floating_point()]
    if not integers:
        return None
    same = sum(int((expected == actual).sum()) for expected, actual in integers)
    return Agreement("value", same, sum(expected.numel() for expected, _ in integers))


def compare_outputs(reference: Any, output: Any, *, argmax_is_class: bool = True) -> OutputComparison:
    """Compare two outputs of a model: tensors, tuples, dicts, or lists of boxes with labels and scores.

    Args:
        reference: Output of the model run in the plain way.
        output: Output of the model run in another way, for the same images.
        argmax_is_class: In a float tensor `[images, classes]` the largest value of a row is its class, and classes
            must agree; else only the values are compared.

    Raises:
        ValueError: The outputs have different structures or shapes, or hold no tensor.
    """
    if _is_detections(reference):
        return _compare_detections(reference, output)
    expected, actual = list(_tensors_of(reference)), list(_tensors_of(output))
    if not expected:
        raise ValueError("gives no tensor that could be compared")
    if [tensor.shape for tensor in expected] != [tensor.shape for tensor in actual]:
        raise ValueError(
            f"gives {[list(tensor.shape) for tensor in actual]} for {[list(tensor.shape) for tensor in expected]}"
        )
    comparisons = [
        _compare_tensors(a.detach().cpu(), b.detach().cpu(), argmax_is_class)
        for a, b in zip(expected, actual, strict=True)
    ]
    return OutputComparison(
        max((one.deviation for one in comparisons), default=0.0),
        min((one.cosine for one in comparisons), default=1.0),
        min((one.agreement for one in comparisons), default=1.0),
    )


def _tensors_of(output: Any) -> Iterator[torch.Tensor]:
    if isinstance(output, torch.Tensor):
        yield output if output.ndim else output[None]
    elif isinstance(output, Mapping):
        for value in output.values():
            yield from _tensors_of(value)
    elif isinstance(output, tuple | list):
        for value in output:
            yield from _tensors_of(value)


def _compare_tensors(reference: torch.Tensor, output: torch.Tensor, argmax_is_class: bool) -> OutputComparison:
    """Compare floats by their distance; integers (classes, masks, counts) by the share that is equal."""
    if reference.is_floating_point() or reference.numel() == 0:
        return _compare_floats(reference.float(), output.float(), argmax_is_class)
    return OutputComparison(0.0, 1.0, float((reference == output).float().mean()))


def _compare_floats(reference: torch.Tensor, output: torch.Tensor, argmax_is_class: bool) -> OutputComparison:
    if reference.numel() == 0:
        return OutputComparison(0.0, 1.0, 1.0)
    # Equal infinities have no difference, where subtraction would give NaN.
    difference = torch.where(reference == output, torch.zeros(()), reference - output)
    finite = reference[reference.isfinite()]
    scale = finite.abs().max().clamp_min(torch.finfo(torch.float32).tiny) if len(finite) else torch.ones(())
    a, b = ((values / scale).nan_to_num(0, 0, 0).reshape(len(values), -1) for values in (reference, output))
    cosine = torch.nn.functional.cosine_similarity(a, b, dim=1)
    both_zero = (a.norm(dim=1) < _ZERO_NORM) & (b.norm(dim=1) < _ZERO_NORM)
    deviation = float((difference / scale).abs().nan_to_num(torch.inf, torch.inf, torch.inf).max())
    has_classes = argmax_is_class and reference.ndim == 2
    agreement = _class_agreement(reference / scale, output / scale, deviation) if has_classes else 1.0
    return OutputComparison(deviation, float(torch.where(both_zero, torch.ones(()), cosine).min()), agreement)


def _class_agreement(reference: torch.Tensor, output: torch.Tensor, noise: float) -> float:
    """Return the share of rows with the same class, among those whose two largest values differ by more than noise.

    Example: of the rows `[1.0, 0.5]` and `[0.7, 0.7001]` of the reference only the first counts.
    """
    if reference.shape[1] < 2:
        return 1.0
    largest = reference.topk(2, dim=1).values
    decided = (largest[:, 0] - largest[:, 1]) > min(noise, _UNDECIDED_MARGIN)
    same = reference.argmax(1) == output.argmax(1)
    return float(same[decided].float().mean()) if bool(decided.any()) else 1.0


def _count_classes(reference: torch.Tensor, output: torch.Tensor) -> Agreement:
    """Count the images that keep their class.

    Example: the row `[0.9, 0.1, 0.0]` is decided; `[0.5, 0.4999, 0.0]` is not, its margin is 0.0002 of its range.
    """
    largest = reference.topk(2, dim=1).values
    spread = (reference.amax(1) - reference.amin(1)).clamp_min(torch.finfo(torch.float32).tiny)
    decided = (largest[:, 0] - largest[:, 1]) > _NEAR_TIE * spread
    same = reference.argmax(1) == output.argmax(1)
    return Agreement("image", int(same[decided].sum()), int(decided.sum()), int((~decided).sum()))


def _is_detections(output: Any) -> bool:
    return isinstance(output, list | tuple) and all(
        isinstance(image, Mapping) and {"boxes", "labels", "scores"} <= image.keys() for image in output
    )


def _compare_detections(
    reference: Sequence[Mapping[str, Any]], output: Sequence[Mapping[str, Any]]
) -> OutputComparison:
    """Look for the boxes of each side on the other one, so that missing and additional boxes both count."""
    boxes, matched, score_difference = _count_matches(reference, output)
    return OutputComparison(score_difference, 1.0, matched / boxes if boxes else 1.0)


def _count_matches(
    reference: Sequence[Mapping[str, Any]], output: Sequence[Mapping[str, Any]]
) -> tuple[int, int, float]:
    """Return the boxes of both sides, those found on the other side, and the largest difference of their scores."""
    pairs = list(zip(reference, output, strict=True))
    matches = [_match_boxes(*pair) for pair in pairs] + [_match_boxes(*pair[::-1]) for pair in pairs]
    boxes, matched = sum(count for count, _, _ in matches), sum(count for _, count, _ in matches)
    return boxes, matched, max(difference for _, _, difference in matches)


def _match_boxes(reference: Mapping[str, Any], output: Mapping[str, Any]) -> tuple[int, int, float]:
    """Match the boxes of one image by overlap and label.

    Returns:
        Boxes of the reference that count, boxes of those that were found, and the largest difference of their scores.
    """
    from torchvision.ops import box_iou

    if len(reference["scores"]) == 0:
        return 0, 0, 0.0
    # The best boxes of a detector must be found again even if all its scores are low.
    top_scores = reference["scores"].topk(min(_TOP_BOXES, len(reference["scores"]))).values
    counted = reference["scores"] >= min(_MIN_SCORE, float(top_scores[-1]))
    if len(output["boxes"]) == 0:
        return int(counted.sum()), 0, 0.0
    overlap = box_iou(reference["boxes"][counted].float(), output["boxes"].float())
    overlap *= reference["labels"][counted][:, None] == output["labels"][None, :]
    best, index = overlap.max(dim=1)
    found = best >= _SAME_BOX_IOU
    differences = (reference["scores"][counted] - output["scores"][index]).abs()[found]
    return int(counted.sum()), int(found.sum()), float(differences.max()) if len(differences) else 0.0
