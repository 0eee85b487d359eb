"""Status and error rows of an output: planned, unfinished, finished, damaged, discarded or of a later version."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from batchjob.driver import driver
from batchjob.driver.progress import NoProgress
from batchjob.errors import CheckFailed, InvalidJob
from batchjob.job.job import Job
from batchjob.output import commit, success
from batchjob.plan.head import read_current_head
from batchjob.report import output_status
from batchjob.report.output_status import count_errors, read_errors, read_status
from batchjob.storage.store import Store, open_store
from tests.support.scripted_pool import ScriptedPool, fail, make_job

# Five shards of two images; the third image and the last two are bad.
IMAGES = ["0.png", "1.png", "2-bad.png", *(f"{number}.png" for number in range(3, 8)), "8-bad.png", "9-bad.png"]


@pytest.fixture
def job(tmp_path: Path) -> Job:
    return make_job(tmp_path, IMAGES, errors={"max_rate": 0.5, "attempts": 1})


@pytest.fixture
def store(tmp_path: Path) -> Store:
    return open_store(str(tmp_path / "out"))


def run_job(job: Job, *, without: int | None = None) -> None:
    pool = ScriptedPool({} if without is None else {without: [fail()]})
    driver.run(job, lambda: pool, allow_empty=False, progress=NoProgress())


def make_plan(job: Job) -> None:
    driver.make_plan(job, allow_empty=False, progress=NoProgress())


# --- status ---------------------------------------------------------------------------------------------------------


def test_output_without_a_plan(store: Store) -> None:
    for read in (read_status, count_errors, read_errors):
        with pytest.raises(
            InvalidJob, match=r"no plan here \(yet\); `batchjob run` makes one, in the folder that output\.uri names"
        ):
            read(store)


def test_planned_output(job: Job, store: Store) -> None:
    make_plan(job)
    status = read_status(store)
    assert (status.status, status.plan_finished) == ("incomplete", True)
    assert (status.planned, status.shards, status.parts, status.rows, status.failed) == (10, 5, 0, 0, 0)
    assert list(read_errors(store)) == []
    assert not count_errors(store)


def test_partly_planned_output(job: Job, store: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("batchjob.plan.chunks.CHUNK_ROWS", 4)
    make_plan(job)
    chunks = sorted(stat.uri for stat in store.list("_batchjob/plans/0000/") if "chunk-" in stat.uri)
    assert len(chunks) == 3
    store.delete(chunks[2])
    status = read_status(store)
    assert (status.plan_finished, status.planned, status.shards) == (False, 8, 4)
    assert "8 images in 4 shards, and growing" in status.lines()[1]
    store.delete(chunks[1])
    store.delete(chunks[0])
    status = read_status(store)
    assert (status.plan_finished, status.planned, status.shards) == (False, 0, 0)


def test_partly_committed_output(job: Job, store: Store) -> None:
    run_job(job, without=4)
    status = read_status(store)
    assert status.status == "incomplete"
    assert (status.planned, status.shards, status.parts, status.rows, status.failed) == (10, 5, 4, 8, 1)
    assert status.lines()[0] == f"{store.uri}: incomplete"
    assert status.lines()[2] == "committed 8 rows in 4 parts, 1 with an error"
    assert [row["position"] for row in read_errors(store)] == [2]


def test_finished_output(job: Job, store: Store) -> None:
    run_job(job)
    status = read_status(store)
    assert status.status == "complete"
    assert (status.planned, status.shards, status.parts, status.rows, status.failed) == (10, 5, 5, 10, 3)
    _, head = read_current_head(store)
    assert head is not None
    assert status.lines() == [
        f"{store.uri}: complete",
        f"plan      {head.plan} of {head.created}: 10 images in 5 shards",
        "committed 10 rows in 5 parts, 3 with an error",
    ]


def test_output_over_budget_is_incomplete(tmp_path: Path, store: Store) -> None:
    run_job(make_job(tmp_path, IMAGES, errors={"abort_early": False}))
    status = read_status(store)
    assert (status.status, status.rows, status.failed) == ("incomplete", 10, 3)
    assert "errors.max_rate" in status.lines()[-1]
    assert count_errors(store).total() == 3


@pytest.mark.parametrize("added", [True, False])
def test_output_with_missing_or_added_parts_is_damaged(job: Job, store: Store, added: bool) -> None:
    run_job(job)
    part = min(commit.list_parts(store))
    if added:
        store.put_if_absent("predictions/part-9999999-stranger.parquet", b"")
    else:
        store.delete(part)
    status = read_status(store)
    assert (status.status, status.parts) == ("damaged", 5 if added else 4)


def test_footers_of_very_many_parts_are_not_read(job: Job, store: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    run_job(job, without=0)
    monkeypatch.setattr(output_status, "_MAX_FOOTERS_READ", 3)
    status = read_status(store)
    assert (status.parts, status.failed) == (4, None)
    assert status.lines()[2] == "committed 8 rows in 4 parts"
    run_job(job)
    assert read_status(store).failed == 3  # taken from _SUCCESS


def test_discarded_output(job: Job, store: Store) -> None:
    run_job(job)
    driver.discard(store.uri)
    for read in (read_status, count_errors, read_errors):
        with pytest.raises(InvalidJob, match="its plan was discarded and nothing was planned since; run the job again"):
            read(store)
    make_plan(job)
    assert (read_status(store).status, read_status(store).parts) == ("incomplete", 0)


def test_success_of_a_discarded_plan_is_ignored(job: Job, store: Store) -> None:
    run_job(job)
    old_success = store.read(success.SUCCESS).data
    driver.discard(store.uri)
    make_plan(job)
    store.put_if_absent(success.SUCCESS, old_success)
    assert read_status(store).status == "incomplete"


def test_plan_of_a_later_version_is_refused(tmp_path: Path, job: Job, store: Store) -> None:
    run_job(job)
    head = tmp_path / "out/_batchjob/plans/0000/head.json"
    head.write_text(json.dumps({**json.loads(head.read_text()), "format": 99, "batchjob": "9.1", "more": True}))
    for read in (read_status, count_errors, read_errors):
        with pytest.raises(InvalidJob, match=r"format 99, this version knows 1; finish it with batchjob 9\.1"):
            read(store)


def test_reading_writes_nothing(job: Job, tmp_path: Path, store: Store) -> None:
    run_job(job, without=1)
    before = {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*")}
    read_status(store)
    count_errors(store)
    list(read_errors(store))
    assert {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*")} == before


# --- errors ---------------------------------------------------------------------------------------------------------


def test_error_rows_come_in_plan_order(job: Job, store: Store) -> None:
    run_job(job)
    rows = list(read_errors(store))
    assert [row["position"] for row in rows] == [2, 8, 9]
    assert [Path(row["uri"]).name for row in rows] == ["2-bad.png", "8-bad.png", "9-bad.png"]
    assert (
        rows[0].items()
        >= {
            "error_stage": "decode",
            "error_type": "truncated",
            "error_message": "ends too early",
        }.items()
    )
    assert list(rows[0]) == ["position", "uri", "error_stage", "error_type", "error_message"]


def test_errors_are_counted_by_type(job: Job, store: Store) -> None:
    run_job(job)
    assert count_errors(store) == {"decode/truncated": 3}


def test_foreign_part_is_named(job: Job, store: Store) -> None:
    run_job(job)
    store.put_if_absent("predictions/part-9999999-stranger.parquet", b"nothing")
    with pytest.raises(CheckFailed, match=r"stranger\.parquet was not written by batchjob"):
        count_errors(store)
