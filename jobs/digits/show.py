"""Print the first rows of the example's output, and its accuracy, computed by DuckDB over the Parquet files."""

from __future__ import annotations

import argparse
from pathlib import Path

import duckdb
from make_data import DATA_FOLDER

__all__ = ["main"]

FIRST_ROWS = "SELECT position, uri, truth, label, score FROM read_parquet('{parts}') ORDER BY position LIMIT 5"
ACCURACY = "SELECT count(*) AS images, avg((label_id = truth)::INT) AS accuracy FROM read_parquet('{parts}')"


def main() -> None:
    parser = argparse.ArgumentParser(description="First rows and accuracy of the demo's output.")
    parser.add_argument(
        "--out", type=Path, default=DATA_FOLDER / "predicted", help="the job's output (default: %(default)s)"
    )
    parts = str(parser.parse_args().out / "predictions").replace("'", "''")
    print(duckdb.sql(FIRST_ROWS.format(parts=parts)))
    print(duckdb.sql(ACCURACY.format(parts=parts)))


if __name__ == "__main__":
    main()
