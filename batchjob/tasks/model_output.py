"""Checks of a model's output, with messages that say what the model gives and what the task expects."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from batchjob.errors import InvalidJob
from batchjob.tasks.postprocess import EXAMPLE_ROWS
from batchjob.text import with_article

if TYPE_CHECKING:
    import torch

__all__ = [
    "check_row_shape",
    "count_classes",
    "describe_mismatch",
    "describe_output",
    "output_format_error",
    "require_float_output",
    "widen_half_precision",
]

_SHOWN_KEYS = 8
_SHOWN_ITEMS = 4


def require_float_output(output: Any, expected: str, advice: str) -> torch.Tensor:
    """Return the output of the example batch if it is a float tensor `[EXAMPLE_ROWS, …]`.

    Args:
        output: Output of the model.
        expected: The output that the task expects, for the message.
        advice: What the user can do, for the message.

    Raises:
        InvalidJob: If it is anything else.
    """
    import torch

    message = describe_mismatch(output, expected)
    if output is None:
        raise InvalidJob(f"{message}; return something from its forward(), or {advice}")
    if not isinstance(output, torch.Tensor):
        raise InvalidJob(f"{message}; {_suggest_output(output)}, or {advice}")
    if not output.is_floating_point():
        raise InvalidJob(f"{message} of floating point numbers; {advice}")
    if output.ndim == 0 or output.shape[0] != EXAMPLE_ROWS:
        raise InvalidJob(f"{message}; {_explain_rows(output, advice)}")
    return output


def count_classes(output: Any, top_k: int | None, expected: str, advice: str) -> int:
    """Return the number of classes in an output `[n, classes]` of the example batch.

    Args:
        output: Output of the model.
        top_k: Number of classes in a row that the job asks for; None if it does not say.
        expected: The output that the task expects, for the message.
        advice: What the user can do, for the message.

    Raises:
        InvalidJob: If it is anything else, or has less than `top_k` classes.
    """
    logits = require_float_output(output, expected, advice)
    if logits.ndim != 2 or not logits.shape[1]:
        raise InvalidJob(f"the model gives {list(logits.shape)} for {len(logits)} images, but {expected}; {advice}")
    classes = logits.shape[1]
    if top_k is not None and top_k > classes:
        raise InvalidJob(f"task.top_k is {top_k}, but the model knows {classes} classes; lower it")
    return classes


def output_format_error(output: Any, expected: str) -> InvalidJob:
    """Build the error for an output in none of the formats that detection or segmentation reads."""
    message = f"the model gives {_describe_nested(output)} for a batch of {EXAMPLE_ROWS}, but {expected}"
    advice = "return something from its forward()" if output is None else _suggest_output(output)
    return InvalidJob(f"{message}; {advice}, or wrap the model (model.type: python), or use another task")


def check_row_shape(output: torch.Tensor, shape: Sequence[int]) -> None:
    """Check that a row has the shape it had in the example batch; images of another size may change it.

    Raises:
        InvalidJob: If the shape differs.
    """
    if tuple(output.shape[1:]) != tuple(shape):
        raise InvalidJob(
            f"the model gives {list(output.shape[1:])} for an image where it gave {list(shape)} for the first; "
            "bring all images to one size (preprocess.resize, preprocess.crop)"
        )


def describe_mismatch(output: Any, expected: str) -> str:
    """Return the first half of a message: the output of the example batch and what the task expects instead."""
    return f"the model gives {describe_output(output)} for a batch of {EXAMPLE_ROWS}, but {expected}"


def describe_output(output: Any) -> str:
    """Describe an output in words: `float32 [2, 10]`, `a tuple of 2 (float32 [2, 10], None)`."""
    import torch

    if output is None:
        return "None"
    if isinstance(output, torch.Tensor):
        return f"{str(output.dtype).removeprefix('torch.')} {list(output.shape)}"
    name = with_article(type(output).__name__)
    if isinstance(output, Mapping):
        return f"{name} with the keys {', '.join(map(str, list(output)[:_SHOWN_KEYS]))}"
    if isinstance(output, tuple | list):
        return f"{name} of {len(output)} ({', '.join(describe_output(part) for part in output[:_SHOWN_ITEMS])})"
    return name


def _suggest_output(output: Any) -> str:
    """Return the advice on an output that is no tensor: the values of `model.output` that select one."""
    import torch

    names = [
        name
        for name, value in _list_parts(output)
        if isinstance(value, torch.Tensor) and value.is_floating_point() and value.shape[:1] == (EXAMPLE_ROWS,)
    ]
    if not names:
        return "pick one of several with model.output"
    return f"write model.output: {' or '.join(map(str, names[:_SHOWN_KEYS]))}"


def _list_parts(output: Any) -> list[tuple[Any, Any]]:
    """List the values of an output by what `model.output` calls them: keys, fields, attributes, or indexes."""
    if isinstance(output, Mapping):
        return list(output.items())
    if isinstance(output, tuple | list):
        fields = getattr(output, "_fields", range(len(output)))
        return list(zip(fields, output, strict=True))
    return list(getattr(output, "__dict__", {}).items())


def _explain_rows(output: torch.Tensor, advice: str) -> str:
    """Return the advice on an output whose first dimension is not that of the images."""
    rows = output.shape[0] if output.ndim else 0
    if rows > EXAMPLE_ROWS and rows % EXAMPLE_ROWS == 0:
        return (
            f"it makes {rows // EXAMPLE_ROWS} rows of one image: where it flattens with view(-1, …), give preprocess "
            f"the size of image that it was trained on (resize, crop), else {advice}"
        )
    return f"it must give a row for each image; {advice}"


def widen_half_precision(tensor: torch.Tensor) -> torch.Tensor:
    """Return float16 and bfloat16 as float32, which NumPy and all Parquet readers know; other types as they are."""
    import torch

    return tensor.float() if tensor.dtype in {torch.float16, torch.bfloat16} else tensor


def _describe_nested(output: Any) -> str:
    """Describe an output in words, including the values of a dict and of the first dict in a list."""
    if isinstance(output, Mapping):
        parts = (f"{key} {describe_output(value)}" for key, value in list(output.items())[:_SHOWN_KEYS])
        return f"{describe_output(output)} ({', '.join(parts)})"
    if isinstance(output, list | tuple) and output and isinstance(output[0], Mapping):
        return f"{with_article(type(output).__name__)} of {len(output)}, the first {_describe_nested(output[0])}"
    return describe_output(output)
