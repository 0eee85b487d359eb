"""Shard size, defaults that a plan keeps, and checks before a plan is made."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from batchjob.driver import driver
from batchjob.driver.progress import NoProgress
from batchjob.errors import InvalidJob, Temporary
from batchjob.job.job import Job
from batchjob.plan.chunks import read_chunks
from batchjob.plan.head import read_current_head
from batchjob.plan.reader import PlanReader
from batchjob.pool.pool import Pool
from batchjob.report.plan_summary import PlanSummary
from batchjob.report.run_result import RunResult
from batchjob.storage.store import open_store
from batchjob.worker.plan_session import PlanSession
from batchjob.worker.setup import LoadedWorker
from tests.support.scripted_pool import ScriptedPool, make_job


def no_pool() -> Pool:
    raise AssertionError("no worker is needed for this")


def run_job(job: Job, pool: Pool | None = None) -> RunResult:
    make_pool: Callable[[], Pool] = no_pool if pool is None else lambda: pool
    return driver.run(job, make_pool, allow_empty=False, progress=NoProgress())


def make_plan(job: Job) -> PlanSummary:
    return driver.make_plan(job, allow_empty=False, progress=NoProgress())


def make_manifest_job(folder: Path, rows: int, columns: dict[str, Any] | None = None, **sections: Any) -> Job:
    """Make a job over a manifest of this many rows, whose images do not exist."""
    table = pa.table({"path": [f"{number:07}.jpg" for number in range(rows)], **(columns or {})})
    pq.write_table(table, folder / "manifest.parquet")
    source = {"type": "manifest", "uri": "manifest.parquet", "uri_column": "path", "passthrough": list(columns or {})}
    return make_job(folder, [], input=source, **{"runtime": {}, **sections})


# --- shards ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("rows", "workers", "size"),
    [
        (65_536, 32, 512),
        (65_537, 32, 513),  # still four shards per worker
        (100_000, 32, 782),
        (300_000, {"max": 8}, 8192),
        (100_000, 1, 8192),
        (1_000, 32, 64),
    ],
)
def test_shard_size_grows_with_the_input_without_a_jump(tmp_path: Path, rows: int, workers: Any, size: int) -> None:
    assert make_plan(make_manifest_job(tmp_path, rows, runtime={"workers": workers})).shard_size == size


def test_shard_size_follows_the_number_of_workers(tmp_path: Path) -> None:
    run_job(make_manifest_job(tmp_path, 6_000), ScriptedPool(size=4))
    assert len(list((tmp_path / "out/predictions").iterdir())) == 16  # of 375 images


WIDE_ROWS = {"type": "raw", "row_bytes": 8 << 20}


def test_row_bytes_of_the_task_bound_the_shard_size(tmp_path: Path) -> None:
    run_job(make_manifest_job(tmp_path, 130, task=WIDE_ROWS), ScriptedPool())
    assert len(list((tmp_path / "out/predictions").iterdir())) == 3  # of 64 images, in parts of 512 MiB


def test_rows_too_wide_for_the_shard_size_are_refused_before_a_plan_is_made(tmp_path: Path) -> None:
    with pytest.raises(InvalidJob, match=r"runtime.shard_size: 600 rows of up to 8,388,608 bytes .* at most 512"):
        run_job(make_manifest_job(tmp_path, 130, task=WIDE_ROWS, runtime={"shard_size": 600}), ScriptedPool())
    assert not list((tmp_path / "out").glob("_batchjob/plans/*/head.json"))


def test_wide_passthrough_columns_give_small_chunks_and_shards(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("batchjob.plan.chunks.CHUNK_BYTES", 100_000)
    monkeypatch.setattr("batchjob.driver.planner._TARGET_PART_BYTES", 640_000)
    notes = [f"{number:01000}" for number in range(1000)]
    summary = make_plan(make_manifest_job(tmp_path, 1000, {"note": notes}))
    assert summary.shard_size < 640
    assert summary.images == 1000
    job = make_manifest_job(tmp_path, 1000, {"note": notes}, runtime={"shard_size": 7}, output={"uri": "other"})
    make_plan(job)
    store = open_store(job.output.uri)
    _, head = read_current_head(store)
    assert head is not None
    chunks = list(read_chunks(store, head))
    assert len(chunks) > 10
    assert all(key.rows == 7 for chunk in chunks[:-1] for key in chunk.shards)
    reader = PlanReader(store, head)
    shards = [reader.read_shard(key) for chunk in chunks for key in chunk.shards]
    assert [ref.position for shard in shards for ref in shard.refs] == list(range(1000))
    assert [note for shard in shards for note in shard.passthrough.column("note").to_pylist()] == notes


def test_shard_fits_into_a_chunk_of_the_plan(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("batchjob.driver.planner.CHUNK_BYTES", 1_000_000)
    summary = make_plan(make_manifest_job(tmp_path, 6_000, {"note": ["x" * 1_000] * 6_000}))
    assert 900 < summary.shard_size < 1_000  # instead of 1,500


# --- what the plan keeps of the job ---------------------------------------------------------------------------------


def edit_head(head: Path, change: Callable[[dict[str, Any]], object]) -> None:
    facts = json.loads(head.read_text())
    change(facts)
    head.write_text(json.dumps(facts))


def test_resumed_job_uses_the_defaults_of_its_plan(tmp_path: Path) -> None:
    """Change the defaults in the plan, as if another version had other defaults."""
    job = make_job(tmp_path, ["0.png", "1.png", "2.png"])
    make_plan(job)
    head = tmp_path / "out/_batchjob/plans/0000/head.json"

    def change(facts: dict[str, Any]) -> None:
        assert facts["defaults"]["decode"] == job.resolved_settings()["decode"]
        assert facts["defaults"]["input"]["uri"] == "./images/"
        facts["defaults"]["decode"]["max_pixels"] = 123_456
        facts["defaults"]["task"]["allow_nan"] = True
        facts["defaults"]["runtime"]["precision"] = "fp32"
        facts["defaults"]["model"]["no_longer_known"] = 1

    edit_head(head, change)
    pool = ScriptedPool()
    assert run_job(job, pool).status == "complete"
    assert pool.setup is not None
    deserialized = Job.deserialize(json.loads(json.dumps(pool.setup.job)), tmp_path, tmp_path)
    assert deserialized.decode.max_pixels == 123_456
    assert deserialized.runtime.precision == "fp32"
    assert deserialized.runtime.shard_size == 2
    assert deserialized.model_dump()["task"]["allow_nan"] is True
    assert deserialized.fingerprint() == job.fingerprint() == json.loads(head.read_text())["fingerprint"]
    assert deserialized.serialize() == pool.setup.job
    assert run_job(job).status == "already_complete"


def test_explicit_setting_overrides_a_default_of_the_plan(tmp_path: Path) -> None:
    job = make_job(tmp_path, ["0.png"], decode={"max_pixels": 1000})
    make_plan(job)
    head = tmp_path / "out/_batchjob/plans/0000/head.json"
    edit_head(head, lambda facts: facts["defaults"]["decode"].update(max_pixels=2000, max_bytes=3000))
    pool = ScriptedPool()
    run_job(job, pool)
    assert pool.setup is not None
    deserialized = Job.deserialize(pool.setup.job, tmp_path, tmp_path)
    assert (deserialized.decode.max_pixels, deserialized.decode.max_bytes) == (1000, 3000)


def test_plan_of_an_older_version_has_no_defaults(tmp_path: Path) -> None:
    job = make_job(tmp_path, ["0.png"])
    make_plan(job)
    edit_head(tmp_path / "out/_batchjob/plans/0000/head.json", lambda facts: facts.pop("defaults"))
    pool = ScriptedPool()
    assert run_job(job, pool).status == "complete"
    assert pool.setup is not None
    defaults = pool.setup.job["defaults"]
    assert pool.setup.job == job.serialize() | {"defaults": defaults}
    assert defaults["input"] == {"hidden": True}  # Earlier versions listed hidden files.


def test_half_written_plan_of_an_older_version_goes_on_with_hidden_files(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("batchjob.plan.chunks.CHUNK_ROWS", 2)
    names = [".0.png", "1.png", "2.png", "a.png"]
    make_job(tmp_path, names)
    (tmp_path / "images/b/.c").mkdir(parents=True)
    (tmp_path / "images/b/.c/3.png").write_bytes(b"pixels")
    make_plan(make_job(tmp_path, [], input={"type": "prefix", "uri": "images/", "hidden": True}))
    plan = tmp_path / "out/_batchjob/plans/0000"

    def remove_field(facts: dict[str, Any]) -> None:
        for section in (facts["job"], facts["fingerprint"], facts["defaults"]):
            del section["input"]["hidden"]

    edit_head(plan / "head.json", remove_field)
    for number in (1, 2):
        (plan / f"chunk-{number:07}.arrow").unlink()
    job = make_job(tmp_path, [])
    assert run_job(job, ScriptedPool()).status == "complete"
    store = open_store(job.output.uri, job.storage)
    _, head = read_current_head(store)
    assert head is not None
    reader = PlanReader(store, head)
    shards = [reader.read_shard(key) for chunk in read_chunks(store, head) for key in chunk.shards]
    assert [Path(ref.uri).name for shard in shards for ref in shard.refs] == [*names, "3.png"]


class _Notes(NoProgress):
    def __init__(self) -> None:
        self.lines: list[str] = []

    def note(self, text: str) -> None:
        self.lines.append(text)


def test_plan_tells_which_files_were_skipped(tmp_path: Path) -> None:
    notes = _Notes()
    job = make_job(tmp_path, ["0.png", "1.txt", ".2.png", ".3.png"])
    driver.make_plan(job, allow_empty=False, progress=notes)
    assert notes.lines[-2:] == [
        "1 file skipped by extension: .txt (1)",
        "2 hidden files skipped; input.hidden: true takes them",
    ]


def test_input_whose_files_are_all_skipped_tells_why(tmp_path: Path) -> None:
    with pytest.raises(InvalidJob, match=r"no images there \(2 files skipped by extension: .txt \(2\)\); put some"):
        make_plan(make_job(tmp_path, ["0.txt", "1.txt"]))


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("photos.zip", "write input.uri: zip://::"),
        ("photos.TAR.gz", "write input.uri: tar://::"),
        ("list.csv", "write input.type: manifest"),
        ("list.parquet", "write input.type: manifest"),
        ("list.csv.gz", "write input.type: manifest"),
        ("film.mp4", "put some there"),
    ],
)
def test_file_that_names_or_holds_images_tells_what_to_write(tmp_path: Path, name: str, words: str) -> None:
    job = make_job(tmp_path, [name])
    uri = f"{str(job.input.uri).rstrip('/')}/{name}"
    with pytest.raises(InvalidJob, match=f"no images there .*{re.escape(words)}"):
        make_plan(job.model_copy(update={"input": job.input.model_copy(update={"uri": uri})}))


def test_default_unknown_to_this_version_is_refused(tmp_path: Path) -> None:
    job = make_job(tmp_path, ["0.png"])
    make_plan(job)
    head = tmp_path / "out/_batchjob/plans/0000/head.json"
    edit_head(head, lambda facts: facts["defaults"]["runtime"].update(precision="fp4"))
    with pytest.raises(InvalidJob, match="planned by another version"):
        run_job(job)


# --- before a plan is made ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("source", ["prefix", "manifest"])
def test_truth_that_is_no_passthrough_column_is_refused(tmp_path: Path, source: str) -> None:
    task = {"type": "classification", "truth": "label"}
    job = (
        make_job(tmp_path, ["0.png"], task=task)
        if source == "prefix"
        else make_manifest_job(tmp_path, 1, {"sku": ["a"]}, task=task)
    )
    with pytest.raises(InvalidJob, match=r"task\.truth: 'label' is no passthrough column; .*input.passthrough"):
        run_job(job)
    assert not list((tmp_path / "out").glob("_batchjob/plans/*/head.json"))


def test_worker_whose_plan_is_discarded_asks_to_be_run_again(tmp_path: Path) -> None:
    job = make_job(tmp_path, ["0.png"])
    make_plan(job)
    driver.discard(str(tmp_path / "out"))
    loaded = cast("LoadedWorker", SimpleNamespace(store=open_store(str(tmp_path / "out"))))
    with pytest.raises(Temporary, match="plan 0 was discarded while this run was starting; run again"):
        PlanSession.join(loaded, 0)
