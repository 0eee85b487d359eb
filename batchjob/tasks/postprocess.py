"""What every task makes of a model's output, batch by batch; and what they all say of rows that are not finite."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, Protocol

import pyarrow as pa

from batchjob.errors import InvalidJob
from batchjob.preprocessing.geometry import ImageGeometry
from batchjob.types import ErrorRecord

if TYPE_CHECKING:
    import numpy as np
    import torch

__all__ = [
    "EXAMPLE_ROWS",
    "Postprocess",
    "check_row_shape",
    "describe_output",
    "finite_mask",
    "nonfinite_errors",
    "require_float_output",
]

EXAMPLE_ROWS = 2
"""Images in the example batch whose output `prepare` is given: enough to tell the batch dimension from the others."""
_NOT_FINITE = ErrorRecord(
    "predict", "not_finite", "the model's output for this image is NaN or infinite; task.allow_nan: true lets it pass"
)


class Postprocess(Protocol):
    """A task that has seen what its model gives out.

    Attributes:
        fields: the Arrow columns it makes, all nullable; always the same.
        truths: the passthrough columns that hold what is right, where the job names some.
    """

    @property
    def fields(self) -> list[pa.Field]: ...

    @property
    def truth_columns(self) -> tuple[str, ...]: ...

    def on_device(self, output: Any) -> dict[str, torch.Tensor]:
        """The few numbers worth carrying to the host; first dimension n. `finite` (bool `[n]`) is among them."""

    def columns(self, tensors: dict[str, torch.Tensor], geometries: Sequence[ImageGeometry]) -> list[pa.Array]:
        """`fields` as arrays of n rows, from what `on_device` gave, on the host; they may share its memory.

        `frames` say, row by row, where the model's input lay in its image.

        Rows that are not finite are null, or as far as NaN goes, where the job lets them pass.
        """

    def find_errors(self, tensors: dict[str, torch.Tensor]) -> list[ErrorRecord | None]:
        """Per row, what makes it an error row; n of them. Asked after `columns`, of the same tensors."""

    def sum_metrics(self, rows: pa.RecordBatch) -> dict[str, float]:
        """How right finished rows without errors are, against their columns `truths`: sums that add up over batches.

        Few enough for a part's footer. Rows whose truth is null do not count.
        """


def nonfinite_errors(tensors: Mapping[str, torch.Tensor], allow_nan: bool) -> list[ErrorRecord | None]:
    """A fault for each row that is not finite; none where the job lets them pass."""
    finite = tensors["finite"]
    if allow_nan or bool(finite.all()):
        return [None] * len(finite)
    return [None if row else _NOT_FINITE for row in finite.tolist()]


def finite_mask(tensors: Mapping[str, torch.Tensor]) -> np.ndarray[Any, np.dtype[np.bool_]]:
    """`finite` as an array, bool `[n]`."""
    rows: np.ndarray[Any, np.dtype[np.bool_]] = tensors["finite"].numpy()
    return rows


def require_float_output(output: Any, expected: str, advice: str) -> torch.Tensor:
    """`output` where it is a tensor of floats with the example's rows first. Raises InvalidJob naming what came."""
    import torch

    said = f"the model gives {describe_output(output)} for a batch of {EXAMPLE_ROWS}, but {expected}"
    if output is None:
        raise InvalidJob(f"{said}; return something from its forward(), or {advice}")
    if not isinstance(output, torch.Tensor):
        raise InvalidJob(f"{said}; pick one of several with model.output, or {advice}")
    if not output.is_floating_point():
        raise InvalidJob(f"{said} of floating point numbers; {advice}")
    if output.ndim == 0 or output.shape[0] != EXAMPLE_ROWS:
        raise InvalidJob(f"{said}, a row for each image; {advice}")
    return output


def check_row_shape(output: torch.Tensor, shape: Sequence[int]) -> None:
    """Raises InvalidJob where a row has another shape than in the example batch: images of another size may do that."""
    if tuple(output.shape[1:]) != tuple(shape):
        raise InvalidJob(
            f"the model gives {list(output.shape[1:])} for an image where it gave {list(shape)} for the first; "
            "bring all images to one size (preprocess.resize, preprocess.crop)"
        )


def describe_output(output: Any) -> str:
    """`float32 [2, 10]`, or what else it is and holds."""
    import torch

    if output is None:
        return "None"
    if isinstance(output, torch.Tensor):
        return f"{str(output.dtype).removeprefix('torch.')} {list(output.shape)}"
    kind = type(output).__name__
    if isinstance(output, Mapping):
        return f"a {kind} with the keys {', '.join(map(str, list(output)[:8]))}"
    if isinstance(output, tuple | list):
        return f"a {kind} of {len(output)} ({', '.join(describe_output(part) for part in output[:4])})"
    return f"a {kind}"
