"""Show what the demo predicted: the table's first rows, then the accuracy, by DuckDB over the committed Parquet."""

from __future__ import annotations

import argparse
from pathlib import Path

import duckdb
from make_data import OUT

__all__ = ["main"]

FIRST = "SELECT position, uri, truth, label, score FROM read_parquet('{parts}') ORDER BY position LIMIT 5"
ACCURACY = "SELECT count(*) AS images, avg((label_id = truth)::INT) AS accuracy FROM read_parquet('{parts}')"


def main() -> None:
    parser = argparse.ArgumentParser(description="First rows and accuracy of the demo's output.")
    parser.add_argument("--out", type=Path, default=OUT / "predicted", help="the job's output (default: %(default)s)")
    parts = str(parser.parse_args().out / "predictions").replace("'", "''")
    print(duckdb.sql(FIRST.format(parts=parts)))
    print(duckdb.sql(ACCURACY.format(parts=parts)))


if __name__ == "__main__":
    main()
