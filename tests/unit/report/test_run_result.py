"""`RunResult`: the exception of its exit code, and the rows and error rows of its output."""

from __future__ import annotations

import json
from pathlib import Path

import pyarrow as pa
import pyarrow.dataset as ds
import pyarrow.parquet as pq
import pytest

from batchjob import CheckFailed, Incomplete, InvalidJob, JobError, RunResult, StorageOptions, Temporary
from batchjob.storage.store import open_store

STATUSES = [
    (2, "invalid", InvalidJob),
    (3, "over_budget", CheckFailed),
    (4, "incomplete", Incomplete),
    (75, "temporary", Temporary),
    (1, "crashed", JobError),
]


def put_parts(uri: str, options: dict[str, StorageOptions] | None = None) -> None:
    """Write two parts of three rows each."""
    store = open_store(uri, options)
    for part in range(2):
        rows = pa.table({"position": [3 * part + row for row in range(3)], "label": ["cat", "dog", None]})
        sink = pa.BufferOutputStream()
        pq.write_table(rows, sink)
        store.put_if_absent(f"predictions/part-{part:07}-abc.parquet", sink.getvalue().to_pybytes())


@pytest.mark.parametrize("status", ["complete", "already_complete"])
def test_complete_run_raises_nothing(status: str) -> None:
    result = RunResult(status, planned=3)
    assert result.raise_for_status() is result


@pytest.mark.parametrize(("code", "status", "kind"), STATUSES, ids=[status for _, status, _ in STATUSES])
def test_any_other_run_raises_the_error_of_its_exit_code(code: int, status: str, kind: type[JobError]) -> None:
    result = RunResult(status, planned=5, predicted=3, failed=1, exit_code=code, output="out")
    with pytest.raises(JobError) as raised:
        result.raise_for_status()
    assert type(raised.value) is kind
    assert raised.value.exit_code == code
    assert raised.value.counts == (5, 3, 1)
    assert "5 images, 3 predicted, 1 failed" in raised.value.message
    with pytest.raises(kind, match="disk full"):
        RunResult(status, exit_code=code, message="disk full").raise_for_status()


def test_table_is_a_dataset_of_the_committed_rows(tmp_path: Path) -> None:
    put_parts(str(tmp_path))
    table = RunResult("complete", output=str(tmp_path)).table()
    assert table.count_rows() == 6
    assert table.to_table(columns=["position"]).column("position").to_pylist() == list(range(6))
    dogs = table.to_table(filter=ds.field("label") == "dog")
    assert dogs.column("position").to_pylist() == [1, 4]


def test_table_reads_a_bucket_with_the_storage_options_of_the_job(s3: object, monkeypatch: pytest.MonkeyPatch) -> None:
    uri = s3.bucket() + "out"  # type: ignore[attr-defined]
    # Only the options name the server.
    for name in ("AWS_ENDPOINT_URL", "AWS_ENDPOINT_URL_S3", "AWS_REGION", "AWS_DEFAULT_REGION"):
        monkeypatch.delenv(name, raising=False)
    options = {"s3://": StorageOptions(endpoint=s3.endpoint, region="us-east-1")}  # type: ignore[attr-defined]
    put_parts(uri, options)
    table = RunResult("complete", output=uri, storage=options).table()
    assert table.to_table(columns=["position"]).column("position").to_pylist() == list(range(6))
    assert table.to_table(filter=ds.field("label").is_null()).column("position").to_pylist() == [2, 5]


def test_output_without_rows_is_said(tmp_path: Path) -> None:
    with pytest.raises(InvalidJob, match="no rows are committed yet"):
        RunResult("temporary", output=str(tmp_path)).table()
    with pytest.raises(InvalidJob, match="no plan here"):
        list(RunResult("temporary", output=str(tmp_path)).errors())
    with pytest.raises(InvalidJob, match="has no output: no such file"):
        RunResult("invalid", message="no such file").table()


def test_storage_options_are_no_key_of_the_json() -> None:
    options = {"s3://": StorageOptions(endpoint="http://127.0.0.1:9")}
    result = RunResult("complete", storage=options)
    assert json.loads(result.to_json()) == json.loads(RunResult("complete").to_json())
    assert "storage" not in result.to_json()
    assert result == RunResult("complete")
