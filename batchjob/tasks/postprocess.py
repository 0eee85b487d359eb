"""Base of a task at work: reduce a batch of model output on the device, then build Arrow columns on the host."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, ClassVar

import numpy as np
import pyarrow as pa

from batchjob.types import ErrorRecord

if TYPE_CHECKING:
    import torch

    from batchjob.preprocessing.geometry import ImageGeometry

__all__ = ["EXAMPLE_ROWS", "Mask", "Postprocess"]

EXAMPLE_ROWS = 2
"""Images in the example batch for `build_postprocess`: enough to tell the batch dimension from the others."""
Mask = np.ndarray[Any, np.dtype[np.bool_]]
_NOT_FINITE = ErrorRecord(
    "predict", "not_finite", "the model's output for this image is NaN or infinite; task.allow_nan: true lets it pass"
)


class Postprocess(ABC):
    """A task that knows the output of its model.

    For each batch the worker calls `on_device`, copies the tensors to the host, and calls `columns` and then
    `find_errors` with them. It calls `sum_metrics` with the finished rows if there are `truth_columns`.

    Example: classification with `top_k: 1` over 3 classes, a batch of 2 images, the second one NaN:

        on_device(logits [2, 3])     {"label_id": [[2], [0]], "score": [[0.9], [nan]], "finite": [True, False]}
        columns(tensors, geometries) label_id [2, null], label ["fish", null], score [0.9, null], top_k [[…], null]
        find_errors(tensors)         [None, ErrorRecord("predict", "not_finite", …)]

    Attributes:
        allow_nan: True accepts rows that are not finite.
        truth_columns: Passthrough columns that hold the ground truth; empty if the job names none.
        names_images: True if the geometries for `columns` must have URI and passthrough columns of the image.
    """

    allow_nan: bool
    truth_columns: tuple[str, ...] = ()
    names_images: ClassVar[bool] = False

    @property
    @abstractmethod
    def fields(self) -> list[pa.Field]:
        """Arrow fields of the columns it builds, all nullable; always the same."""

    @abstractmethod
    def on_device(self, output: Any) -> dict[str, torch.Tensor]:
        """Reduce the output of n images to the tensors that are worth copying to the host.

        The first dimension of each tensor is n. `finite`, bool `[n]`, is one of them.
        """

    @abstractmethod
    def columns(self, tensors: dict[str, torch.Tensor], geometries: Sequence[ImageGeometry]) -> list[pa.Array]:
        """Build the columns of `fields`, n rows each. They may share memory with the tensors.

        Rows that are not finite are null; with `allow_nan`, only the values that NaN leaves undefined.

        Args:
            tensors: Result of `on_device`, on the host.
            geometries: Position of the model's input within its image, one per row.
        """

    def find_errors(self, tensors: dict[str, torch.Tensor]) -> list[ErrorRecord | None]:
        """Return the error of each of the n rows, None for good rows; by default, rows that are not finite are errors.

        Called after `columns`, with the same tensors.
        """
        return [_NOT_FINITE if is_null else None for is_null in self.null_rows(tensors).tolist()]

    def sum_metrics(self, rows: pa.RecordBatch) -> dict[str, float]:  # noqa: ARG002 - not every task has metrics
        """Compare finished rows with their ground truth, as sums that can be added up over batches and parts.

        Must stay few enough for the footer of a part. Rows whose ground truth is null do not count.

        Args:
            rows: Rows without errors: the columns of `fields` and the `truth_columns`.
        """
        return {}

    def null_rows(self, tensors: dict[str, torch.Tensor]) -> Mask:
        """Return the rows to leave null, bool `[n]`: those that are not finite, or none with `allow_nan`."""
        finite: Mask = tensors["finite"].numpy()
        return np.zeros_like(finite) if self.allow_nan else ~finite
