"""Arrow list columns built from one flat array of all rows' items."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import pyarrow as pa

__all__ = ["build_list_column"]


def build_list_column(
    counts: Sequence[int] | np.ndarray[Any, Any],
    items: pa.Array,
    null_rows: np.ndarray[Any, np.dtype[np.bool_]] | None = None,
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
