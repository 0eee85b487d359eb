"""What `status` and `errors` say of an output: planned, half done, finished, damaged, discarded, from the future."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from scripted_pool import ScriptedPool, fail, make_job

from batchjob.driver import driver
from batchjob.driver.progress import NoProgress
from batchjob.errors import CheckFailed, InvalidJob
from batchjob.job.job import Job
from batchjob.output import commit, success
from batchjob.plan.head import read_current_head
from batchjob.report import output_status
from batchjob.report.output_status import ErrorCounts, count_errors, read_errors, read_status
from batchjob.storage.store import Store, open_store

# Five shards of two; the third image and the last two are broken.
IMAGES = ["0.png", "1.png", "2-bad.png", *(f"{number}.png" for number in range(3, 8)), "8-bad.png", "9-bad.png"]


@pytest.fixture
def the(tmp_path: Path) -> Job:
    return make_job(tmp_path, IMAGES, errors={"max_rate": 0.5, "attempts": 1})


@pytest.fixture
def store(tmp_path: Path) -> Store:
    return open_store(str(tmp_path / "out"))


def run(the: Job, *, without: int | None = None) -> None:
    pool = ScriptedPool({} if without is None else {without: [fail()]})
    driver.run(the, lambda: pool, allow_empty=False, progress=NoProgress())


def plan_only(the: Job) -> None:
    driver.make_plan(the, allow_empty=False, progress=NoProgress())


# --- status ---------------------------------------------------------------------------------------------------------


def test_where_nothing_was_planned(store: Store) -> None:
    for look in (read_status, count_errors, read_errors):
        with pytest.raises(
            InvalidJob, match=r"no plan here \(yet\); `batchjob run` makes one, in the folder that output\.uri names"
        ):
            look(store)


def test_planned(the: Job, store: Store) -> None:
    plan_only(the)
    seen = read_status(store)
    assert (seen.status, seen.plan_finished) == ("incomplete", True)
    assert (seen.planned, seen.shards, seen.parts, seen.rows, seen.failed) == (10, 5, 0, 0, 0)
    assert list(read_errors(store)) == []
    assert count_errors(store) == ErrorCounts(0, {})


def test_planned_in_part(the: Job, store: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("batchjob.plan.chunks.CHUNK_ROWS", 4)
    plan_only(the)
    chunks = sorted(stat.uri for stat in store.list("_batchjob/plans/0000/") if "chunk-" in stat.uri)
    assert len(chunks) == 3
    store.delete(chunks[2])
    seen = read_status(store)
    assert (seen.plan_finished, seen.planned, seen.shards) == (False, 8, 4)
    assert "8 images in 4 shards, and growing" in seen.lines()[1]
    store.delete(chunks[1])
    store.delete(chunks[0])
    seen = read_status(store)
    assert (seen.plan_finished, seen.planned, seen.shards) == (False, 0, 0)


def test_half_done(the: Job, store: Store) -> None:
    run(the, without=4)
    seen = read_status(store)
    assert seen.status == "incomplete"
    assert (seen.planned, seen.shards, seen.parts, seen.rows, seen.failed) == (10, 5, 4, 8, 1)
    assert seen.lines()[0] == f"{store.uri}: incomplete"
    assert seen.lines()[2] == "committed 8 rows in 4 parts, 1 with an error"
    assert [row["position"] for row in read_errors(store)] == [2]


def test_finished(the: Job, store: Store) -> None:
    run(the)
    seen = read_status(store)
    assert seen.status == "complete"
    assert (seen.planned, seen.shards, seen.parts, seen.rows, seen.failed) == (10, 5, 5, 10, 3)
    _, head = read_current_head(store)
    assert head is not None
    assert seen.lines() == [
        f"{store.uri}: complete",
        f"plan      {head.plan} of {head.created}: 10 images in 5 shards",
        "committed 10 rows in 5 parts, 3 with an error",
    ]


def test_over_budget_is_not_complete(tmp_path: Path, store: Store) -> None:
    run(make_job(tmp_path, IMAGES, errors={"abort_early": False}))
    seen = read_status(store)
    assert (seen.status, seen.rows, seen.failed) == ("incomplete", 10, 3)
    assert "errors.max_rate" in seen.lines()[-1]
    assert count_errors(store).total == 3


@pytest.mark.parametrize("added", [True, False])
def test_damaged(the: Job, store: Store, added: bool) -> None:
    run(the)
    part = min(commit.list_parts(store))
    if added:
        store.put_if_absent("predictions/part-9999999-stranger.parquet", b"")
    else:
        store.delete(part)
    seen = read_status(store)
    assert (seen.status, seen.parts) == ("damaged", 5 if added else 4)


def test_with_very_many_parts_their_footers_are_not_read(
    the: Job, store: Store, monkeypatch: pytest.MonkeyPatch
) -> None:
    run(the, without=0)
    monkeypatch.setattr(output_status, "_MAX_FOOTERS_READ", 3)
    seen = read_status(store)
    assert (seen.parts, seen.failed) == (4, None)
    assert seen.lines()[2] == "committed 8 rows in 4 parts"
    run(the)
    assert read_status(store).failed == 3  # _SUCCESS says it


def test_discarded(the: Job, store: Store) -> None:
    run(the)
    driver.discard(store.uri)
    for look in (read_status, count_errors, read_errors):
        with pytest.raises(InvalidJob, match="its plan was discarded and nothing was planned since; run the job again"):
            look(store)
    plan_only(the)
    assert (read_status(store).status, read_status(store).parts) == ("incomplete", 0)


def test_the_success_of_a_discarded_plan_says_nothing(the: Job, store: Store) -> None:
    run(the)
    old = store.read(success.SUCCESS).data
    driver.discard(store.uri)
    plan_only(the)
    store.put_if_absent(success.SUCCESS, old)
    assert read_status(store).status == "incomplete"


def test_a_plan_of_a_later_version(tmp_path: Path, the: Job, store: Store) -> None:
    run(the)
    head = tmp_path / "out/_batchjob/plans/0000/head.json"
    head.write_text(json.dumps({**json.loads(head.read_text()), "format": 99, "batchjob": "9.1", "more": True}))
    for look in (read_status, count_errors, read_errors):
        with pytest.raises(InvalidJob, match=r"format 99, this version knows 1; finish it with batchjob 9\.1"):
            look(store)


def test_looking_writes_nothing(the: Job, tmp_path: Path, store: Store) -> None:
    run(the, without=1)
    before = {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*")}
    read_status(store)
    count_errors(store)
    list(read_errors(store))
    assert {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*")} == before


# --- errors ---------------------------------------------------------------------------------------------------------


def test_error_rows_come_in_plan_order(the: Job, store: Store) -> None:
    run(the)
    found = list(read_errors(store))
    assert [row["position"] for row in found] == [2, 8, 9]
    assert [Path(row["uri"]).name for row in found] == ["2-bad.png", "8-bad.png", "9-bad.png"]
    assert (
        found[0].items()
        >= {
            "error_stage": "decode",
            "error_type": "truncated",
            "error_message": "ends too early",
        }.items()
    )
    assert list(found[0]) == ["position", "uri", "error_stage", "error_type", "error_message"]


def test_errors_are_counted_by_their_kind(the: Job, store: Store) -> None:
    run(the)
    assert count_errors(store) == ErrorCounts(3, {"decode/truncated": 3})


def test_a_part_that_is_none_is_named(the: Job, store: Store) -> None:
    run(the)
    store.put_if_absent("predictions/part-9999999-stranger.parquet", b"nothing")
    with pytest.raises(CheckFailed, match=r"stranger\.parquet was not written by batchjob"):
        count_errors(store)
