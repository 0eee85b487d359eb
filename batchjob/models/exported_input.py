"""What a graph takes that was fixed when it was exported: one batch of float32 images, of some sizes only."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from batchjob.errors import InvalidJob

if TYPE_CHECKING:
    import torch

__all__ = ["ExportedInput"]


@dataclass(frozen=True)
class ExportedInput:
    """The one input of a graph. Raises InvalidJob where it is no batch of float32 images.

    Attributes:
        shape: `(n, c, h, w)`, None for what may vary.
        dtype: as torch prints it.
        where: key and file, for sentences.
    """

    shape: tuple[int | None, ...]
    dtype: str
    where: str

    def __post_init__(self) -> None:
        if len(self.shape) != 4:
            raise InvalidJob(
                f"{self.where} takes {self._said(self.shape)}, not images [n, c, h, w]; export it for these"
            )
        if self.dtype != "torch.float32":
            raise InvalidJob(
                f"{self.where} takes {self.dtype} pixels; export it with an example input of torch.float32"
            )

    @property
    def batch_size(self) -> int | None:
        """The only number of images it takes at once, or None."""
        return self.shape[0]

    def check(self, pixels: torch.Tensor) -> None:
        """Raises InvalidJob where pixels have another shape: a compiled graph would read beyond them."""
        if len(pixels.shape) == 4 and all(
            want in {None, have} for want, have in zip(self.shape, pixels.shape, strict=True)
        ):
            return
        raise InvalidJob(
            f"{self.where} takes {self._said(self.shape)} and got {self._said(tuple(pixels.shape))}; correct "
            "preprocess.resize and crop, or export it for these sizes"
        )

    @staticmethod
    def _said(shape: tuple[int | None, ...]) -> str:
        return "[" + ", ".join("any" if size is None else str(size) for size in shape) + "]"
