"""Input of a graph that was fixed at export: one batch of float32 images, each dimension fixed or free."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from batchjob.errors import InvalidJob

if TYPE_CHECKING:
    import torch

__all__ = ["ExportedInput"]


@dataclass(frozen=True)
class ExportedInput:
    """Only input of an exported graph.

    Attributes:
        shape: `(n, c, h, w)`, with None for a free dimension: `(None, 3, 224, 224)` takes any number of images.
        dtype: Element type in the notation of torch: "torch.float32".
        where: Job key and file, the start of error messages.

    Raises:
        InvalidJob: The input is not a batch of float32 images.
    """

    shape: tuple[int | None, ...]
    dtype: str
    where: str

    def __post_init__(self) -> None:
        if len(self.shape) != 4:
            raise InvalidJob(
                f"{self.where} takes {_format_shape(self.shape)}, not images [n, c, h, w]; export it for these"
            )
        if self.dtype != "torch.float32":
            raise InvalidJob(
                f"{self.where} takes {self.dtype} pixels; export it with an example input of torch.float32"
            )

    @property
    def batch_size(self) -> int | None:
        """Only batch size that the graph accepts, in images; None for any."""
        return self.shape[0]

    def check(self, pixels: torch.Tensor) -> None:
        """Check the shape of a batch. A compiled graph does not, and would read beyond the end of the tensor.

        Raises:
            InvalidJob: The batch has another shape.
        """
        if len(pixels.shape) == 4 and all(
            expected in {None, actual} for expected, actual in zip(self.shape, pixels.shape, strict=True)
        ):
            return
        raise InvalidJob(
            f"{self.where} takes {_format_shape(self.shape)} and got {_format_shape(tuple(pixels.shape))}; correct "
            "preprocess.resize and crop, or export it for these sizes"
        )


def _format_shape(shape: tuple[int | None, ...]) -> str:
    return "[" + ", ".join("any" if size is None else str(size) for size in shape) + "]"
