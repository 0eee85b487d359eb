"""Structure of a model's output: a tensor, or a dict or a tuple of tensors, taken apart for the copy to the host."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from batchjob.errors import InvalidJob
from batchjob.tasks.model_output import widen_half_precision

if TYPE_CHECKING:
    import torch

__all__ = ["OutputStructure", "infer_structure", "pack_parts", "unpack_parts"]


@dataclass(frozen=True)
class OutputStructure:
    """Functions that take an output apart into tensors, and put it together again.

    Example: for `{"a": x, "b": y}`, `flatten` returns `[x, y]` and `unflatten([x, y])` returns the dict again.

    Attributes:
        names: Name of each tensor: the key of a dict, the field of a named tuple, else `output` or `output_<index>`.
        flatten: Returns the tensors of an output.
        unflatten: Returns the output of these tensors.
    """

    names: tuple[str, ...]
    flatten: Callable[[Any], list[Any]]
    unflatten: Callable[[list[torch.Tensor]], Any]


def infer_structure(output: Any, message: str, advice: str) -> OutputStructure:
    """Infer the structure of an output from an example.

    Args:
        output: Output for `EXAMPLE_ROWS` images.
        message: First half of the message, as by `describe_mismatch`.
        advice: What the user can do, for the message.

    Raises:
        InvalidJob: If the output is anything else, or is empty.
    """
    import torch

    if isinstance(output, torch.Tensor):
        return OutputStructure(("output",), lambda whole: [whole], lambda parts: parts[0])
    if isinstance(output, Mapping) and output:
        keys = list(output)
        return OutputStructure(
            tuple(map(str, keys)),
            lambda whole: [whole[key] for key in keys],
            lambda parts: dict(zip(keys, parts, strict=True)),
        )
    if isinstance(output, tuple | list) and output:
        names = getattr(output, "_fields", None) or (f"output_{index}" for index in range(len(output)))
        # A named tuple is built by its _make, other sequences by their type.
        return OutputStructure(tuple(names), list, getattr(type(output), "_make", type(output)))
    hint = "return something from its forward(), or " if output is None else ""
    raise InvalidJob(f"{message}; {hint}{advice}")


def pack_parts(parts: Sequence[torch.Tensor]) -> dict[str, torch.Tensor]:
    """Return tensors of n rows each under their index `0`, `1`, …, with `finite` bool `[n]` over all of them."""
    import torch

    finite = torch.ones(len(parts[0]), dtype=torch.bool, device=parts[0].device)
    for part in parts:
        if part.is_floating_point() and part.numel():
            finite &= part.isfinite().reshape(len(part), -1).all(dim=1).to(finite.device)
    return {str(index): widen_half_precision(part) for index, part in enumerate(parts)} | {"finite": finite}


def unpack_parts(tensors: Mapping[str, torch.Tensor]) -> list[torch.Tensor]:
    """Return the tensors that `pack_parts` got, on the host."""
    return [tensors[str(index)] for index in range(len(tensors) - 1)]
