"""How near a model's outputs are to those of the same model run another way, and whether that is near enough."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from batchjob.inference.execution_config import ExecutionConfig, Precision

if TYPE_CHECKING:
    import torch

__all__ = ["OutputComparison", "compare_outputs"]

_DEVIATION: dict[Precision, float] = {"fp32": 1e-3, "tf32": 1e-2, "bf16": 5e-2, "fp16": 1e-2}
_COSINE: dict[Precision, float] = {"fp32": 0.9999, "tf32": 0.999, "bf16": 0.99, "fp16": 0.999}
_EIGHT_BITS = 0.2, 0.97
_AGREEMENT = 0.99
_NOTHING = 1e-6
_UNDECIDED = 0.01  # of the largest value
_LIKELIEST = 5  # boxes of an image
_SAME_BOX = 0.9  # intersection over union
_SEEN_BOX = 0.3  # score from which a box must be found again


@dataclass(frozen=True)
class OutputComparison:
    """How far outputs are from the reference.

    Attributes:
        deviation: largest difference, over the largest magnitude of the reference.
        cosine: of the images' outputs, the smallest.
        agreement: share of the images with the same class (of those where the reference is decided), of the values
            that are no floats, or of the boxes of either that the other has too.
    """

    deviation: float
    cosine: float
    agreement: float

    def rejection(self, config: ExecutionConfig) -> str | None:
        """Why that is too far for a recipe, None where it is not."""
        most, least = _DEVIATION[config.precision], _COSINE[config.precision]
        if config.quantize != "none":
            most, least = _EIGHT_BITS
        if not self.deviation <= most:  # NaN is not
            return f"deviates by {self.deviation:.1e} of the largest value, {most:.0e} is allowed"
        if self.cosine < least:
            return f"cosine {self.cosine:.5f}, at least {least} is wanted"
        if self.agreement < _AGREEMENT:
            return f"agrees on {self.agreement:.1%}, at least {_AGREEMENT:.0%} is wanted"
        return None


def compare_outputs(reference: Any, output: Any, *, argmax_is_class: bool = True) -> OutputComparison:
    """Hold one output of a model against another: tensors, tuples, dicts, or lists of boxes with labels and scores.

    Args:
        classes: a table of numbers `[images, classes]` names a class by its largest; else only the numbers count.

    Raises:
        ValueError: they are not of the same form.
    """
    if _is_boxes(reference):
        return _boxes(reference, output)
    ours, theirs = list(_leaves(reference)), list(_leaves(output))
    if not ours:
        raise ValueError("gives no tensor that could be compared")
    if [leaf.shape for leaf in ours] != [leaf.shape for leaf in theirs]:
        raise ValueError(f"gives {[list(leaf.shape) for leaf in theirs]} for {[list(leaf.shape) for leaf in ours]}")
    each = [_leaf(a.detach().cpu(), b.detach().cpu(), argmax_is_class) for a, b in zip(ours, theirs, strict=True)]
    return OutputComparison(
        max((one.deviation for one in each), default=0.0),
        min((one.cosine for one in each), default=1.0),
        min((one.agreement for one in each), default=1.0),
    )


def _leaves(output: Any) -> Iterator[torch.Tensor]:
    import torch

    if isinstance(output, torch.Tensor):
        yield output if output.ndim else output[None]
    elif isinstance(output, Mapping):
        for value in output.values():
            yield from _leaves(value)
    elif isinstance(output, tuple | list):
        for value in output:
            yield from _leaves(value)


def _leaf(reference: torch.Tensor, output: torch.Tensor, classes: bool) -> OutputComparison:
    """Numbers by their size; classes, masks and counts by how many are the same."""
    if reference.is_floating_point() or reference.numel() == 0:
        return _tensors(reference.float(), output.float(), classes)
    return OutputComparison(0.0, 1.0, float((reference == output).float().mean()))


def _tensors(reference: torch.Tensor, output: torch.Tensor, classes: bool) -> OutputComparison:
    import torch

    if reference.numel() == 0:
        return OutputComparison(0.0, 1.0, 1.0)
    same = torch.where(reference == output, torch.zeros(()), reference - output)  # infinities may be alike too
    finite = reference[reference.isfinite()]
    scale = finite.abs().max().clamp_min(torch.finfo(torch.float32).tiny) if len(finite) else torch.ones(())
    a, b = ((made / scale).nan_to_num(0, 0, 0).reshape(len(made), -1) for made in (reference, output))
    alike = torch.nn.functional.cosine_similarity(a, b, dim=1)
    nothing = (a.norm(dim=1) < _NOTHING) & (b.norm(dim=1) < _NOTHING)  # two that are nothing point nowhere
    deviation = float((same / scale).abs().nan_to_num(torch.inf, torch.inf, torch.inf).max())
    named = classes and reference.ndim == 2
    agreement = _same_class(reference / scale, output / scale, deviation) if named else 1.0
    return OutputComparison(deviation, float(torch.where(nothing, torch.ones(()), alike).min()), agreement)


def _same_class(reference: torch.Tensor, output: torch.Tensor, noise: float) -> float:
    """Where the two likeliest classes are nearer to each other than rounding is large, no class is the right one."""
    if reference.shape[1] < 2:
        return 1.0
    best = reference.topk(2, dim=1).values
    decided = (best[:, 0] - best[:, 1]) > min(noise, _UNDECIDED)
    same = reference.argmax(1) == output.argmax(1)
    return float(same[decided].float().mean()) if bool(decided.any()) else 1.0


def _is_boxes(output: Any) -> bool:
    return isinstance(output, list | tuple) and all(
        isinstance(image, Mapping) and {"boxes", "labels", "scores"} <= image.keys() for image in output
    )


def _boxes(reference: Sequence[Mapping[str, Any]], output: Sequence[Mapping[str, Any]]) -> OutputComparison:
    pairs = list(zip(reference, output, strict=True))
    found = [_found(*pair) for pair in pairs] + [_found(*pair[::-1]) for pair in pairs]
    seen, again, worst = (sum(n for n, _, _ in found), sum(n for _, n, _ in found), max(w for _, _, w in found))
    return OutputComparison(worst, 1.0, again / seen if seen else 1.0)


def _found(reference: Mapping[str, Any], output: Mapping[str, Any]) -> tuple[int, int, float]:
    """Clear boxes of the reference, how many of them were found again, the largest difference of their scores."""
    from torchvision.ops import box_iou

    if len(reference["scores"]) == 0:
        return 0, 0, 0.0
    # A detector that is sure of nothing is still to find its likeliest boxes again.
    likeliest = reference["scores"].topk(min(_LIKELIEST, len(reference["scores"]))).values
    clear = reference["scores"] >= min(_SEEN_BOX, float(likeliest[-1]))
    if len(output["boxes"]) == 0:
        return int(clear.sum()), 0, 0.0
    overlap = box_iou(reference["boxes"][clear].float(), output["boxes"].float())
    overlap *= reference["labels"][clear][:, None] == output["labels"][None, :]
    best, which = overlap.max(dim=1)
    again = best >= _SAME_BOX
    apart = (reference["scores"][clear] - output["scores"][which]).abs()[again]
    return int(clear.sum()), int(again.sum()), float(apart.max()) if len(apart) else 0.0
