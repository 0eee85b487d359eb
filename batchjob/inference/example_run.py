"""Trial of a model on one and on two example images: its output, and the fewest images that a call may have."""

from __future__ import annotations

import logging
from dataclasses import dataclass
from typing import Any

import torch
from torch.utils._pytree import tree_leaves

from batchjob.errors import InvalidJob
from batchjob.inference.example_images import repeat_image, trim_output
from batchjob.inference.forward import ForwardPass
from batchjob.tasks.postprocess import EXAMPLE_ROWS

__all__ = ["ExampleRun", "run_example_images"]

_log = logging.getLogger(__name__)


@dataclass(frozen=True)
class ExampleRun:
    """Result of a trial.

    Attributes:
        output: Output of the model for `EXAMPLE_ROWS` copies of the example image.
        min_rows: Fewest images that a call of the model may have: 2 if it drops the batch dimension of one image, as
            `squeeze()` does, or fails on one; else 1.
    """

    output: Any
    min_rows: int = 1


def run_example_images(
    forward: ForwardPass, image: torch.Tensor, fixed_batch_size: int | None, one_by_one: bool
) -> ExampleRun:
    """Run a model for the first time, on as many images as its calls will have.

    Args:
        forward: Forward pass of the model, in the dtype of its weights.
        image: Prepared image `[c, h, w]`.
        fixed_batch_size: Only batch size that the model accepts; None for any.
        one_by_one: True if the job predicts one image at a time, so that no other batch size has to work.

    Raises:
        InvalidJob: The model fails.
    """
    if fixed_batch_size is not None:
        output = forward.run_example(repeat_image(image, fixed_batch_size))
        return ExampleRun(trim_output(output, fixed_batch_size, EXAMPLE_ROWS))
    if forward.input_kind == "list":
        return ExampleRun(forward.run_example(repeat_image(image, EXAMPLE_ROWS)))
    single, error = _try(forward, repeat_image(image, 1))
    if one_by_one and error is None and all(leaf.ndim and len(leaf) == 1 for leaf in _tensors_of(single)):
        return ExampleRun(trim_output(single, 1, EXAMPLE_ROWS))
    try:
        output = forward.run_example(repeat_image(image, EXAMPLE_ROWS))
    except InvalidJob as failure:
        raise (error or failure) if one_by_one else failure from failure
    if error is None and _has_equal_rows(output, single):
        return ExampleRun(output)
    reason = "drops the batch dimension of a single image (squeeze()?)" if error is None else "fails on a single image"
    _log.info("the model %s: single images are predicted as two", reason)
    return ExampleRun(output, min_rows=EXAMPLE_ROWS)


def _try(forward: ForwardPass, pixels: torch.Tensor) -> tuple[Any, InvalidJob | None]:
    try:
        return forward.run_example(pixels), None
    except InvalidJob as error:
        return None, error


def _has_equal_rows(output: Any, single: Any) -> bool:
    """Return True if the output for one image has the shapes of one row of the output for two.

    Example: `[2, 4]` and `[1, 4]` are equal, `[2, 4]` and `[4]` are not; nor are `[2]` and `[]`.
    """
    pairs, singles = _tensors_of(output), _tensors_of(single)
    return len(pairs) == len(singles) and all(
        tuple(one.shape) == (1, *pair.shape[1:])
        for pair, one in zip(pairs, singles, strict=True)
        if pair.ndim and len(pair) == EXAMPLE_ROWS
    )


def _tensors_of(output: Any) -> list[torch.Tensor]:
    return [leaf for leaf in tree_leaves(output) if isinstance(leaf, torch.Tensor)]
