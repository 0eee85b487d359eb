"""Error rows tried again: what is replaced, what stays as it was, and what rivals, faults and kills make of it."""

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
import scripted_pool
from batchjob_process import open_output, read_all_footers, read_rows
from driver_server import DriverServer
from fault_proxy import LOSE_ANSWER, Reply, run_fault_proxy
from memory_store import Fault, MemoryStore
from PIL import Image
from scripted_pool import AttemptScript, ScriptedPool, commit_after, commit_twice, fail, fail_after_commit
from seaweed import Seaweed

import batchjob
from batchjob.cli.main import main
from batchjob.driver import driver
from batchjob.driver.progress import NoProgress
from batchjob.errors import AttemptFailed, BatchjobError, CheckFailed, InvalidJob, Temporary, Unavailable
from batchjob.output import commit, success
from batchjob.output.commit import CommitResult
from batchjob.output.part_writer import PartWriter
from batchjob.output.provenance import PartFooter
from batchjob.output.retry import replace_part
from batchjob.output.schema import build_row_schema
from batchjob.types import ShardKey
from batchjob.worker.messages import WorkerFailed

IMAGES, SHARD = 12, 4
BROKEN = (1, 2, 9)  # in the first and the last of three shards

NET = """\
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

JOB = """\
input: {type: manifest, uri: manifest.csv, uri_column: file, passthrough: {sku: string, red: float64}}
model: {type: python, target: "net:make"}
preprocess: {resize: null, crop: null, mean: null, std: null}
task: {type: regression, outputs: [value], truth: red}
runtime: {pool: local, device: cpu, batch_size: 2, shard_size: 4, tuning: "off", loader: {processes: 0}}
errors: {max_rate: 0.5}
output: {uri: out}
"""


def picture(folder: Path, number: int) -> None:
    Image.new("RGB", (8, 8), (20 * number, 0, 0)).save(folder / f"{number}.png")


def mend(folder: Path, numbers: Iterable[int] = BROKEN) -> None:
    for number in numbers:
        picture(folder, number)


def write_job(folder: Path, broken: Iterable[int] = BROKEN, where: str = "") -> str:
    """Write a job of twelve pictures in three shards there, some of them no pictures; the job file's path."""
    folder.mkdir(exist_ok=True)
    (folder / "net.py").write_text(NET)
    (folder / "job.yaml").write_text(JOB.replace("manifest.csv", f"{where}manifest.csv"))
    rows = [f"{number}.png,sku-{number},{20 * number / 255}" for number in range(IMAGES)]
    (folder / "manifest.csv").write_text("\n".join(["file,sku,red", *rows, ""]))
    mend(folder, range(IMAGES))
    for number in broken:
        (folder / f"{number}.png").write_bytes(b"no picture")
    return str(folder / "job.yaml")


def job(path: str, *overrides: str) -> batchjob.Job:
    return batchjob.Job.from_file(path, {}, list(overrides))


def rows(output: str | Path) -> list[dict[str, Any]]:
    found: list[dict[str, Any]] = read_rows(output).to_pylist()
    return found


def failed(output: str | Path) -> list[int]:
    return [row["position"] for row in rows(output) if row["error_stage"] is not None]


def revisions(output: str | Path) -> list[int]:
    return [made.revision for made in read_all_footers(output).values()]


def files(output: Path) -> dict[str, tuple[int, int]]:
    """All of them, by inode and time of writing."""
    found = (path for path in output.rglob("*") if path.is_file())
    return {str(path): (path.stat().st_ino, path.stat().st_mtime_ns) for path in found}


def agrees(output: str | Path) -> bool:
    """Whether `_SUCCESS` stands and lists just what is there."""
    store = open_output(str(output))
    found = success.read_success(store)
    return found is not None and success.find_part_mismatches(found[0], commit.list_parts(store)) == []


@pytest.fixture
def path(tmp_path: Path) -> str:
    """A job with three broken pictures."""
    return write_job(tmp_path)


@pytest.fixture
def out(tmp_path: Path) -> Path:
    return tmp_path / "out"


# --- what is replaced, and what stays -------------------------------------------------------------------------------


def test_what_was_mended_is_predicted_and_all_else_stays_as_it_was(path: str, out: Path) -> None:
    first = batchjob.run(job(path))
    assert (first.failed, failed(out)) == (3, list(BROKEN))
    before, made, stamps = rows(out), read_all_footers(out), files(out)
    mend(out.parent)
    outcome = batchjob.retry(job(path))
    assert (outcome.status, outcome.exit_code) == ("complete", 0)
    assert (outcome.planned, outcome.predicted, outcome.failed) == (IMAGES, IMAGES, 0)
    after = rows(out)
    assert [row["position"] for row in after] == list(range(IMAGES))
    assert [one for one in before if one["position"] not in BROKEN] == [
        one for one in after if one["position"] not in BROKEN
    ]
    for number in BROKEN:
        assert after[number]["value"] == pytest.approx(20 * number / 255, abs=1e-6)
        assert after[number]["sku"] == f"sku-{number}"
        assert (after[number]["width"], after[number]["error_message"]) == (8, None)
        assert after[number]["etag"] == open_output(str(out.parent)).stat(f"{number}.png").etag
    assert revisions(out) == [1, 0, 1]
    now = read_all_footers(out)
    (middle,) = (key for key, footer in now.items() if footer.revision == 0)
    assert now[middle] == made[middle]
    assert files(out)[str(out / middle)] == stamps[str(out / middle)]
    assert agrees(out)
    for key in now.keys() - {middle}:
        assert now[key].attempt != made[key].attempt
        assert (now[key].plan, now[key].shard, now[key].rows) == (made[key].plan, made[key].shard, SHARD)
        assert (now[key].failed, now[key].errors) == (0, {})


def test_sums_are_those_of_all_rows(path: str, out: Path) -> None:
    assert batchjob.run(job(path)).truth["value"]["images"] == 9
    mend(out.parent)
    outcome = batchjob.retry(job(path))
    assert outcome.truth["value"]["images"] == IMAGES
    assert outcome.truth["value"]["mean_absolute_error"] == pytest.approx(0, abs=1e-6)
    report = json.loads((out / "_batchjob/report.json").read_text())
    assert report["errors"] == {}
    assert report["counts"] == {"planned": IMAGES, "predicted": IMAGES, "failed": 0}


def test_only_images_with_error_rows_are_read(path: str, out: Path) -> None:
    batchjob.run(job(path))
    mend(out.parent)
    for number in set(range(IMAGES)) - set(BROKEN):
        (out.parent / f"{number}.png").unlink()
    assert batchjob.retry(job(path)).failed == 0
    assert failed(out) == []


def test_what_is_still_broken_has_its_row_anew(path: str, out: Path) -> None:
    batchjob.run(job(path))
    mend(out.parent, [2])
    (out.parent / "9.png").unlink()
    outcome = batchjob.retry(job(path))
    assert (outcome.status, outcome.failed) == ("complete", 2)
    assert failed(out) == [1, 9]
    assert [(row["error_stage"], row["error_type"]) for row in rows(out) if row["position"] == 9] == [
        ("fetch", "not_found")
    ]
    assert revisions(out) == [1, 0, 1]
    assert agrees(out)
    mend(out.parent)
    assert batchjob.retry(job(path)).failed == 0
    assert revisions(out) == [2, 0, 2]


def test_over_the_budget_there_is_no_success(path: str, out: Path) -> None:
    assert batchjob.run(job(path)).exit_code == 0
    outcome = batchjob.retry(job(path, "errors.max_rate=0.1"))
    assert (outcome.status, outcome.exit_code, outcome.failed) == ("over_budget", 3, 3)
    assert "batchjob errors" in outcome.message
    assert not (out / "_SUCCESS").exists()
    assert batchjob.run(job(path)).exit_code == 0
    assert agrees(out)


def test_an_image_that_changed_since_the_plan_is_taken_as_it_is_now(path: str, out: Path) -> None:
    listed = JOB.replace(JOB.splitlines()[0], "input: {type: prefix, uri: .}")
    Path(path).write_text(listed.replace("{type: regression, outputs: [value], truth: red}", "{type: embedding}"))
    mend(out.parent)
    main(["plan", path, "--quiet"])
    Image.new("RGB", (8, 8), (255, 0, 0)).save(out.parent / "5.png")
    assert batchjob.run(job(path)).failed == 1
    assert [row["error_type"] for row in rows(out) if row["error_type"]] == ["changed"]
    assert batchjob.retry(job(path)).failed == 0
    (row,) = (row for row in rows(out) if row["embedding"] == pytest.approx([1.0]))
    assert row["etag"] == open_output(str(out.parent)).stat("5.png").etag


# --- where there is nothing to retry, or more than that -------------------------------------------------------------


def test_without_error_rows_nothing_is_done(path: str, out: Path, capfd: pytest.CaptureFixture[str]) -> None:
    mend(out.parent)
    batchjob.run(job(path))
    before = files(out)
    assert main(["retry", path, "--json", "--quiet"]) == 0
    said, told = capfd.readouterr()
    assert json.loads(said.splitlines()[-1])["status"] == "already_complete"
    assert "nothing to retry" in told
    assert files(out) == before


def test_an_output_that_was_never_run_is_refused(path: str, out: Path, capfd: pytest.CaptureFixture[str]) -> None:
    assert main(["retry", path, "--json", "--quiet"]) == 2
    said, told = capfd.readouterr()
    assert json.loads(said.splitlines()[-1])["status"] == "invalid"
    assert "`batchjob run` first" in told
    assert not out.exists()


def test_another_job_is_refused(path: str, out: Path) -> None:
    batchjob.run(job(path))
    before = files(out)
    with pytest.raises(InvalidJob, match="another job"):
        batchjob.retry(job(path, "preprocess.resize=4"))
    assert files(out) == before


def test_a_run_that_stopped_early_is_retried_and_brought_to_its_end(path: str, out: Path) -> None:
    strict = job(path, "errors.max_count=1", "runtime.shard_size=1")
    assert batchjob.run(strict).exit_code == 3
    assert len(read_all_footers(out)) < IMAGES
    assert batchjob.run(strict).exit_code == 3, "what failed before counts"
    mend(out.parent)
    outcome = batchjob.retry(strict)
    assert (outcome.status, outcome.predicted, failed(out)) == ("complete", IMAGES, [])
    assert agrees(out)


def test_a_part_that_is_gone_from_a_complete_output_is_not_made_silently(path: str, out: Path) -> None:
    batchjob.run(job(path))
    next(iter((out / "predictions").iterdir())).unlink()
    with pytest.raises(CheckFailed, match="--repair"):
        batchjob.retry(job(path))


def test_a_success_put_before_the_last_part_was_replaced_is_put_right_by_a_run(path: str, out: Path) -> None:
    """A worker may outlive its driver, whose lease another one has taken."""
    batchjob.run(job(path))
    early = (out / "_SUCCESS").read_bytes()
    mend(out.parent)
    batchjob.retry(job(path))
    (out / "_SUCCESS").write_bytes(early)
    assert not agrees(out)
    outcome = batchjob.run(job(path))
    assert (outcome.status, outcome.failed) == ("complete", 0)
    assert agrees(out)


# --- images that kill -----------------------------------------------------------------------------------------------


def test_a_quarantined_image_is_tried_again(tmp_path: Path) -> None:
    """Picture 0 is black, which the transform does not survive as long as it is harmful."""
    path, harmful, out = write_job(tmp_path, broken=()), tmp_path / "harmful", tmp_path / "out"
    text = JOB.replace("{resize: null, crop: null, mean: null, std: null}", "{transform: 'net:harmful'}")
    Path(path).write_text(text.replace("{processes: 0}", "{processes: 1}"))
    harmful.touch()
    assert batchjob.run(job(path)).failed == 1
    assert [row["error_type"] for row in rows(out)][:2] == ["crash", None]
    assert batchjob.retry(job(path)).failed == 1
    assert [path.name for path in sorted(out.glob("_batchjob/plans/0000/quarantine/*"))] == [
        "000000000000.json",
        "000000000000.r1.json",
    ]
    harmful.unlink()
    assert batchjob.retry(job(path)).failed == 0
    assert rows(out)[0]["value"] == 0.0
    assert revisions(out) == [2, 0, 0]


# --- on S3 ----------------------------------------------------------------------------------------------------------


def publish(folder: Path, server: Seaweed, broken: Iterable[int] = BROKEN) -> tuple[str, str]:
    """The job's file with pictures and manifest on S3, and where those lie."""
    where = server.bucket()
    path = write_job(folder, broken, where)
    server.put_tree(folder, where)
    return path, where


def test_on_s3_the_same(tmp_path: Path, s3: Seaweed) -> None:
    path, where = publish(tmp_path, s3)
    output = s3.bucket() + "out"
    assert batchjob.run(job(path, f"output.uri={output}")).failed == 3
    before = rows(output)
    mend(tmp_path)
    for number in BROKEN:
        s3.put(f"{where}{number}.png", tmp_path / f"{number}.png")
    assert batchjob.retry(job(path, f"output.uri={output}")).exit_code == 0
    after = rows(output)
    assert [row for row in after if row["position"] not in BROKEN] == [
        row for row in before if row["position"] not in BROKEN
    ]
    assert failed(output) == []
    assert revisions(output) == [1, 0, 1]
    assert agrees(output)


SLOW_DOWN = Reply(503, b"<Error><Code>SlowDown</Code><Message>Reduce your request rate.</Message></Error>")
CONFLICT = Reply(409, b"<Error><Code>ConditionalRequestConflict</Code><Message>Conflict.</Message></Error>")


@pytest.mark.parametrize("fault", [LOSE_ANSWER, SLOW_DOWN, CONFLICT], ids=["lost answer", "503", "409"])
def test_a_doubtful_answer_to_a_replacement_is_looked_into(tmp_path: Path, s3: Seaweed, fault: str | Reply) -> None:
    path, where = publish(tmp_path, s3)
    output = s3.bucket() + "out"
    batchjob.run(job(path, f"output.uri={output}"))
    for number in BROKEN:
        picture(tmp_path, number)
        s3.put(f"{where}{number}.png", tmp_path / f"{number}.png")
    with run_fault_proxy(s3.endpoint) as proxy:
        met: list[str] = []

        def once(method: str, path: str) -> str | Reply | None:
            first = method == "PUT" and "/predictions/" in path and path not in met
            met.extend([path] if first else [])
            return fault if first else None

        proxy.decide = once
        storage = f"storage={{'s3://': {{endpoint: '{proxy.endpoint}'}}}}"
        assert batchjob.retry(job(path, f"output.uri={output}", storage)).exit_code == 0
        assert len(met) == 2
    assert (failed(output), revisions(output)) == ([], [1, 0, 1])
    assert agrees(output)


# --- two at once, and kills -----------------------------------------------------------------------------------------


def test_a_retry_that_was_killed_goes_on_and_a_second_one_beside_it_is_told_to_wait(
    tmp_path: Path, out: Path, driver_server: DriverServer, capfd: pytest.CaptureFixture[str]
) -> None:
    path = write_job(tmp_path, broken=range(1, IMAGES))
    batchjob.run(job(path, "errors.max_rate=1"))
    mend(tmp_path, range(IMAGES))
    first = driver_server.start("retry", path, "--quiet", env={"BATCHJOB_TEST_NAP": "1"}, short_lease=True)
    first.wait_until(lambda: not (out / "_SUCCESS").exists())
    assert main(["retry", path, "--json", "--quiet"]) == 75
    assert json.loads(capfd.readouterr().out.splitlines()[-1])["status"] == "temporary"
    assert main(["status", str(out)]) == 0
    first.wait_until(lambda: 1 in revisions(out))
    first.kill()
    assert first.exit_code == -signal.SIGKILL
    assert not (out / "_SUCCESS").exists()
    done = revisions(out)
    ended = driver_server.start("retry", path, "--quiet", short_lease=True).wait()
    assert ended.exit_code == 0, ended.stderr
    assert (failed(out), revisions(out)) == ([], [1, 1, 1])
    assert sum(done) < 3, "it was killed too late to show anything"
    assert agrees(out)


def test_a_run_after_a_killed_retry_finishes_what_is_there(path: str, out: Path, driver_server: DriverServer) -> None:
    batchjob.run(job(path))
    mend(out.parent)
    first = driver_server.start("retry", path, "--quiet", env={"BATCHJOB_TEST_NAP": "1"}, short_lease=True)
    first.wait_until(lambda: not (out / "_SUCCESS").exists())
    first.kill()
    before = read_all_footers(out)
    ended = driver_server.start("run", path, "--quiet", "--json", short_lease=True).wait()
    assert (ended.exit_code, ended.json_result["failed"]) == (0, len(failed(out)))
    assert read_all_footers(out) == before
    assert agrees(out)


# --- over a pool that misbehaves as scripted ------------------------------------------------------------------------


def scripted(
    the: batchjob.Job, script: Mapping[int, Sequence[AttemptScript]] = {}, *, retry: bool = True
) -> batchjob.RunResult:
    return driver.run(the, lambda: ScriptedPool(script), allow_empty=False, progress=NoProgress(), retry=retry)


@pytest.fixture
def six(tmp_path: Path) -> batchjob.Job:
    """A job of six shards that has run; the first and the fourth hold an error."""
    names = [f"{number:03}{'bad' if number in {1, 6} else ''}.png" for number in range(12)]
    the = scripted_pool.make_job(tmp_path, names, errors={"max_rate": 0.5})
    assert scripted(the, retry=False).failed == 2
    return the


def test_a_retry_that_gives_up_a_shard_is_incomplete(six: batchjob.Job, out: Path) -> None:
    outcome = scripted(six, {3: [fail()] * 3})
    assert (outcome.status, outcome.exit_code, outcome.failed) == ("incomplete", 4, 1)
    assert not (out / "_SUCCESS").exists()
    assert revisions(out) == [1, 0, 0, 0, 0, 0]
    outcome = scripted(six)
    assert (outcome.status, outcome.failed) == ("complete", 0)
    assert revisions(out) == [1, 0, 0, 1, 0, 0]
    assert agrees(out)


@pytest.mark.parametrize("act", [fail_after_commit, commit_twice, commit_after(3)])
def test_a_part_that_was_replaced_is_not_replaced_again(six: batchjob.Job, out: Path, act: AttemptScript) -> None:
    assert scripted(six, {0: [act], 3: [act]}).exit_code == 0
    assert revisions(out) == [1, 0, 0, 1, 0, 0]
    assert agrees(out)


def test_nobody_who_cannot_load_takes_the_success_away(six: batchjob.Job, out: Path) -> None:
    before = files(out / "predictions")
    broken = WorkerFailed(InvalidJob("net.py: no such function"))
    with pytest.raises(InvalidJob, match="no such function"):
        driver.run(six, lambda: ScriptedPool(ready=[broken]), allow_empty=False, progress=NoProgress(), retry=True)
    assert agrees(out)
    assert files(out / "predictions") == before


# --- one part -------------------------------------------------------------------------------------------------------

KEY = ShardKey(0, "s" * 16, 1, 0, 0, revision=1, error_rows=1)


def part(folder: Path, number: int, attempt: str, plan: str = "p") -> tuple[Path, PartFooter]:
    """A part of no interest but for its footer."""
    made = PartFooter(plan, KEY.id, 0, attempt, number, "f", "m", 0, 0, {}, {}, {})
    path = folder / attempt
    with PartWriter(path, build_row_schema([], [pa.field("score", pa.float64())])) as writer:
        writer.close(made)
    return path, made


@pytest.fixture
def store(tmp_path: Path) -> MemoryStore:
    """With a part of revision 0."""
    store = MemoryStore()
    store.put_if_absent(KEY.part_key, part(tmp_path, 0, "old")[0])
    return store


def replace(store: MemoryStore, folder: Path, wanted: Callable[[], None] = lambda: None) -> CommitResult:
    version = store.stat(KEY.part_key).version or ""
    return commit.commit_replacement(store, KEY, *part(folder, 1, "ours"), version, wanted)


@pytest.mark.parametrize("fault", [None, Fault.DOWN, Fault.LOST, Fault.REPEATED, Fault.CONFLICT])
def test_a_part_is_replaced_once_whatever_the_store_says(
    tmp_path: Path, store: MemoryStore, fault: Fault | None
) -> None:
    if fault is not None:
        store.inject("replace_if_match", KEY.part_key, fault)
    done = replace(store, tmp_path)
    assert done.committed_here
    found = commit.read_footer(store, KEY.part_key)
    assert (found.attempt, found.revision) == ("ours", 1)
    assert done.info == store.stat(KEY.part_key)


@pytest.mark.parametrize("number", [1, 2])
def test_a_rival_that_was_faster_is_not_overwritten(tmp_path: Path, store: MemoryStore, number: int) -> None:
    theirs, _ = part(tmp_path, number, "theirs")
    rival = store.client()

    def happens() -> None:
        rival.replace_if_match(KEY.part_key, theirs, rival.stat(KEY.part_key).version or "")

    store.inject("replace_if_match", KEY.part_key, happens)
    done = replace(store, tmp_path)
    assert (done.committed_here, done.footer.attempt) == (False, "theirs")
    assert commit.read_footer(store, KEY.part_key).attempt == "theirs"


@pytest.mark.parametrize(
    ("theirs", "error"),
    [
        ((0, "theirs", "p"), AttemptFailed),  # somebody put an older one back
        ((1, "theirs", "q"), CheckFailed),
    ],
)
def test_what_nobody_expects_there_is_left_alone(
    tmp_path: Path, store: MemoryStore, theirs: tuple[int, str, str], error: type[BatchjobError]
) -> None:
    rival, (path, _) = store.client(), part(tmp_path, *theirs)

    def happens() -> None:
        rival.delete(KEY.part_key)
        rival.put_if_absent(KEY.part_key, path)

    store.inject("replace_if_match", KEY.part_key, happens)
    with pytest.raises(error):
        replace(store, tmp_path)
    assert commit.read_footer(store, KEY.part_key).attempt == "theirs"


def test_a_part_that_was_deleted_is_not_put_again(tmp_path: Path, store: MemoryStore) -> None:
    rival = store.client()
    store.inject("replace_if_match", KEY.part_key, lambda: rival.delete(KEY.part_key))
    with pytest.raises(AttemptFailed, match="gone"):
        replace(store, tmp_path)
    assert store.stored_keys() == []


def test_nothing_is_replaced_under_a_success(tmp_path: Path, store: MemoryStore) -> None:
    store.put_if_absent("_SUCCESS", b"{}")
    with pytest.raises(Temporary, match="finished"):
        replace(store, tmp_path)
    assert commit.read_footer(store, KEY.part_key).revision == 0


def test_nothing_is_replaced_in_a_discarded_plan(tmp_path: Path, store: MemoryStore) -> None:
    def wanted() -> None:
        raise Temporary("the plan was discarded")

    with pytest.raises(Temporary, match="discarded"):
        replace(store, tmp_path, wanted)
    assert commit.read_footer(store, KEY.part_key).revision == 0


def test_a_store_that_stays_away_is_said_to(tmp_path: Path, store: MemoryStore) -> None:
    store.inject("replace_if_match", KEY.part_key, Fault.DOWN, times=9)
    with pytest.raises(Unavailable):
        replace(store, tmp_path)


WIDE = [
    pa.field("top_k", pa.list_(pa.struct([("label_id", pa.int32()), ("label", pa.string()), ("score", pa.float32())]))),
    pa.field("embedding", pa.list_(pa.float32(), 3), metadata={"shape": "3"}),
    pa.field("mask", pa.binary()),
    pa.field("labels", pa.list_(pa.list_(pa.string()))),
    pa.field("seen", pa.timestamp("us", "UTC")),
    pa.field("price", pa.decimal128(9, 2)),
]


def wide(folder: Path, key: ShardKey, bad: Iterable[int], mark: int) -> tuple[Path, PartFooter, pa.Table]:
    """A part of every third kind of column; of a later revision only those rows that `bad` names, all good now."""
    schema = build_row_schema([], WIDE)
    wrong = set(bad)
    numbers = sorted(wrong) if key.revision else range(key.rows)
    filled = [
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
                    "mask": bytes([number % 256, mark]),
                    "labels": [[], None, ["a", str(number)]],
                    "seen": number,
                    "price": number,
                }
            ),
        }
        for number in numbers
    ]
    table = pa.Table.from_pylist(filled, schema)
    path = folder / f"wide-{key.revision}"
    with PartWriter(path, schema, row_group_rows=7) as writer:
        for batch in table.to_batches(max_chunksize=5):
            writer.add(batch)
        errors = dict(writer.errors)
        attempt = f"attempt {key.revision}"
        made = PartFooter("p", key.id, 0, attempt, key.revision, "f", "m", len(filled), 0, {}, {"wall": 1}, {})
        made = dataclasses.replace(made, failed=sum(errors.values()), errors=errors)
        writer.close(made)
    return path, made, table


@pytest.mark.parametrize("bad", [[0], [4, 5, 6, 39], range(40), []], ids=["first", "some", "all", "none"])
def test_columns_of_every_kind_are_carried_over(
    tmp_path: Path, bad: Iterable[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("batchjob.output.retry._ROWS_PER_BATCH", 3)
    store, key = MemoryStore(), ShardKey(0, "s" * 16, 40, 0, 0)
    path, _, before = wide(tmp_path, key, bad, 1)
    store.put_if_absent(key.part_key, path)
    schema = pq.read_schema(path)
    later = dataclasses.replace(key, revision=1)
    path, made, retried = wide(tmp_path, later, bad, 2)
    done, _ = replace_part(store, later, path, made, lambda: None)
    with store.open(key.part_key) as file:
        after = pq.read_table(file)
    rest = pc.invert(pc.is_in(before["position"], pa.array(list(bad), pa.int64())))
    assert after.filter(rest).equals(before.filter(rest))
    assert after.filter(pc.invert(rest)).equals(retried)
    assert after.schema.remove_metadata().equals(schema.remove_metadata(), check_metadata=True)
    assert (done.footer.rows, done.footer.failed, done.footer.seconds) == (40, 0, {"wall": 2})


def test_rows_that_nobody_retried_are_not_replaced(tmp_path: Path) -> None:
    store, key = MemoryStore(), ShardKey(0, "s" * 16, 40, 0, 0)
    store.put_if_absent(key.part_key, wide(tmp_path, key, [3, 4], 1)[0])
    later = dataclasses.replace(key, revision=1)
    for others in ([3], [3, 5], [3, 4, 5]):
        path, made, _ = wide(tmp_path, later, others, 2)
        with pytest.raises(AttemptFailed, match="other error rows"):
            replace_part(store, later, path, made, lambda: None)
    assert commit.read_footer(store, key.part_key).revision == 0


# --- `_SUCCESS` is taken away only as it was read -------------------------------------------------------------------


@pytest.mark.parametrize("fault", [None, Fault.LOST, Fault.REPEATED])
def test_success_is_withdrawn(fault: Fault | None) -> None:
    store = MemoryStore()
    version = store.put_if_absent("_SUCCESS", b"{}").version or ""
    if fault is not None:
        store.inject("delete_if_match", "_SUCCESS", fault)
    if fault is Fault.LOST:
        with pytest.raises(Unavailable):
            success.delete_success(store, version)
    success.delete_success(store, version)
    assert store.stored_keys() == []


def test_a_success_that_was_put_since_stays() -> None:
    store = MemoryStore()
    version = store.put_if_absent("_SUCCESS", b'{"parts": []}').version or ""
    store.replace_if_match("_SUCCESS", b'{"parts": [], "later": 1}', version)
    with pytest.raises(Temporary, match="another driver"):
        success.delete_success(store, version)
    assert store.stored_keys() == ["_SUCCESS"]


@pytest.mark.parametrize("where", ["disk", "s3"])
def test_deleting_on_a_condition(where: str, tmp_path: Path, request: pytest.FixtureRequest) -> None:
    uri = str(tmp_path) if where == "disk" else request.getfixturevalue("s3").bucket()
    store = open_output(uri)
    first = store.put_if_absent("a", b"1")
    second = store.replace_if_match("a", b"22", first.version or "")
    with pytest.raises(BatchjobError, match="another writer"):
        store.delete_if_match("a", first.version or "")
    store.delete_if_match("a", store.read("a").version or "")
    assert [stat.uri for stat in store.list("") if stat.uri == "a"] == []
    store.delete_if_match("a", second.version or "")
