"""Ground truth from passthrough columns: text, numbers, or lists of them, as ids of the model's classes.

Sources provide plain columns, without dictionary encoding and string views.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from batchjob.arrow_types import is_text

__all__ = ["UNKNOWN_CLASS", "LabelIndex", "as_text", "is_class_type", "ratio"]

UNKNOWN_CLASS = -1
"""Id of a value that names no class of the model."""
_EXACT_FLOAT_INTEGERS = 2.0**53

_ClassIds = np.ndarray[Any, np.dtype[np.int64]]


@dataclass(frozen=True)
class LabelIndex:
    """The classes of a model: their labels by id, and their ids by label.

    Classes with the same label count as one class, because a label in the ground truth cannot distinguish them:
    ImageNet has two classes `crane`. The lowest of their ids is the canonical id of all of them.

    Example: of the labels `("crane", "ship", "crane")`, ids 0 and 2 both have the canonical id 0; the values
    `["crane", "ship", "bus", null]` have the class ids `[0, 1, -1, -1]`.

    Attributes:
        count: Number of classes the model gives.
        labels: Label of each id; None if the model has no labels.
    """

    count: int
    labels: tuple[str, ...] | None

    def class_name(self, class_id: int) -> str:
        """Return the label of an id, or the id as text if there are no labels."""
        return self.labels[class_id] if self.labels else str(class_id)

    def class_ids(self, values: pa.Array) -> _ClassIds:
        """Return the canonical id of the class that each value names, int64 `[n]`.

        Text names a class by its label, a number by its id. Text of digits is an id too, unless a label consists of
        digits. Values that name no class, and nulls, are UNKNOWN_CLASS.
        """
        if not is_text(values.type):
            return self.canonical_ids(_to_integers(values))
        values = pc.utf8_trim_whitespace(values.cast(pa.string()))
        by_label = pc.index_in(values, pa.array(self.labels or (), pa.string()))
        if not self._digits_are_ids:
            return self.canonical_ids(by_label)
        is_number = pc.match_substring_regex(values, r"^\d{1,9}$")
        by_id = pc.if_else(is_number, values, pa.scalar(None, pa.string())).cast(pa.int64())
        return self.canonical_ids(pc.coalesce(by_label.cast(pa.int64()), by_id))

    def canonical_ids(self, ids: pa.Array) -> _ClassIds:
        """Return the canonical id of each id, int64 `[n]`; UNKNOWN_CLASS for null and ids beyond `count`."""
        numbers = pc.fill_null(ids.cast(pa.int64()), UNKNOWN_CLASS).to_numpy(zero_copy_only=False)
        known = (numbers >= 0) & (numbers < self.count)
        return np.where(known, self._canonical_by_id[np.where(known, numbers, 0)], UNKNOWN_CLASS)

    @cached_property
    def _canonical_by_id(self) -> _ClassIds:
        first: dict[str, int] = {}
        names = [self.class_name(class_id) for class_id in range(self.count)]
        return np.array([first.setdefault(name, class_id) for class_id, name in enumerate(names)], np.int64)

    @cached_property
    def _digits_are_ids(self) -> bool:
        return not any(label.strip().isdecimal() for label in self.labels or ())


def is_class_type(data_type: pa.DataType) -> bool:
    """Return True if values of this type can name classes: text and numbers."""
    return is_text(data_type) or pa.types.is_integer(data_type) or pa.types.is_floating(data_type)


def as_text(values: pa.Array) -> pa.Array | None:
    """Return the values as a plain string array; None if they are not text."""
    return values.cast(pa.string()) if is_text(values.type) else None


def ratio(part: float, whole: float) -> float | None:
    """Return `part / whole`; None if `whole` is 0."""
    return part / whole if whole else None


def _to_integers(values: pa.Array) -> pa.Array:
    """Return numbers as int64; null for fractions and for values that int64 cannot hold."""
    # Ids may come as floats: pandas turns an integer column with nulls into one of floats.
    if pa.types.is_floating(values.type):
        values = values.cast(pa.float64())
        whole = pc.equal(values, pc.floor(values))
        exact = pc.and_(pc.less(pc.abs(values), _EXACT_FLOAT_INTEGERS), whole)
        values = pc.if_else(exact, values, pa.scalar(None, pa.float64()))
    elif pa.types.is_uint64(values.type):
        limit = pa.scalar(int(_EXACT_FLOAT_INTEGERS), pa.uint64())
        values = pc.if_else(pc.less(values, limit), values, pa.scalar(None, pa.uint64()))
    return values.cast(pa.int64())
