"""What is right, from a passthrough column: text, numbers or lists of them to the ids of a model's classes.

Sources hand over plain columns: no dictionaries, no views.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING, Any

import pyarrow as pa
import pyarrow.compute as pc

if TYPE_CHECKING:
    import numpy as np

__all__ = ["UNKNOWN_CLASS", "LabelIndex", "as_text", "is_class_type", "ratio"]

UNKNOWN_CLASS = -1
"""In place of the id where a value names no class."""


@dataclass(frozen=True)
class LabelIndex:
    """A model's classes, as people name what is right.

    Classes of one label are one class here (ImageNet has two cranes): what is right says no more than the label.

    Attributes:
        count: how many the model knows.
        labels: by id, or None.
    """

    count: int
    labels: tuple[str, ...] | None

    def class_name(self, number: int) -> str:
        """The label, or the id as text."""
        return self.labels[number] if self.labels else str(number)

    def class_ids(self, values: pa.Array) -> np.ndarray[Any, np.dtype[np.int64]]:
        """The class that each value names, int64 `[n]`; UNKNOWN where it names none, nulls included.

        A label is a name; a number is an id, and so is text that is one, unless there are labels that look so too.
        """
        if not _is_text(values.type):
            return self._first(_whole(values))
        values = pc.utf8_trim_whitespace(values.cast(pa.string()))
        named = pc.index_in(values, pa.array(self.labels or (), pa.string()))
        if not self._digits_are_ids:
            return self._first(named)
        digits = pc.match_substring_regex(values, r"^\d{1,9}$")
        numbers = pc.if_else(digits, values, pa.scalar(None, pa.string())).cast(pa.int64())
        return self._first(pc.coalesce(named.cast(pa.int64()), numbers))

    def canonical_ids(self, numbers: pa.Array) -> np.ndarray[Any, np.dtype[np.int64]]:
        """Ids as the model gives them to ids as `ids` gives them; UNKNOWN for null."""
        return self._first(numbers)

    def _first(self, numbers: pa.Array) -> np.ndarray[Any, np.dtype[np.int64]]:
        import numpy as np

        found = pc.fill_null(numbers.cast(pa.int64()), UNKNOWN_CLASS).to_numpy(zero_copy_only=False)
        known = (found >= 0) & (found < self.count)
        return np.where(known, self._firsts[np.where(known, found, 0)], UNKNOWN_CLASS)

    @cached_property
    def _firsts(self) -> np.ndarray[Any, np.dtype[np.int64]]:
        """By id, the first id that has the same label."""
        import numpy as np

        first: dict[str, int] = {}
        names = [self.class_name(number) for number in range(self.count)]
        return np.array([first.setdefault(name, number) for number, name in enumerate(names)], np.int64)

    @cached_property
    def _digits_are_ids(self) -> bool:
        return not any(label.strip().isdecimal() for label in self.labels or ())


def is_class_type(kind: pa.DataType) -> bool:
    """Whether values of this type may name classes."""
    return _is_text(kind) or pa.types.is_integer(kind) or pa.types.is_floating(kind)


def as_text(values: pa.Array) -> pa.Array | None:
    """The values as plain text where they are text, else None."""
    return values.cast(pa.string()) if _is_text(values.type) else None


def ratio(part: float, whole: float) -> float | None:
    """`part / whole`, None where there is nothing."""
    return part / whole if whole else None


def _is_text(kind: pa.DataType) -> bool:
    return bool(pa.types.is_string(kind) or pa.types.is_large_string(kind))


def _whole(values: pa.Array) -> pa.Array:
    """Numbers as int64; null where they are no whole number that fits (pandas makes floats of ids beside nulls)."""
    if pa.types.is_floating(values.type):
        values = values.cast(pa.float64())
        fits = pc.and_(pc.less(pc.abs(values), 2.0**53), pc.equal(values, pc.floor(values)))
        values = pc.if_else(fits, values, pa.scalar(None, pa.float64()))
    elif pa.types.is_uint64(values.type):
        values = pc.if_else(pc.less(values, pa.scalar(2**53, pa.uint64())), values, pa.scalar(None, pa.uint64()))
    return values.cast(pa.int64())
