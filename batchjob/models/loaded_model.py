"""What every model format hands over."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

if TYPE_CHECKING:
    from torch import nn

    from batchjob.preprocessing.settings import Preprocess

__all__ = ["LoadedModel"]


@dataclass(frozen=True)
class LoadedModel:
    """A model as every format hands it over.

    Attributes:
        module: in eval mode, on the CPU, no parameter wants a gradient.
        preprocess: what the weights bring themselves, or None where the job must say all of it.
        labels: class names by id, where the weights bring them.
        digest: hex sha256 of the weight bytes, and of the user's source where there is some.
        takes: what the module is called with: one `batch` `[n, c, h, w]`, or a `list` of `n` images `[c, h, w]` that
            may differ in size.
        eager: an ordinary module, which may be moved, run under autocast, compiled and quantised. False: a graph or
            another runtime's session, run as it is.
        devices: types of device it runs on (`cpu`, `cuda`), or None for all.
        batch_size: the only number of images it takes at once, or None for any; short batches are padded.
    """

    module: nn.Module
    preprocess: Preprocess | None
    labels: tuple[str, ...] | None
    digest: str
    input_kind: Literal["batch", "list"] = "batch"
    eager: bool = True
    devices: tuple[str, ...] | None = None
    batch_size: int | None = None
