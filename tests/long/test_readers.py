"""Common readers open the predictions with one plain call, from the first committed part on."""

from __future__ import annotations

from pathlib import Path

import pytest
from commands import cifar, ends, right, start, table

SHARD = 20


def rows_seen(folder: Path) -> dict[str, int]:
    """How many rows each reader sees."""
    import duckdb
    import pandas as pd
    import polars as pl
    import pyarrow.parquet as pq

    return {
        "duckdb": len(duckdb.read_parquet(f"{folder}/*.parquet").fetchall()),
        "polars": pl.read_parquet(f"{folder}/").height,
        "pandas": len(pd.read_parquet(f"{folder}/")),
        "pyarrow": pq.read_table(f"{folder}/").num_rows,
    }


def test_readers_look_in_while_the_job_runs(test_data: Path, tmp_path: Path) -> None:
    output = tmp_path / "out"
    predictions = output / "predictions"
    looks: list[dict[str, int]] = []
    with ends(start(*cifar(test_data, output, f"runtime.shard_size={SHARD}"))) as command:
        while command.process.poll() is None:
            if predictions.is_dir() and any(predictions.iterdir()):
                looks.append(rows_seen(predictions))
        ended = command.end()
    assert ended.code == 0, ended.err
    if not any(0 < look["duckdb"] < 1000 for look in looks):
        pytest.fail("no reader came before the end")
    for reader in looks[0]:
        seen = [look[reader] for look in looks]
        assert seen == sorted(seen), "rows went away"
        assert {count % SHARD for count in seen} == {0}, "part of a part was seen"
        print(f"{reader}: looked {len(seen)} times during the run and saw {seen[0]} to {seen[-1]} rows")
    assert set(rows_seen(predictions).values()) == {1000}
    assert abs(right(table(output)) - 804) <= 1
