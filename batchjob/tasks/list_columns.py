"""Arrow list columns built from one flat array, or tensor, of all rows' items."""

from __future__ import annotations

from collections.abc import Sequence
from math import prod
from typing import TYPE_CHECKING, Any

import numpy as np
import pyarrow as pa

from batchjob.tasks.postprocess import Mask

if TYPE_CHECKING:
    import torch

__all__ = ["build_list_column", "build_struct_lists", "build_vector_column"]


def build_list_column(
    counts: Sequence[int] | np.ndarray[Any, Any], items: pa.Array, null_rows: Mask | None = None
) -> pa.ListArray:
    """Build a column with a list in each row.

    Example: counts `[2, 0, 1]` and items `[a, b, c]` have the offsets `[0, 2, 2, 3]` and give `[[a, b], [], [c]]`; if
    null_rows is `[False, True, False]`, the second list is null.

    Args:
        counts: Number of items in each row, `[n]`; 0 in null rows.
        items: Items of all rows in row order, as many as the sum of `counts`.
        null_rows: True for each row that is null, bool `[n]`; None if there is none.
    """
    offsets = np.zeros(len(counts) + 1, np.int32)
    np.cumsum(counts, out=offsets[1:])
    mask = None if null_rows is None else pa.array(null_rows)
    return pa.ListArray.from_arrays(pa.array(offsets), items, type=pa.list_(items.type), mask=mask)


def build_struct_lists(
    counts: Sequence[int] | np.ndarray[Any, Any],
    columns: Sequence[pa.Array],
    fields: Sequence[pa.Field],
    null_rows: Mask,
) -> pa.ListArray:
    """Build a column with a list of structs in each row, from the columns of `fields`; see `build_list_column`."""
    return build_list_column(counts, pa.StructArray.from_arrays(columns, fields=list(fields)), null_rows)


def build_vector_column(tensor: torch.Tensor, null_rows: Mask) -> pa.FixedSizeListArray:
    """Build a column with the numbers of each row of a tensor `[n, …]`, in row-major order, as a list of fixed size."""
    flat = pa.array(tensor.contiguous().view(-1).numpy())
    return pa.FixedSizeListArray.from_arrays(flat, prod(tensor.shape[1:]), mask=pa.array(null_rows))
