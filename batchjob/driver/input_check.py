"""Check of a finished output's input: list it again and compare it with the plan, in memory bounded by a batch."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from itertools import zip_longest

import pyarrow as pa

from batchjob.errors import InvalidJob
from batchjob.text import format_count

__all__ = ["InputDifference", "compare_input"]

_EXAMPLES = 3
# Images that wait for their counterpart where the order is not that of their names, at most.
_MAX_PENDING = 200_000

# Location, size and tag of an image.
_Row = tuple[str, int | None, str | None]
_Waiting = dict[str, list[_Row]]


class _OutOfOrderError(Exception):
    """The images do not come in the order of their names."""


@dataclass
class InputDifference:
    """Difference between the images of a plan and those of its input now.

    Attributes:
        added: Images that only the input has.
        gone: Images that only the plan has.
        changed: Images with another size or tag.
        examples: The first few locations of each kind, by the names of the attributes above.
    """

    added: int = 0
    gone: int = 0
    changed: int = 0
    examples: dict[str, list[str]] = field(default_factory=lambda: {"added": [], "gone": [], "changed": []})

    def __bool__(self) -> bool:
        return bool(self.added or self.gone or self.changed)

    def add(self, kind: str, location: str) -> None:
        """Count an image; `kind` is the name of a count."""
        setattr(self, kind, getattr(self, kind) + 1)
        if len(self.examples[kind]) < _EXAMPLES:
            self.examples[kind].append(location)

    def describe(self) -> str:
        """Describe the difference, such as `2 images added (s3://b/a.jpg, s3://b/b.jpg), 1 image gone (s3://b/c.jpg)`."""
        parts = []
        for kind, examples in self.examples.items():
            if count := getattr(self, kind):
                more = ", …" if count > len(examples) else ""
                parts.append(f"{format_count(count, 'image')} {kind} ({', '.join(examples)}{more})")
        return ", ".join(parts)


def compare_input(
    read_planned: Callable[[], Iterable[pa.Table]], read_listing: Callable[[], Iterable[pa.RecordBatch]]
) -> InputDifference:
    """Compare the images of a plan with those of a new listing.

    Both come in the order of their names nearly always, and are merged like two sorted lists:

        plan       a.jpg         c.jpg  d.jpg
        listing    a.jpg  b.jpg         d.jpg (another tag)
                          added  gone   changed

    A server with an order of its own, and a manifest, give each image its counterpart wherever it comes.

    Args:
        read_planned: Returns the chunks of the plan, from the first one.
        read_listing: Returns the batches of a listing, from the first one.

    Raises:
        InvalidJob: Without an order, there are more differences than can be kept in memory.
    """
    try:
        return _merge(_in_order(_iterate_rows(read_planned())), _in_order(_iterate_rows(read_listing())))
    except _OutOfOrderError:
        return _match(_iterate_rows(read_planned()), _iterate_rows(read_listing()))


def _iterate_rows(tables: Iterable[pa.Table | pa.RecordBatch]) -> Iterator[_Row]:
    for table in tables:
        columns = (table.column(name).to_pylist() for name in ("location", "size", "etag"))
        yield from zip(*columns, strict=True)


def _in_order(rows: Iterable[_Row]) -> Iterator[tuple[bytes, _Row]]:
    """Yield the rows with the bytes by which they are ordered; raise _OutOfOrderError where they are not."""
    last = b""
    for row in rows:
        key = row[0].encode()
        if key <= last:
            raise _OutOfOrderError
        last = key
        yield key, row


def _merge(planned: Iterator[tuple[bytes, _Row]], listed: Iterator[tuple[bytes, _Row]]) -> InputDifference:
    difference = InputDifference()
    one, other = next(planned, None), next(listed, None)
    while one is not None or other is not None:
        if other is None or (one is not None and one[0] < other[0]):
            assert one is not None
            difference.add("gone", one[1][0])
            one = next(planned, None)
        elif one is None or other[0] < one[0]:
            difference.add("added", other[1][0])
            other = next(listed, None)
        else:
            if _is_changed(one[1], other[1]):
                difference.add("changed", one[1][0])
            one, other = next(planned, None), next(listed, None)
    return difference


def _match(planned: Iterator[_Row], listed: Iterator[_Row]) -> InputDifference:
    """Match rows by location in whatever order they come; rows without a counterpart so far are kept."""
    difference = InputDifference()
    waiting: tuple[_Waiting, _Waiting] = ({}, {})
    count = 0
    for pair in zip_longest(planned, listed):
        for side, row in enumerate(pair):
            if row is None:
                continue
            found = _take(waiting[1 - side], row[0])
            if found is None:
                waiting[side].setdefault(row[0], []).append(row)
                count += 1
            else:
                count -= 1
                if _is_changed(found, row):
                    difference.add("changed", row[0])
        if count > _MAX_PENDING:
            raise InvalidJob(
                f"the input and the plan differ in more than {_MAX_PENDING // 2:,} images, or in their order, which is "
                "not that of their names; they are not counted: choose another output.uri, or `batchjob run --fresh`"
            )
    for kind, rows in zip(("gone", "added"), waiting, strict=True):
        for location, left in rows.items():
            for _ in left:
                difference.add(kind, location)
    return difference


def _take(waiting: _Waiting, location: str) -> _Row | None:
    rows = waiting.get(location)
    if rows is None:
        return None
    row = rows.pop(0)
    if not rows:
        del waiting[location]
    return row


def _is_changed(one: _Row, other: _Row) -> bool:
    """Return True if size or tag of an image differ; one that is not known never does."""
    pairs = zip(one[1:], other[1:], strict=True)
    return any(a is not None and b is not None and a != b for a, b in pairs)
