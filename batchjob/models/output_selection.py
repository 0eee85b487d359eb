"""One tensor out of a model that returns several: by name, or by place."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Annotated, Any

from pydantic import Field

from batchjob.errors import InvalidJob
from batchjob.settings import Settings

if TYPE_CHECKING:
    from torch import nn

__all__ = ["OutputSelection", "select_output"]

OutputKey = Annotated[int, Field(ge=0)] | Annotated[str, Field(min_length=1)]


class OutputSelection(Settings):
    """Settings of a model that may return more than one thing.

    Attributes:
        output: which of them the task gets: a key where it returns a dict, a number from 0 where it returns a tuple.
    """

    output: OutputKey | None = None


def select_output(module: nn.Module, output: str | int | None) -> nn.Module:
    """The module, returning only that output; as it is where `output` is None. Fails with InvalidJob when it runs."""
    import torch

    if output is None:
        return module
    wanted = output

    class Selected(torch.nn.Module):
        """Runs `module` and returns one of its outputs."""

        def __init__(self) -> None:
            super().__init__()
            self.module = module

        def forward(self, *inputs: Any) -> Any:
            return _picked(self.module(*inputs), wanted)

    return Selected().eval()


def _picked(returned: Any, output: str | int) -> Any:
    if isinstance(returned, Mapping) and output in returned:
        return returned[output]
    if isinstance(returned, tuple | list) and isinstance(output, int) and output < len(returned):
        return returned[output]
    if isinstance(output, str) and output in getattr(returned, "_fields", ()):
        return getattr(returned, output)
    raise InvalidJob(f"model.output is {output!r}, but the model returns {_offer(returned)}")


def _offer(returned: Any) -> str:
    if returned is None:
        return "None; correct its forward()"
    if isinstance(returned, Mapping):
        return f"a dict with the keys {', '.join(map(repr, returned))}; name one of them"
    if isinstance(returned, tuple | list):
        fields = getattr(returned, "_fields", None)
        names = f" ({', '.join(fields)})" if fields else ""
        return f"a {type(returned).__name__} of {len(returned)}{names}; write a number from 0 to {len(returned) - 1}"
    return f"one {type(returned).__name__}; leave model.output out"
