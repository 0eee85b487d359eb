"""Doubts about a model or transform that works: rows that depend on chance or on their batch, or hold no numbers."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise
from typing import Any

import torch
from torch import nn
from torch.utils._pytree import tree_leaves

from batchjob.tasks.postprocess import EXAMPLE_ROWS

__all__ = ["doubt_model", "doubt_transform"]

# Copies of one image in one batch differ by rounding, also in half precision, but by no more than this part of the
# largest output.
_ROUNDING = 0.05


def doubt_model(module: nn.Module, output: Any) -> list[str]:
    """Return sentences on what a module can hardly be meant to do.

    Args:
        module: Module in eval mode, after it has run.
        output: Its output for `EXAMPLE_ROWS` copies of an image.
    """
    tensors = [
        leaf.float()
        for leaf in tree_leaves(output)
        if isinstance(leaf, torch.Tensor) and leaf.is_floating_point() and leaf.shape[:1] == (EXAMPLE_ROWS,)
    ]
    if any(bool(tensor.isnan().any()) for tensor in tensors):
        return ["doubt: the model gives NaN for an example image; look at its weights, and at preprocess.mean and std"]
    layers = [name for name, layer in module.named_modules() if layer.training and _depends_on_mode(layer)]
    if layers:
        text = (
            f"doubt: {layers[0]} computes in training mode, so that rows depend on chance or on the rest of their batch"
        )
        return [f"{text}; take train() out of the model's code"]
    if any(_has_unequal_rows(tensor) for tensor in tensors):
        text = "doubt: the model gives one image two different rows in one batch, so that rows depend on chance"
        return [f"{text} (dropout?), or on their place in the batch"]
    return []


def doubt_transform(samples: Sequence[torch.Tensor]) -> list[str]:
    """Return a sentence if the user's transform has made different pixels of one image.

    Args:
        samples: What it has made of one image, several times.
    """
    if all(first.shape == second.shape and torch.equal(first, second) for first, second in pairwise(samples)):
        return []
    text = "doubt: preprocess.transform is random: it makes other pixels of the same image each time, as for training"
    return [f"{text}; name the transform for evaluation"]


def _depends_on_mode(layer: nn.Module) -> bool:
    return isinstance(layer, nn.modules.batchnorm._BatchNorm | nn.modules.dropout._DropoutNd)


def _has_unequal_rows(tensor: torch.Tensor) -> bool:
    finite = tensor.nan_to_num()
    return bool((finite[0] - finite[1:]).abs().max() > _ROUNDING * finite.abs().max())
