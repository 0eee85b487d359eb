"""Outputs and a job file that version 0.1.0 wrote: they are read, resumed and retried without a change.

`fixtures/version_0_1/` holds a job, its code, and the bucket as that version left it: 12 images (two of them broken), a
complete output with two error rows, one whose driver was killed after two of three parts, and one that ended
over its error budget.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from tests.support.seaweed import Seaweed

FIXTURE = Path(__file__).parent / "version_0_1"
BUCKET = "s3://outputs-0-1/"
BROKEN = ["images/05.png", "images/09.png"]


@pytest.fixture
def bucket(s3: Seaweed) -> Iterator[Seaweed]:
    """A bucket with what the old version left in it."""
    s3.bucket("outputs-0-1")
    files = sorted(path for path in (FIXTURE / "bucket").rglob("*") if path.is_file())
    for path in files:
        s3.put(BUCKET + path.relative_to(FIXTURE / "bucket").as_posix(), path)
    yield s3
    for key in s3.keys(BUCKET):
        s3.delete(BUCKET + key)


def batchjob(*arguments: str, exit_code: int = 0) -> dict[str, Any]:
    """Run a command beside the old job file; return the JSON object that it prints last."""
    call = [sys.executable, "-m", "batchjob", *arguments, "--json"]
    done = subprocess.run(
        call, cwd=FIXTURE, env=dict(os.environ), capture_output=True, text=True, check=False, timeout=200
    )
    assert done.returncode == exit_code, done.stderr
    last: dict[str, Any] = json.loads(done.stdout.strip().splitlines()[-1])
    return last


def mend(bucket: Seaweed) -> None:
    """Replace the two broken images by healthy ones."""
    for key in BROKEN:
        bucket.put(BUCKET + key, FIXTURE / "bucket" / "images" / "08.png")


def parts(bucket: Seaweed, output: str) -> dict[str, bytes]:
    folder = f"{BUCKET}{output}/predictions/"
    return {name: bucket.get(folder + name) for name in bucket.keys(folder)}


def rows(bucket: Seaweed, output: str) -> pa.Table:
    """Return all rows of an output; its parts must have one schema, whichever version wrote them."""
    tables = [pq.read_table(pa.BufferReader(body)) for _, body in sorted(parts(bucket, output).items())]
    assert all(table.schema.equals(tables[0].schema) for table in tables)
    return pa.concat_tables(tables)


def footers(bucket: Seaweed, output: str) -> list[dict[str, Any]]:
    """Return the provenance that each part holds in its footer."""
    metadata = [pq.read_metadata(pa.BufferReader(body)) for _, body in sorted(parts(bucket, output).items())]
    return [json.loads(one.metadata[b"batchjob"]) for one in metadata]


def test_a_finished_output_is_read_and_left_alone(bucket: Seaweed) -> None:
    before = parts(bucket, "finished")
    assert batchjob("run", "job.yaml")["status"] == "already_complete"
    assert parts(bucket, "finished") == before
    status = batchjob("status", f"{BUCKET}finished/")
    assert (status["planned"], status["failed"]) == (12, 2), status
    table = rows(bucket, "finished")
    assert table.column("position").to_pylist() == list(range(12))
    assert [
        uri
        for uri, error in zip(*(table.column(name).to_pylist() for name in ("uri", "error_type")), strict=True)
        if error
    ] == [BUCKET + key for key in BROKEN]


def test_error_rows_of_a_finished_output_are_retried(bucket: Seaweed) -> None:
    mend(bucket)
    assert batchjob("retry", "job.yaml")["failed"] == 0
    table = rows(bucket, "finished")
    assert table.column("position").to_pylist() == list(range(12))
    assert table.column("error_type").null_count == 12
    old, new = json.loads((FIXTURE / "bucket/finished/_SUCCESS").read_text()), footers(bucket, "finished")
    assert [footer["revision"] for footer in new] == [0, 1, 1], "the part without error rows stays"
    assert {footer["plan"] for footer in new} == {old["plan"]}
    assert set(new[0]) == set(new[1]), "footers have the same keys in both versions"


def test_a_half_done_output_is_resumed(bucket: Seaweed) -> None:
    before = parts(bucket, "half-done")
    assert len(before) == 2
    result = batchjob("run", "job.yaml", f"output.uri={BUCKET}half-done/")
    assert (result["planned"], result["failed"]) == (12, 2)
    after = parts(bucket, "half-done")
    assert len(after) == 3
    assert {key: after[key] for key in before} == before, "committed parts are never written again"
    table, finished = rows(bucket, "half-done"), rows(bucket, "finished")
    for name in ("position", "uri", "label_id", "label", "score", "top_k", "error_type"):
        assert table.column(name).equals(finished.column(name)), name


def test_an_output_over_its_budget_is_retried(bucket: Seaweed) -> None:
    output = f"{BUCKET}over-budget/"
    assert batchjob("errors", output)["total"] == 2
    mend(bucket)
    result = batchjob("retry", "job.yaml", f"output.uri={output}", "errors.max_count=0")
    assert (result["status"], result["failed"]) == ("complete", 0)
    assert rows(bucket, "over-budget").column("error_type").null_count == 12
