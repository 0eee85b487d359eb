"""What every model format hands over."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from torch import nn

    from batchjob.records import Preprocess

__all__ = ["LoadedModel"]


@dataclass(frozen=True)
class LoadedModel:
    """A model as every format hands it over.

    Attributes:
        module: in eval mode, on the CPU, no parameter wants a gradient.
        preprocess: what the weights bring themselves, or None where the job must say all of it.
        labels: class names by id, where the weights bring them.
        digest: hex sha256 of the weight bytes, and of the user's source where there is some.
    """

    module: nn.Module
    preprocess: Preprocess | None
    labels: tuple[str, ...] | None
    digest: str
