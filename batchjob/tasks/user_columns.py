"""Arrow columns from what the user's own task returns: lists, arrays, tensors or Arrow data."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import pyarrow as pa

from batchjob.arrow_types import format_type
from batchjob.tasks.model_output import describe_output, widen_half_precision
from batchjob.text import format_count

__all__ = ["InvalidColumns", "build_user_columns"]


class InvalidColumns(ValueError):
    """Returned values that are not the declared columns."""


def build_user_columns(returned: Any, fields: Sequence[pa.Field], row_count: int) -> list[pa.Array]:
    """Build the declared columns from the return value of the user's code.

    Example: for the fields `x: float32` and `y: bool` and 2 images, `{"x": tensor([1., 2.]), "y": [True, False]}`, the
    same values as a tuple, and a RecordBatch with these columns all give the same two arrays.

    Args:
        returned: A dict, a tuple in the order of the fields, Arrow data, or the values alone if there is one field.
        fields: Declared fields.
        row_count: Number of images, which is the length of each column.

    Raises:
        InvalidColumns: If columns are missing, or values are too few, too many or of another type.
    """
    values = _name_columns(returned, [field.name for field in fields])
    return [_build_column(values[field.name], field, row_count) for field in fields]


def _name_columns(returned: Any, names: Sequence[str]) -> dict[str, Any]:
    if isinstance(returned, pa.RecordBatch | pa.Table):
        returned = dict(zip(returned.column_names, returned.columns, strict=True))
    if isinstance(returned, Mapping):
        if set(returned) == set(names):
            return dict(returned)
        returned_names = ", ".join(map(str, returned)) or "none"
        raise InvalidColumns(f"returned the columns {returned_names}; declared are {', '.join(names)}")
    if returned is not None and len(names) == 1:
        return {names[0]: returned}
    if isinstance(returned, tuple | list) and len(returned) == len(names):
        return dict(zip(names, returned, strict=True))
    raise InvalidColumns(
        f"returned {describe_output(returned)}; it must return a dict with the columns {', '.join(names)}"
    )


def _build_column(values: Any, field: pa.Field, row_count: int) -> pa.Array:
    import torch

    if isinstance(values, torch.Tensor):
        values = widen_half_precision(values.detach().cpu()).numpy()
    if isinstance(values, str | bytes | Mapping) or not hasattr(values, "__len__") or getattr(values, "ndim", 1) == 0:
        raise InvalidColumns(
            f"returned {_describe_values(values)} as {field.name}; it must give a value for each image"
        )
    if len(values) != row_count:
        raise InvalidColumns(
            f"returned {format_count(len(values), 'value')} as {field.name} for {format_count(row_count, 'image')}; "
            "it must give one for each"
        )
    try:
        return _to_arrow(values, field.type)
    except (pa.ArrowException, TypeError, ValueError, OverflowError) as error:
        text = " ".join(str(error).split())
        declared = f"{field.name}, which is declared as {format_type(field.type)}"
        raise InvalidColumns(
            f"returned {_describe_values(values)} as {declared}: {text}; correct one of the two"
        ) from error


def _to_arrow(values: Any, data_type: pa.DataType) -> pa.Array:
    if isinstance(values, pa.ChunkedArray):
        values = values.combine_chunks()
    if isinstance(values, pa.Array):
        return values if values.type == data_type else values.cast(data_type)
    dimensions = getattr(values, "ndim", 1)
    if dimensions == 1 and hasattr(values, "dtype"):
        return pa.array(values, data_type, from_pandas=False)
    return pa.array(values.tolist() if dimensions > 2 else [_to_plain(value) for value in values], data_type)


def _to_plain(value: Any) -> Any:
    """Replace tensors within a value by lists of numbers."""
    import torch

    if isinstance(value, torch.Tensor):
        return value.tolist()
    if isinstance(value, Mapping):
        return {key: _to_plain(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_to_plain(item) for item in value]
    return value


def _describe_values(values: Any) -> str:
    if isinstance(values, pa.Array | pa.ChunkedArray):
        return f"Arrow {values.type}"
    if hasattr(values, "dtype"):
        return f"{values.dtype} {list(getattr(values, 'shape', ()))}"
    if isinstance(values, list | tuple) and values:
        return f"a list of {type(values[0]).__name__}"
    return describe_output(values)
