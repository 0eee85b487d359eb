"""Select one output of a model that returns several, by key or by index."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Annotated, Any

from pydantic import Field

from batchjob.errors import InvalidJob
from batchjob.settings import Settings
from batchjob.text import with_article

if TYPE_CHECKING:
    from torch import nn

__all__ = ["OutputSelection", "select_output"]

OutputKey = Annotated[int, Field(ge=0)] | Annotated[str, Field(min_length=1)]


class OutputSelection(Settings):
    """Settings of a model that may return more than one output.

    Attributes:
        output: Output that the task gets: a key of a dict, an attribute of an object (a dataclass, a named tuple), or
            an index from 0 of a tuple; null for a model with one.
    """

    output: OutputKey | None = None


def select_output(module: nn.Module, output: str | int | None) -> nn.Module:
    """Wrap a module so that it returns one of its outputs.

    Args:
        module: Module in eval mode.
        output: Key or index of the output; None returns the module unchanged.

    Raises:
        InvalidJob: In the forward pass of the result: the module returns no such output.
    """
    import torch

    if output is None:
        return module
    key = output

    class OutputSelector(torch.nn.Module):
        """Run `module` and return one of its outputs."""

        def __init__(self) -> None:
            super().__init__()
            self.module = module

        def forward(self, *inputs: Any) -> Any:
            return _get_output(self.module(*inputs), key)

    return OutputSelector().eval()


def _get_output(outputs: Any, key: str | int) -> Any:
    if isinstance(outputs, Mapping) and key in outputs:
        return outputs[key]
    if isinstance(outputs, tuple | list) and isinstance(key, int) and key < len(outputs):
        return outputs[key]
    if isinstance(key, str) and key in getattr(outputs, "_fields", ()):  # a named tuple
        return getattr(outputs, key)
    if isinstance(key, str) and _has_own_attribute(outputs, key):
        return getattr(outputs, key)
    raise InvalidJob(f"model.output is {key!r}, but the model returns {_describe_outputs(outputs)}")


def _has_own_attribute(outputs: Any, name: str) -> bool:
    """Check that an object, such as a dataclass, has a value of this name: no method, and no attribute of a tensor."""
    import torch

    if isinstance(outputs, torch.Tensor | Mapping | tuple | list) or not hasattr(outputs, name):
        return False
    return not callable(getattr(outputs, name))


def _describe_outputs(outputs: Any) -> str:
    if outputs is None:
        return "None; correct its forward()"
    if isinstance(outputs, Mapping):
        return f"a dict with the keys {', '.join(map(repr, outputs))}; name one of them"
    if isinstance(outputs, tuple | list):
        fields = getattr(outputs, "_fields", None)
        names = f" ({', '.join(fields)})" if fields else ""
        kind = with_article(type(outputs).__name__)
        return f"{kind} of {len(outputs)}{names}; write a number from 0 to {len(outputs) - 1}"
    attributes = _list_tensor_attributes(outputs)
    if attributes:
        return f"{with_article(type(outputs).__name__)} with the attributes {', '.join(attributes)}; name one of them"
    return f"one {type(outputs).__name__}; leave model.output out"


def _list_tensor_attributes(outputs: Any) -> list[str]:
    """List the attributes that hold tensors, of an object such as a dataclass."""
    import torch

    if isinstance(outputs, torch.Tensor):
        return []
    return [name for name, value in getattr(outputs, "__dict__", {}).items() if isinstance(value, torch.Tensor)]
