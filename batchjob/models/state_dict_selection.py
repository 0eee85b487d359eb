"""Settings that select the state dict in a file of weights: `model.checkpoint`, its key, its prefix, EMA or plain."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field

from batchjob.settings import Settings

__all__ = ["StateDictSelection"]


class StateDictSelection(Settings):
    """Place of the weights in a file that holds more, such as a checkpoint of a trainer.

    Attributes:
        key: Key of the dict that holds the weights, with dots for nested ones (`callbacks.EMA.weights`), or a dot alone
            for the outermost dict; null to find the one that fits the model.
        strip: Prefix to cut from the names of the tensors (`model.`); names without it are left aside. An empty text
            cuts nothing; null finds the one that fits.
        prefer: Choice where both fit: `ema`, averaged weights (named `ema`, `swa`, `teacher`, `momentum`, `target` or
            the like), or `plain`, the others. Null refuses a file where two fit; `timm` takes what timm itself takes.
    """

    key: Annotated[str, Field(min_length=1)] | None = None
    strip: str | None = None
    prefer: Literal["ema", "plain"] | None = None
