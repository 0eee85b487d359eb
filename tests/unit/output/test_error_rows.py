"""Error rows of single parts, and parts that are damaged behind an intact footer."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from batchjob.errors import CheckFailed, NotFound
from batchjob.output.error_rows import read_error_positions, read_error_rows
from batchjob.output.provenance import PartFooter
from batchjob.types import ShardKey
from tests.support.memory_store import MemoryStore
from tests.support.part_footers import make_footer

KEY = "predictions/part-0000000-x.parquet"


def write_part(folder: Path, stages: Sequence[str | None], first: int = 0) -> bytes:
    """Return a part with one row for each error stage, None for a good row."""
    failed = sum(stage is not None for stage in stages)
    footer = make_footer(ShardKey(0, "x", len(stages), 0, 0), failed=failed)
    rows = pa.table(
        {
            "position": pa.array(range(first, first + len(stages)), pa.int64()),
            "uri": [f"{first + row}.jpg" for row in range(len(stages))],
            "score": [0.5] * len(stages),
            "error_stage": pa.array(stages, pa.string()),
            "error_type": pa.array([stage and f"{stage} type" for stage in stages], pa.string()),
            "error_message": pa.array([stage and f"{stage} message" for stage in stages], pa.string()),
        }
    ).replace_schema_metadata({PartFooter.KEY: footer.to_json()})
    # Small row groups, so that error rows lie in several of them and beside good ones.
    pq.write_table(rows, folder / "part.parquet", row_group_size=2)
    return (folder / "part.parquet").read_bytes()


@pytest.fixture
def store() -> MemoryStore:
    return MemoryStore()


@pytest.mark.parametrize(
    ("stages", "expected"),
    [
        ([None, "decode", None, None, "predict"], {101, 104}),
        ([None, None, None], set()),
        (["fetch", "transform"], {100, 101}),
    ],
)
def test_positions_are_those_of_the_plan(
    store: MemoryStore, tmp_path: Path, stages: list[str | None], expected: set[int]
) -> None:
    store.put_if_absent(KEY, write_part(tmp_path, stages, first=100))
    assert read_error_positions(store, KEY) == expected


def test_rows_hold_the_columns_of_the_error_and_no_predictions(store: MemoryStore, tmp_path: Path) -> None:
    store.put_if_absent(KEY, write_part(tmp_path, [None, "decode"]))
    assert list(read_error_rows(store)) == [
        {
            "position": 1,
            "uri": "1.jpg",
            "error_stage": "decode",
            "error_type": "decode type",
            "error_message": "decode message",
        }
    ]


def test_absent_part_is_not_a_damaged_one(store: MemoryStore) -> None:
    with pytest.raises(NotFound):
        read_error_positions(store, KEY)


def damage_rows(part: bytes) -> bytes:
    """Overwrite the first column; the footer at the end stays."""
    return part[:4] + b"\xff" * 60 + part[64:]


def test_rows_damaged_behind_an_intact_footer_name_the_part_and_the_way_out(store: MemoryStore, tmp_path: Path) -> None:
    store.put_if_absent(KEY, damage_rows(write_part(tmp_path, ["decode", "decode"])))
    with pytest.raises(CheckFailed, match=rf"{KEY} is damaged \(.*\); remove it and run with --repair"):
        list(read_error_rows(store))


@pytest.mark.parametrize("part", [b"", b"PAR1", b"no Parquet at all"])
def test_file_that_is_no_parquet_is_damaged(store: MemoryStore, part: bytes) -> None:
    store.put_if_absent(KEY, part)
    with pytest.raises(CheckFailed, match=rf"{KEY} is damaged") as caught:
        read_error_positions(store, KEY)
    assert caught.value.exit_code == 3


def test_part_without_the_error_columns_is_damaged(store: MemoryStore, tmp_path: Path) -> None:
    pq.write_table(pa.table({"position": [1, 2]}), tmp_path / "other.parquet")
    store.put_if_absent(KEY, (tmp_path / "other.parquet").read_bytes())
    with pytest.raises(CheckFailed, match="is damaged"):
        read_error_positions(store, KEY)
