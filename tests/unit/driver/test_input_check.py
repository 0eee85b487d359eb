"""Comparison of the images of a plan with a new listing, in the order of names and in any other."""

from __future__ import annotations

import random
from collections.abc import Iterator, Sequence

import pyarrow as pa
import pytest

from batchjob.driver import input_check
from batchjob.driver.input_check import InputDifference, compare_input
from batchjob.errors import InvalidJob

Row = tuple[str, int | None, str | None]


def make_rows(names: Sequence[str], etag: str | None = "tag") -> list[Row]:
    return [(name, 1, etag) for name in names]


def compare(planned: Sequence[Row], listed: Sequence[Row], batch: int = 3) -> InputDifference:
    def read(rows: Sequence[Row]) -> Iterator[pa.Table]:
        for start in range(0, len(rows), batch) or [0]:
            chunk = rows[start : start + batch]
            columns = [[row[column] for row in chunk] for column in range(3)]
            types = (pa.string(), pa.int64(), pa.string())
            arrays = [pa.array(values, kind) for values, kind in zip(columns, types, strict=True)]
            yield pa.Table.from_arrays(arrays, names=["location", "size", "etag"])

    return compare_input(lambda: read(planned), lambda: read(listed))


def counts(difference: InputDifference) -> tuple[int, int, int]:
    return difference.added, difference.gone, difference.changed


@pytest.mark.parametrize("ordered", [True, False])
def test_added_gone_and_changed_images_are_counted_in_any_order(ordered: bool) -> None:
    names = [f"{number:04}" for number in range(1000)]
    if not ordered:
        random.Random(1).shuffle(names)
    planned = make_rows(names)
    listed = [
        (name, size, "other" if name == "0500" else etag)
        for name, size, etag in planned
        if name not in {"0000", "0999", "0300"}
    ]
    listed[10:10] = make_rows(["0010a", "0010b"]) if ordered else make_rows(["x", "y"])
    if ordered:
        listed.sort()
    assert counts(compare(planned, listed)) == (2, 3, 1)
    assert counts(compare(planned, planned)) == (0, 0, 0)
    assert not compare(planned, planned)


@pytest.mark.parametrize(("planned", "listed", "expected"), [(0, 3, (3, 0, 0)), (3, 0, (0, 3, 0)), (0, 0, (0, 0, 0))])
def test_one_side_may_be_empty(planned: int, listed: int, expected: tuple[int, int, int]) -> None:
    names = ["a", "b", "c"]
    assert counts(compare(make_rows(names[:planned]), make_rows(names[:listed]))) == expected


def test_order_of_seaweedfs_is_matched() -> None:
    # It lists `a/x` before `a-b`, and a new folder shifts everything.
    planned = make_rows(["a/x", "a-b", "b"])
    assert counts(compare(planned, make_rows(["a/x", "a/y", "a-b", "b"]))) == (1, 0, 0)


def test_repeated_rows_of_a_manifest_count_each() -> None:
    assert counts(compare(make_rows(["a", "a", "b"]), make_rows(["a", "b", "a", "a"]))) == (1, 0, 0)


@pytest.mark.parametrize(("one", "other"), [(("a", 1, None), ("a", 1, "tag")), (("a", None, None), ("a", 5, "tag"))])
def test_what_is_not_known_is_no_change(one: Row, other: Row) -> None:
    assert not compare([one], [other])


def test_names_are_compared_by_their_bytes() -> None:
    names = sorted(["z", "é", "\U0001f600", "\uff5e"], key=str.encode)
    assert counts(compare(make_rows(names), make_rows([*names[:2], *names[3:]]))) == (0, 1, 0)


def test_memory_is_bounded_without_an_order(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(input_check, "_MAX_PENDING", 10)
    with pytest.raises(InvalidJob, match="more than 5 images"):
        compare(make_rows(["b", "a", *map(str, range(20))]), make_rows([f"n{number}" for number in range(20)]))
