"""Retry of error rows: replaced and unchanged parts, rivals, store faults and killed drivers."""

from __future__ import annotations

import dataclasses
import json
import signal
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
import pytest
from PIL import Image

import batchjob
from batchjob.cli.main import main
from batchjob.driver import driver
from batchjob.driver.progress import NoProgress
from batchjob.driver.run_state import find_exceeded_limit
from batchjob.errors import AttemptFailed, BatchjobError, CheckFailed, InvalidJob, Temporary, Unavailable
from batchjob.job.runtime import ErrorBudget
from batchjob.output import commit, success
from batchjob.output.commit import CommitResult
from batchjob.output.listed_parts import find_part_mismatches
from batchjob.output.part_writer import PartWriter
from batchjob.output.provenance import PartFooter
from batchjob.output.retry import replace_part
from batchjob.output.schema import build_row_schema
from batchjob.types import ShardKey
from batchjob.worker.messages import WorkerFailed
from tests.support import scripted_pool
from tests.support.batchjob_process import open_output, read_all_footers, read_rows
from tests.support.driver_server import DriverServer
from tests.support.fault_proxy import LOSE_ANSWER, Reply, run_fault_proxy
from tests.support.memory_store import Fault, MemoryStore
from tests.support.part_footers import make_footer
from tests.support.scripted_pool import (
    AttemptScript,
    ScriptedPool,
    commit_after,
    commit_twice,
    fail,
    fail_after_commit,
    fail_worker,
)
from tests.support.seaweed import Seaweed

IMAGE_COUNT, SHARD_SIZE = 12, 4
BROKEN_POSITIONS = (1, 2, 9)  # in the first and the last of three shards

MODEL_FILE = """\
import os
import time
from pathlib import Path

from torch import nn


class Red(nn.Module):
    def forward(self, x):
        time.sleep(float(os.environ.get("BATCHJOB_TEST_NAP", "0")))
        return x.mean(dim=(2, 3))[:, :1]


def make():
    return Red()


def harmful(image):
    if (Path(__file__).parent / "harmful").exists() and image.max() == 0:
        os._exit(9)
    return image.float() / 255
"""

JOB_FILE = """\
input: {type: manifest, uri: manifest.csv, uri_column: file, passthrough: {sku: string, red: float64}}
model: {type: python, target: "net:make"}
preprocess: {resize: null, crop: null, mean: null, std: null}
task: {type: regression, outputs: [value], truth: red}
runtime: {pool: local, device: cpu, batch_size: 2, shard_size: 4, tuning: "off", loader: {processes: 0}}
errors: {max_rate: 0.5}
output: {uri: out}
"""


def write_image(folder: Path, number: int) -> None:
    Image.new("RGB", (8, 8), (20 * number, 0, 0)).save(folder / f"{number}.png")


def repair_images(folder: Path, positions: Iterable[int] = BROKEN_POSITIONS) -> None:
    for number in positions:
        write_image(folder, number)


def write_job(folder: Path, broken: Iterable[int] = BROKEN_POSITIONS, uri_prefix: str = "") -> str:
    """Write a job of twelve images in three shards, some of them broken; return the path of the job file."""
    folder.mkdir(exist_ok=True)
    (folder / "net.py").write_text(MODEL_FILE)
    (folder / "job.yaml").write_text(JOB_FILE.replace("manifest.csv", f"{uri_prefix}manifest.csv"))
    lines = [f"{number}.png,sku-{number},{20 * number / 255}" for number in range(IMAGE_COUNT)]
    (folder / "manifest.csv").write_text("\n".join(["file,sku,red", *lines, ""]))
    repair_images(folder, range(IMAGE_COUNT))
    for number in broken:
        (folder / f"{number}.png").write_bytes(b"no picture")
    return str(folder / "job.yaml")


def load_job(job_path: str, *overrides: str) -> batchjob.Job:
    return batchjob.Job.from_file(job_path, {}, list(overrides))


def read_all_rows(output: str | Path) -> list[dict[str, Any]]:
    found: list[dict[str, Any]] = read_rows(output).to_pylist()
    return found


def list_error_positions(output: str | Path) -> list[int]:
    return [row["position"] for row in read_all_rows(output) if row["error_stage"] is not None]


def list_revisions(output: str | Path) -> list[int]:
    return [footer.revision for footer in read_all_footers(output).values()]


def list_files(output: Path) -> dict[str, tuple[int, int]]:
    """Return inode and modification time of all files."""
    paths = (path for path in output.rglob("*") if path.is_file())
    return {str(path): (path.stat().st_ino, path.stat().st_mtime_ns) for path in paths}


def success_matches_parts(output: str | Path) -> bool:
    """Return True if `_SUCCESS` is there and lists exactly the parts that are there."""
    store = open_output(str(output))
    found = success.read_success(store)
    return found is not None and find_part_mismatches(store, found[0], commit.list_parts(store)) == []


@pytest.fixture
def job_path(tmp_path: Path) -> str:
    """Write a job with three broken images."""
    return write_job(tmp_path)


@pytest.fixture
def output(tmp_path: Path) -> Path:
    return tmp_path / "out"


# --- replaced and unchanged rows ------------------------------------------------------------------------------------


def test_retry_predicts_repaired_images_and_keeps_all_other_rows(job_path: str, output: Path) -> None:
    first = batchjob.run(load_job(job_path))
    assert (first.failed, list_error_positions(output)) == (3, list(BROKEN_POSITIONS))
    before, footers_before, files_before = read_all_rows(output), read_all_footers(output), list_files(output)
    repair_images(output.parent)
    result = batchjob.retry(load_job(job_path))
    assert (result.status, result.exit_code) == ("complete", 0)
    assert (result.planned, result.predicted, result.failed) == (IMAGE_COUNT, IMAGE_COUNT, 0)
    after = read_all_rows(output)
    assert [row["position"] for row in after] == list(range(IMAGE_COUNT))
    assert [row for row in before if row["position"] not in BROKEN_POSITIONS] == [
        row for row in after if row["position"] not in BROKEN_POSITIONS
    ]
    for number in BROKEN_POSITIONS:
        assert after[number]["value"] == pytest.approx(20 * number / 255, abs=1e-6)
        assert after[number]["sku"] == f"sku-{number}"
        assert (after[number]["width"], after[number]["error_message"]) == (8, None)
        assert after[number]["etag"] == open_output(str(output.parent)).stat(f"{number}.png").etag
    assert list_revisions(output) == [1, 0, 1]
    now = read_all_footers(output)
    (middle,) = (key for key, footer in now.items() if footer.revision == 0)
    assert now[middle] == footers_before[middle]
    assert list_files(output)[str(output / middle)] == files_before[str(output / middle)]
    assert success_matches_parts(output)
    for key in now.keys() - {middle}:
        assert now[key].attempt != footers_before[key].attempt
        assert (now[key].plan, now[key].shard, now[key].rows) == (
            footers_before[key].plan,
            footers_before[key].shard,
            SHARD_SIZE,
        )
        assert (now[key].failed, now[key].errors) == (0, {})


def test_retry_sums_cover_all_rows(job_path: str, output: Path) -> None:
    assert batchjob.run(load_job(job_path)).truth["value"]["images"] == 9
    repair_images(output.parent)
    result = batchjob.retry(load_job(job_path))
    assert result.truth["value"]["images"] == IMAGE_COUNT
    assert result.truth["value"]["mean_absolute_error"] == pytest.approx(0, abs=1e-6)
    report = json.loads((output / "_batchjob/report.json").read_text())
    assert report["errors"] == {}
    assert report["counts"] == {"planned": IMAGE_COUNT, "predicted": IMAGE_COUNT, "failed": 0}


def test_retry_reads_only_images_with_error_rows(job_path: str, output: Path) -> None:
    batchjob.run(load_job(job_path))
    repair_images(output.parent)
    for number in set(range(IMAGE_COUNT)) - set(BROKEN_POSITIONS):
        (output.parent / f"{number}.png").unlink()
    assert batchjob.retry(load_job(job_path)).failed == 0
    assert list_error_positions(output) == []


def test_image_that_is_still_broken_gets_a_new_error_row(job_path: str, output: Path) -> None:
    batchjob.run(load_job(job_path))
    repair_images(output.parent, [2])
    (output.parent / "9.png").unlink()
    result = batchjob.retry(load_job(job_path))
    assert (result.status, result.failed) == ("complete", 2)
    assert list_error_positions(output) == [1, 9]
    assert [(row["error_stage"], row["error_type"]) for row in read_all_rows(output) if row["position"] == 9] == [
        ("fetch", "not_found")
    ]
    assert list_revisions(output) == [1, 0, 1]
    assert success_matches_parts(output)
    repair_images(output.parent)
    assert batchjob.retry(load_job(job_path)).failed == 0
    assert list_revisions(output) == [2, 0, 2]


def test_retry_keeps_an_output_accepted_under_a_larger_error_budget(job_path: str, output: Path) -> None:
    assert batchjob.run(load_job(job_path)).exit_code == 0
    result = batchjob.retry(load_job(job_path, "errors.max_rate=0.1"))
    assert (result.status, result.exit_code, result.failed) == ("complete", 0, 3)
    assert success_matches_parts(output)
    assert batchjob.status(output).status == "complete"


def test_retry_reads_a_changed_image_as_it_is_now(job_path: str, output: Path) -> None:
    listed = JOB_FILE.replace(JOB_FILE.splitlines()[0], "input: {type: prefix, uri: .}")
    Path(job_path).write_text(listed.replace("{type: regression, outputs: [value], truth: red}", "{type: embedding}"))
    repair_images(output.parent)
    main(["plan", job_path, "--quiet"])
    Image.new("RGB", (8, 8), (255, 0, 0)).save(output.parent / "5.png")
    assert batchjob.run(load_job(job_path)).failed == 1
    assert [row["error_type"] for row in read_all_rows(output) if row["error_type"]] == ["changed"]
    assert batchjob.retry(load_job(job_path)).failed == 0
    (row,) = (row for row in read_all_rows(output) if row["embedding"] == pytest.approx([1.0]))
    assert row["etag"] == open_output(str(output.parent)).stat("5.png").etag


# --- nothing to retry, or more than that ----------------------------------------------------------------------------


def test_retry_without_error_rows_does_nothing(job_path: str, output: Path, capfd: pytest.CaptureFixture[str]) -> None:
    repair_images(output.parent)
    batchjob.run(load_job(job_path))
    before = list_files(output)
    assert main(["retry", job_path, "--json", "--quiet"]) == 0
    stdout, stderr = capfd.readouterr()
    assert json.loads(stdout.splitlines()[-1])["status"] == "already_complete"
    assert "nothing to retry" in stderr
    assert list_files(output) == before


def test_retry_of_an_output_without_a_plan_is_refused(
    job_path: str, output: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    assert main(["retry", job_path, "--json", "--quiet"]) == 2
    stdout, stderr = capfd.readouterr()
    assert json.loads(stdout.splitlines()[-1])["status"] == "invalid"
    assert "`batchjob run` first" in stderr
    assert not output.exists()


def test_retry_of_another_jobs_output_is_refused(job_path: str, output: Path) -> None:
    batchjob.run(load_job(job_path))
    before = list_files(output)
    with pytest.raises(InvalidJob, match="another job"):
        batchjob.retry(load_job(job_path, "preprocess.resize=4"))
    assert list_files(output) == before


def test_retry_finishes_a_run_that_stopped_early(job_path: str, output: Path) -> None:
    strict = load_job(job_path, "errors.max_count=1", "runtime.shard_size=1")
    assert batchjob.run(strict).exit_code == 3
    assert len(read_all_footers(output)) < IMAGE_COUNT
    assert batchjob.run(strict).exit_code == 3, "earlier error rows count"
    repair_images(output.parent)
    result = batchjob.retry(strict)
    assert (result.status, result.predicted, list_error_positions(output)) == ("complete", IMAGE_COUNT, [])
    assert success_matches_parts(output)


def test_retry_refuses_a_complete_output_with_a_missing_part(job_path: str, output: Path) -> None:
    batchjob.run(load_job(job_path))
    next(iter((output / "predictions").iterdir())).unlink()
    with pytest.raises(CheckFailed, match="--repair"):
        batchjob.retry(load_job(job_path))


def test_run_corrects_a_success_written_before_the_last_replacement(job_path: str, output: Path) -> None:
    """A worker may outlive its driver after another driver has taken the lease."""
    batchjob.run(load_job(job_path))
    early = (output / "_SUCCESS").read_bytes()
    repair_images(output.parent)
    batchjob.retry(load_job(job_path))
    (output / "_SUCCESS").write_bytes(early)
    assert not success_matches_parts(output)
    result = batchjob.run(load_job(job_path))
    assert (result.status, result.failed) == ("complete", 0)
    assert success_matches_parts(output)


# --- images that crash the loader -----------------------------------------------------------------------------------


def test_retry_tries_a_quarantined_image_again(tmp_path: Path) -> None:
    """Image 0 is black, and the transform crashes on black images as long as the flag file is there."""
    job_path, harmful_flag, output = write_job(tmp_path, broken=()), tmp_path / "harmful", tmp_path / "out"
    text = JOB_FILE.replace("{resize: null, crop: null, mean: null, std: null}", "{transform: 'net:harmful'}")
    Path(job_path).write_text(text.replace("{processes: 0}", "{processes: 1}"))
    harmful_flag.touch()
    assert batchjob.run(load_job(job_path)).failed == 1
    assert [row["error_type"] for row in read_all_rows(output)][:2] == ["crash", None]
    assert batchjob.retry(load_job(job_path)).failed == 1
    assert [path.name for path in sorted(output.glob("_batchjob/plans/0000/quarantine/*"))] == [
        "000000000000.json",
        "000000000000.r1.json",
    ]
    harmful_flag.unlink()
    assert batchjob.retry(load_job(job_path)).failed == 0
    assert read_all_rows(output)[0]["value"] == 0.0
    assert list_revisions(output) == [2, 0, 0]


# --- on S3 ----------------------------------------------------------------------------------------------------------


def upload_job(folder: Path, server: Seaweed, broken: Iterable[int] = BROKEN_POSITIONS) -> tuple[str, str]:
    """Write a job whose images and manifest are on S3; return the job file and the URI prefix of the images."""
    uri_prefix = server.bucket()
    job_path = write_job(folder, broken, uri_prefix)
    server.put_tree(folder, uri_prefix)
    return job_path, uri_prefix


def test_retry_on_s3(tmp_path: Path, s3: Seaweed) -> None:
    job_path, uri_prefix = upload_job(tmp_path, s3)
    output = s3.bucket() + "out"
    assert batchjob.run(load_job(job_path, f"output.uri={output}")).failed == 3
    before = read_all_rows(output)
    repair_images(tmp_path)
    for number in BROKEN_POSITIONS:
        s3.put(f"{uri_prefix}{number}.png", tmp_path / f"{number}.png")
    assert batchjob.retry(load_job(job_path, f"output.uri={output}")).exit_code == 0
    after = read_all_rows(output)
    assert [row for row in after if row["position"] not in BROKEN_POSITIONS] == [
        row for row in before if row["position"] not in BROKEN_POSITIONS
    ]
    assert list_error_positions(output) == []
    assert list_revisions(output) == [1, 0, 1]
    assert success_matches_parts(output)


SLOW_DOWN_REPLY = Reply(503, b"<Error><Code>SlowDown</Code><Message>Reduce your request rate.</Message></Error>")
CONFLICT_REPLY = Reply(409, b"<Error><Code>ConditionalRequestConflict</Code><Message>Conflict.</Message></Error>")


@pytest.mark.parametrize("fault", [LOSE_ANSWER, SLOW_DOWN_REPLY, CONFLICT_REPLY], ids=["lost answer", "503", "409"])
def test_doubtful_answer_to_a_replacement_is_checked(tmp_path: Path, s3: Seaweed, fault: str | Reply) -> None:
    job_path, uri_prefix = upload_job(tmp_path, s3)
    output = s3.bucket() + "out"
    batchjob.run(load_job(job_path, f"output.uri={output}"))
    for number in BROKEN_POSITIONS:
        write_image(tmp_path, number)
        s3.put(f"{uri_prefix}{number}.png", tmp_path / f"{number}.png")
    with run_fault_proxy(s3.endpoint) as proxy:
        faulty_paths: list[str] = []

        def fail_first_put(method: str, path: str) -> str | Reply | None:
            first = method == "PUT" and "/predictions/" in path and path not in faulty_paths
            faulty_paths.extend([path] if first else [])
            return fault if first else None

        proxy.decide = fail_first_put
        storage = f"storage={{'s3://': {{endpoint: '{proxy.endpoint}'}}}}"
        assert batchjob.retry(load_job(job_path, f"output.uri={output}", storage)).exit_code == 0
        assert len(faulty_paths) == 2
    assert (list_error_positions(output), list_revisions(output)) == ([], [1, 0, 1])
    assert success_matches_parts(output)


# --- concurrent and killed drivers ----------------------------------------------------------------------------------


def test_killed_retry_resumes_and_a_concurrent_one_is_refused(
    tmp_path: Path, output: Path, driver_server: DriverServer, capfd: pytest.CaptureFixture[str]
) -> None:
    job_path = write_job(tmp_path, broken=range(1, IMAGE_COUNT))
    batchjob.run(load_job(job_path, "errors.max_rate=1"))
    repair_images(tmp_path, range(IMAGE_COUNT))
    first = driver_server.start("retry", job_path, "--quiet", env={"BATCHJOB_TEST_NAP": "1"}, short_lease=True)
    first.wait_until(lambda: not (output / "_SUCCESS").exists())
    assert main(["retry", job_path, "--json", "--quiet"]) == 75
    assert json.loads(capfd.readouterr().out.splitlines()[-1])["status"] == "temporary"
    assert main(["status", str(output)]) == 0
    first.wait_until(lambda: 1 in list_revisions(output))
    first.kill()
    assert first.exit_code == -signal.SIGKILL
    assert not (output / "_SUCCESS").exists()
    revisions = list_revisions(output)
    completed = driver_server.start("retry", job_path, "--quiet", short_lease=True).wait()
    assert completed.exit_code == 0, completed.stderr
    assert (list_error_positions(output), list_revisions(output)) == ([], [1, 1, 1])
    assert sum(revisions) < 3, "it was killed too late for this test"
    assert success_matches_parts(output)


def test_run_after_a_killed_retry_finishes_the_output(job_path: str, output: Path, driver_server: DriverServer) -> None:
    batchjob.run(load_job(job_path))
    repair_images(output.parent)
    first = driver_server.start("retry", job_path, "--quiet", env={"BATCHJOB_TEST_NAP": "1"}, short_lease=True)
    first.wait_until(lambda: not (output / "_SUCCESS").exists())
    first.kill()
    before = read_all_footers(output)
    completed = driver_server.start("run", job_path, "--quiet", "--json", short_lease=True).wait()
    assert (completed.exit_code, completed.json_result["failed"]) == (0, len(list_error_positions(output)))
    assert read_all_footers(output) == before
    assert success_matches_parts(output)


# --- scripted pool --------------------------------------------------------------------------------------------------


def run_scripted(
    job: batchjob.Job, script: Mapping[int, Sequence[AttemptScript]] = {}, *, retry: bool = True
) -> batchjob.RunResult:
    return driver.run(job, lambda: ScriptedPool(script), allow_empty=False, progress=NoProgress(), retry=retry)


@pytest.fixture
def six_shards_job(tmp_path: Path) -> batchjob.Job:
    """Make a job of six shards that has run; the first and the fourth shard hold an error row."""
    names = [f"{number:03}{'bad' if number in {1, 6} else ''}.png" for number in range(12)]
    job = scripted_pool.make_job(tmp_path, names, errors={"max_rate": 0.5})
    assert run_scripted(job, retry=False).failed == 2
    return job


def test_retry_that_abandons_a_shard_is_incomplete(six_shards_job: batchjob.Job, output: Path) -> None:
    result = run_scripted(six_shards_job, {3: [fail()] * 3})
    assert (result.status, result.exit_code, result.failed) == ("incomplete", 4, 1)
    assert not (output / "_SUCCESS").exists()
    assert list_revisions(output) == [1, 0, 0, 0, 0, 0]
    result = run_scripted(six_shards_job)
    assert (result.status, result.failed) == ("complete", 0)
    assert list_revisions(output) == [1, 0, 0, 1, 0, 0]
    assert success_matches_parts(output)


@pytest.mark.parametrize("script", [fail_after_commit, commit_twice, commit_after(3)])
def test_replaced_part_is_not_replaced_again(six_shards_job: batchjob.Job, output: Path, script: AttemptScript) -> None:
    assert run_scripted(six_shards_job, {0: [script], 3: [script]}).exit_code == 0
    assert list_revisions(output) == [1, 0, 0, 1, 0, 0]
    assert success_matches_parts(output)


def make_strict(job: batchjob.Job) -> batchjob.Job:
    return job.model_copy(update={"errors": job.errors.model_copy(update={"max_rate": 0.0, "abort_early": True})})


def test_retry_that_mends_some_keeps_what_was_accepted(six_shards_job: batchjob.Job, output: Path) -> None:
    # The first row of the two is mended; the other shard fails for another reason, and its row stays as it was.
    with pytest.raises(Temporary):
        run_scripted(make_strict(six_shards_job), {3: [fail_worker(Temporary("Ray is gone"))]})
    assert not (output / "_SUCCESS").exists()
    status = batchjob.status(output)
    assert (status.status, status.failed, status.accepted) == ("incomplete", 1, 2)
    assert "run again" in status.lines()[-1]
    result = run_scripted(make_strict(six_shards_job), retry=False)
    assert (result.status, result.failed) == ("complete", 1)
    assert batchjob.status(output).status == "complete"


def test_accepted_failures_are_those_of_this_plan_only(tmp_path: Path, output: Path) -> None:
    job = scripted_pool.make_job(tmp_path, ["0.png", "bad.png"], errors={"max_rate": 0.5})
    run_scripted(job, retry=False)
    with pytest.raises(Temporary):
        run_scripted(job, {0: [fail_worker(Temporary("Ray is gone"))]})
    batchjob.discard(output)
    result = run_scripted(make_strict(job), retry=False)
    assert (result.status, result.failed) == ("over_budget", 1)


@pytest.mark.parametrize(
    ("failed", "accepted", "exceeded"), [(2, 2, False), (3, 2, True), (0, None, False), (1, None, True)]
)
def test_more_error_rows_than_were_accepted_are_held_against_the_budget(
    failed: int, accepted: int | None, exceeded: bool
) -> None:
    assert bool(find_exceeded_limit(ErrorBudget(max_rate=0.0), failed, 10, accepted)) is exceeded


def test_success_stays_if_no_worker_can_load(six_shards_job: batchjob.Job, output: Path) -> None:
    before = list_files(output / "predictions")
    broken = WorkerFailed(InvalidJob("net.py: no such function"))
    with pytest.raises(InvalidJob, match="no such function"):
        driver.run(
            six_shards_job, lambda: ScriptedPool(ready=[broken]), allow_empty=False, progress=NoProgress(), retry=True
        )
    assert success_matches_parts(output)
    assert list_files(output / "predictions") == before


# --- one part -------------------------------------------------------------------------------------------------------

SHARD_KEY = ShardKey(0, "s" * 16, 1, 0, 0, revision=1, error_rows=1)


def write_part(folder: Path, number: int, attempt: str, plan: str = "p") -> tuple[Path, PartFooter]:
    """Write a part without rows; only its footer matters."""
    footer = make_footer(SHARD_KEY, plan=plan, attempt=attempt, revision=number, rows=0)
    path = folder / attempt
    with PartWriter(path, build_row_schema([], [pa.field("score", pa.float64())])) as writer:
        writer.close(footer)
    return path, footer


@pytest.fixture
def store(tmp_path: Path) -> MemoryStore:
    """Make a store with a part of revision 0."""
    store = MemoryStore()
    store.put_if_absent(SHARD_KEY.part_key, write_part(tmp_path, 0, "old")[0])
    return store


def replace(store: MemoryStore, folder: Path, raise_if_discarded: Callable[[], None] = lambda: None) -> CommitResult:
    version = store.stat(SHARD_KEY.part_key).version or ""
    return commit.commit_replacement(store, SHARD_KEY, *write_part(folder, 1, "ours"), version, raise_if_discarded)


@pytest.mark.parametrize("fault", [None, Fault.DOWN, Fault.LOST, Fault.REPEATED, Fault.CONFLICT])
def test_part_is_replaced_once_under_every_store_fault(tmp_path: Path, store: MemoryStore, fault: Fault | None) -> None:
    if fault is not None:
        store.inject("replace_if_match", SHARD_KEY.part_key, fault)
    result = replace(store, tmp_path)
    assert result.committed_here
    found = commit.read_footer(store, SHARD_KEY.part_key)
    assert (found.attempt, found.revision) == ("ours", 1)
    assert result.info == store.stat(SHARD_KEY.part_key)


@pytest.mark.parametrize("number", [1, 2])
def test_replacement_of_a_faster_rival_is_kept(tmp_path: Path, store: MemoryStore, number: int) -> None:
    rival_part, _ = write_part(tmp_path, number, "theirs")
    rival = store.client()

    def replace_first() -> None:
        rival.replace_if_match(SHARD_KEY.part_key, rival_part, rival.stat(SHARD_KEY.part_key).version or "")

    store.inject("replace_if_match", SHARD_KEY.part_key, replace_first)
    result = replace(store, tmp_path)
    assert (result.committed_here, result.footer.attempt) == (False, "theirs")
    assert commit.read_footer(store, SHARD_KEY.part_key).attempt == "theirs"


@pytest.mark.parametrize(
    ("rival_part", "error"),
    [
        ((0, "theirs", "p"), AttemptFailed),  # an older part was put back
        ((1, "theirs", "q"), CheckFailed),
    ],
)
def test_unexpected_part_is_left_unchanged(
    tmp_path: Path, store: MemoryStore, rival_part: tuple[int, str, str], error: type[BatchjobError]
) -> None:
    rival, (path, _) = store.client(), write_part(tmp_path, *rival_part)

    def replace_first() -> None:
        rival.delete(SHARD_KEY.part_key)
        rival.put_if_absent(SHARD_KEY.part_key, path)

    store.inject("replace_if_match", SHARD_KEY.part_key, replace_first)
    with pytest.raises(error):
        replace(store, tmp_path)
    assert commit.read_footer(store, SHARD_KEY.part_key).attempt == "theirs"


def test_deleted_part_is_not_put_again(tmp_path: Path, store: MemoryStore) -> None:
    rival = store.client()
    store.inject("replace_if_match", SHARD_KEY.part_key, lambda: rival.delete(SHARD_KEY.part_key))
    with pytest.raises(AttemptFailed, match="gone"):
        replace(store, tmp_path)
    assert store.stored_keys() == []


def test_no_part_is_replaced_under_a_success(tmp_path: Path, store: MemoryStore) -> None:
    store.put_if_absent("_SUCCESS", b"{}")
    with pytest.raises(Temporary, match="finished"):
        replace(store, tmp_path)
    assert commit.read_footer(store, SHARD_KEY.part_key).revision == 0


def test_no_part_of_a_discarded_plan_is_replaced(tmp_path: Path, store: MemoryStore) -> None:
    def raise_if_discarded() -> None:
        raise Temporary("the plan was discarded")

    with pytest.raises(Temporary, match="discarded"):
        replace(store, tmp_path, raise_if_discarded)
    assert commit.read_footer(store, SHARD_KEY.part_key).revision == 0


def test_persistent_unavailability_fails_the_replacement(tmp_path: Path, store: MemoryStore) -> None:
    store.inject("replace_if_match", SHARD_KEY.part_key, Fault.DOWN, times=9)
    with pytest.raises(Unavailable):
        replace(store, tmp_path)


WIDE_FIELDS = [
    pa.field("top_k", pa.list_(pa.struct([("label_id", pa.int32()), ("label", pa.string()), ("score", pa.float32())]))),
    pa.field("embedding", pa.list_(pa.float32(), 3), metadata={"shape": "3"}),
    pa.field("mask", pa.binary()),
    pa.field("labels", pa.list_(pa.list_(pa.string()))),
    pa.field("seen", pa.timestamp("us", "UTC")),
    pa.field("price", pa.decimal128(9, 2)),
]


def write_wide_part(
    folder: Path, key: ShardKey, error_positions: Iterable[int], marker: int
) -> tuple[Path, PartFooter, pa.Table]:
    """Write a part with columns of many types; for a later revision only the rows of `error_positions`, all good."""
    schema = build_row_schema([], WIDE_FIELDS)
    wrong = set(error_positions)
    positions = sorted(wrong) if key.revision else range(key.rows)
    rows = [
        {
            "position": number,
            "uri": f"{number}.png",
            "run_id": "p",
            "model_id": "m",
            **(
                {"error_stage": "decode", "error_type": "format", "error_message": "no picture"}
                if number in wrong and not key.revision
                else {
                    "top_k": [{"label_id": number, "label": None, "score": 0.1}] * (number % 3),
                    "embedding": [number / 7, float("inf"), -0.0],
                    "mask": bytes([number % 256, marker]),
                    "labels": [[], None, ["a", str(number)]],
                    "seen": number,
                    "price": number,
                }
            ),
        }
        for number in positions
    ]
    table = pa.Table.from_pylist(rows, schema)
    path = folder / f"wide-{key.revision}"
    with PartWriter(path, schema, row_group_rows=7) as writer:
        for batch in table.to_batches(max_chunksize=5):
            writer.add(batch)
        errors = dict(writer.errors)
        attempt = f"attempt {key.revision}"
        counts = {"rows": len(rows), "failed": sum(errors.values()), "errors": errors}
        footer = make_footer(key, plan="p", attempt=attempt, seconds={"wall": 1}, **counts)
        writer.close(footer)
    return path, footer, table


@pytest.mark.parametrize("error_positions", [[0], [4, 5, 6, 39], range(40), []], ids=["first", "some", "all", "none"])
def test_replacement_keeps_columns_of_every_type(
    tmp_path: Path, error_positions: Iterable[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("batchjob.output.retry._ROWS_PER_BATCH", 3)
    store, key = MemoryStore(), ShardKey(0, "s" * 16, 40, 0, 0)
    path, _, before = write_wide_part(tmp_path, key, error_positions, 1)
    store.put_if_absent(key.part_key, path)
    schema = pq.read_schema(path)
    retry_key = dataclasses.replace(key, revision=1)
    path, footer, retried_rows = write_wide_part(tmp_path, retry_key, error_positions, 2)
    result, _ = replace_part(store, retry_key, path, footer, lambda: None)
    with store.open(key.part_key) as file:
        after = pq.read_table(file)
    was_good = pc.invert(pc.is_in(before["position"], pa.array(list(error_positions), pa.int64())))
    assert after.filter(was_good).equals(before.filter(was_good))
    assert after.filter(pc.invert(was_good)).equals(retried_rows)
    assert after.schema.remove_metadata().equals(schema.remove_metadata(), check_metadata=True)
    assert (result.footer.rows, result.footer.failed, result.footer.seconds) == (40, 0, {"wall": 2})


def test_replacement_refuses_other_error_rows(tmp_path: Path) -> None:
    store, key = MemoryStore(), ShardKey(0, "s" * 16, 40, 0, 0)
    store.put_if_absent(key.part_key, write_wide_part(tmp_path, key, [3, 4], 1)[0])
    retry_key = dataclasses.replace(key, revision=1)
    for positions in ([3], [3, 5], [3, 4, 5]):
        path, footer, _ = write_wide_part(tmp_path, retry_key, positions, 2)
        with pytest.raises(AttemptFailed, match="other error rows"):
            replace_part(store, retry_key, path, footer, lambda: None)
    assert commit.read_footer(store, key.part_key).revision == 0


# --- conditional delete of `_SUCCESS` -------------------------------------------------------------------------------


@pytest.mark.parametrize("fault", [None, Fault.LOST, Fault.REPEATED])
def test_success_is_deleted(fault: Fault | None) -> None:
    store = MemoryStore()
    version = store.put_if_absent("_SUCCESS", b"{}").version or ""
    if fault is not None:
        store.inject("delete_if_match", "_SUCCESS", fault)
    if fault is Fault.LOST:
        with pytest.raises(Unavailable):
            success.delete_success(store, version)
    success.delete_success(store, version)
    assert store.stored_keys() == []


def test_newer_success_is_not_deleted() -> None:
    store = MemoryStore()
    version = store.put_if_absent("_SUCCESS", b'{"parts": []}').version or ""
    store.replace_if_match("_SUCCESS", b'{"parts": [], "later": 1}', version)
    with pytest.raises(Temporary, match="another driver"):
        success.delete_success(store, version)
    assert store.stored_keys() == ["_SUCCESS"]


@pytest.mark.parametrize("where", ["disk", "s3"])
def test_conditional_delete(where: str, tmp_path: Path, request: pytest.FixtureRequest) -> None:
    uri = str(tmp_path) if where == "disk" else request.getfixturevalue("s3").bucket()
    store = open_output(uri)
    first = store.put_if_absent("a", b"1")
    second = store.replace_if_match("a", b"22", first.version or "")
    with pytest.raises(BatchjobError, match="another writer"):
        store.delete_if_match("a", first.version or "")
    store.delete_if_match("a", store.read("a").version or "")
    assert [stat.uri for stat in store.list("") if stat.uri == "a"] == []
    store.delete_if_match("a", second.version or "")
