"""End of a run: comparison of parts and plan, error budget, report, `_SUCCESS`, and the text for the user."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from batchjob.driver.existing_output import delete_stale_parts
from batchjob.driver.finalize import RunSummary, finalize_run
from batchjob.driver.scheduler import AbandonedShard
from batchjob.errors import AttemptFailed, BatchjobError, CheckFailed, Incomplete, InvalidJob, Temporary, Unavailable
from batchjob.job.runtime import ErrorBudget
from batchjob.output import success
from batchjob.output.provenance import PartFooter, ShardResult
from batchjob.plan.head import PlanHead, discard_plan, new_head, put_head
from batchjob.report.plan_summary import PlanSummary
from batchjob.report.run_result import RunResult
from batchjob.types import ShardKey
from batchjob.worker.messages import WorkerInfo
from tests.support.memory_store import Fault, MemoryStore
from tests.support.part_footers import make_footer

WORKER_INFO = WorkerInfo("cpu", "fp32", "net@000000000000", ("score",), batch_size=4, seconds=1.5)


class FakeOutput:
    """Output in memory with a plan, and with the parts that a test puts there."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self.store = MemoryStore()
        self.head = self.make_plan(0)
        self.expected_rows: dict[str, int] = {}
        self.new_parts: dict[str, ShardResult] = {}
        self.heartbeats = 0

    def make_plan(self, number: int) -> PlanHead:
        head = new_head(number, job={}, fingerprint={}, shard_size=10, source_version=None, batchjob="1")
        return put_head(self.store, head)

    def put_part(
        self,
        index: int,
        rows: int = 10,
        failed: int = 0,
        *,
        in_this_run: bool = True,
        footer_fields: Mapping[str, Any] = {},
    ) -> str:
        """Plan a shard and commit its part, with other `footer_fields` if given; return the part's key."""
        key = ShardKey(index, f"{index:016x}", rows, 0, 0)
        fields: dict[str, Any] = {
            "plan": self.head.plan,
            "attempt": f"attempt-{index}",
            "failed": failed,
            "errors": {"decode/truncated": failed} if failed else {},
            "seconds": {"wall": 2.0, "predict": 0.25},
        }
        footer = make_footer(key, **fields | dict(footer_fields))
        self.expected_rows[key.part_key] = rows
        path = self._folder / key.id
        table = pa.table({"position": range(rows)}).replace_schema_metadata({PartFooter.KEY: footer.to_json()})
        pq.write_table(table, path)
        info = self.store.put_if_absent(key.part_key, path)
        if in_this_run:
            examples = dict.fromkeys(footer.errors, f"{index}.png: ends too early")
            self.new_parts[key.part_key] = ShardResult(key, footer, examples, True, info.etag)
        return key.part_key

    def abandon(self, index: int, reason: str = "worker 0 was lost") -> AbandonedShard:
        key = ShardKey(index, f"{index:016x}", 10, 0, 0)
        self.expected_rows[key.part_key] = 10
        return AbandonedShard(key, reason)

    def finalize(
        self, *given_up: AbandonedShard, max_count: int | None = None, max_rate: float = 0.01, **run: Any
    ) -> RunResult:
        summary = RunSummary(self.expected_rows, self.new_parts, given_up, (WORKER_INFO,), 4.0, **run)
        budget = ErrorBudget(max_rate=max_rate, max_count=max_count)
        return finalize_run(
            self.store, self.head, summary, budget=budget, summarize=self.summarize, heartbeat=self.heartbeat
        )

    def summarize(self, sums: Mapping[str, float]) -> dict[str, Any]:
        return {"accuracy": sums["right"] / sums["images"], "images": sums["images"]} if sums else {}

    def heartbeat(self) -> None:
        self.heartbeats += 1

    def list_footers_read(self) -> set[str]:
        return {call.key for call in self.store.calls if call.method == "read_tail"}

    def read_json(self, key: str) -> dict[str, Any]:
        content: dict[str, Any] = json.loads(self.store.read(key).data)
        return content

    @property
    def has_success(self) -> bool:
        return success.SUCCESS in self.store.stored_keys()


@pytest.fixture
def output(tmp_path: Path) -> FakeOutput:
    return FakeOutput(tmp_path)


# --- counts ---------------------------------------------------------------------------------------------------------


def test_success_has_the_sums_of_the_parts(output: FakeOutput) -> None:
    output.put_part(0, failed=1)
    output.put_part(1, rows=7, failed=2)
    result = output.finalize(max_rate=0.5)
    assert result == RunResult("complete", 17, 14, 3, 4.0, 17 / 4.0, output.store.uri, 0, "")
    content = output.read_json("_SUCCESS")
    assert content["plan"] == output.head.plan
    assert content["counts"] == {"planned": 17, "predicted": 14, "failed": 3}
    assert content["errors"] == {"decode/truncated": 3}
    assert content["examples"] == {"decode/truncated": "0.png: ends too early"}
    assert content["seconds"] == {"wall": 4.0, "predict": 0.5}
    assert content["workers"][0]["device"] == "cpu"
    assert content["parts"][1].items() >= {"name": sorted(output.expected_rows)[1], "rows": 7, "failed": 2}.items()


def test_success_is_written_last(output: FakeOutput) -> None:
    output.put_part(0)
    output.finalize()
    assert output.store.written_keys()[-2:] == ["_batchjob/report.json", "_SUCCESS"]


def test_heartbeats_continue_during_finalize(output: FakeOutput) -> None:
    for index in range(5):
        output.put_part(index)
    output.finalize()
    assert output.heartbeats >= 5


def test_only_unknown_footers_are_read(output: FakeOutput) -> None:
    older_part = output.put_part(0, in_this_run=False)
    output.put_part(1)
    changed_part = output.put_part(2)
    untagged_part = output.put_part(3)
    output.new_parts[changed_part] = replace(output.new_parts[changed_part], etag="another")
    output.new_parts[untagged_part] = replace(output.new_parts[untagged_part], etag=None)
    result = output.finalize()
    assert output.list_footers_read() == {older_part, changed_part, untagged_part}
    assert (result.planned, result.images_per_second) == (40, 30 / 4.0)  # only rows of this run count for its speed
    assert [part["name"] for part in output.read_json("_SUCCESS")["parts"]] == sorted(output.expected_rows)


def test_existing_report_and_success_are_replaced(output: FakeOutput) -> None:
    output.put_part(0, failed=1)
    assert output.finalize().exit_code == 3
    assert output.finalize(max_rate=0.1).exit_code == 0
    before = output.read_json("_SUCCESS")
    output.put_part(1)
    assert output.finalize(max_rate=0.1).exit_code == 0
    assert len(output.read_json("_SUCCESS")["parts"]) == len(before["parts"]) + 1
    assert output.read_json("_batchjob/report.json")["counts"]["planned"] == 20


@pytest.mark.parametrize("fault", [Fault.LOST, Fault.REPEATED, Fault.CONFLICT])
def test_success_stands_after_a_lost_answer(output: FakeOutput, fault: Fault) -> None:
    output.put_part(0)
    output.store.inject("put_if_absent", "_SUCCESS", fault)
    if fault is Fault.LOST:
        with pytest.raises(Unavailable):
            output.finalize()
    assert output.finalize().exit_code == 0
    assert output.read_json("_SUCCESS")["plan"] == output.head.plan


# --- checks ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("footer_fields", [{"rows": 9}, {"plan": "another"}])
def test_part_that_differs_from_the_plan_is_an_error(output: FakeOutput, footer_fields: Mapping[str, Any]) -> None:
    output.put_part(0)
    key = output.put_part(1, in_this_run=False, footer_fields=footer_fields)
    with pytest.raises(CheckFailed, match=f"{key} says .* rows of plan .* says 10 rows; remove it") as raised:
        output.finalize()
    assert raised.value.exit_code == 3
    assert not output.has_success


def test_missing_part_is_an_error(output: FakeOutput) -> None:
    output.put_part(0)
    missing_part = output.put_part(1)
    output.store.delete(missing_part)
    with pytest.raises(CheckFailed, match=f"{missing_part} vanished after its commit; run again to redo it"):
        output.finalize()
    assert not output.has_success


def test_foreign_part_is_an_error(output: FakeOutput) -> None:
    output.put_part(0)
    foreign_part = output.put_part(1, footer_fields={"plan": "another"})
    del output.expected_rows[foreign_part]
    with pytest.raises(CheckFailed, match=f"{foreign_part} is a part of plan another, not of this output's; remove it"):
        output.finalize()
    output.store.put_if_absent("predictions/notes.txt", b"mine")
    with pytest.raises(CheckFailed, match=r"notes\.txt was not written by batchjob"):
        output.finalize()
    assert foreign_part in output.store.stored_keys()
    assert not output.has_success


def test_parts_of_a_discarded_plan_are_deleted(output: FakeOutput) -> None:
    stale_part = output.put_part(0)
    discard_plan(output.store, output.head)
    output.expected_rows.clear()
    output.new_parts.clear()
    output.head = replace(output.head, plan="second", number=1)
    new_part = output.put_part(1)
    assert output.finalize().exit_code == 0
    assert stale_part not in output.store.stored_keys()
    assert [part["name"] for part in output.read_json("_SUCCESS")["parts"]] == [new_part]


def test_deleting_an_absent_stale_part_is_no_error(output: FakeOutput) -> None:
    delete_stale_parts(output.store, ["predictions/part-0000000-gone.parquet"])


# --- abandoned shards -----------------------------------------------------------------------------------------------


def test_abandoned_shards_leave_the_output_incomplete(output: FakeOutput) -> None:
    output.put_part(0)
    result = output.finalize(output.abandon(1, "out of memory"), output.abandon(2))
    assert (result.status, result.exit_code) == ("incomplete", 4)
    assert (result.planned, result.predicted) == (30, 10)
    assert result.message == (
        "2 shards gave up after all attempts, the first, number 1, with: out of memory; the same command tries again"
    )
    assert not output.has_success
    assert output.read_json("_batchjob/report.json")["status"] == "incomplete"


def test_abandoned_shard_whose_part_is_there_counts_as_committed(output: FakeOutput) -> None:
    output.put_part(0)
    missing_part = output.abandon(1)
    output.put_part(1, in_this_run=False)
    result = output.finalize(missing_part)
    assert (result.status, result.predicted) == ("complete", 20)
    assert output.has_success


# --- the error budget -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("rows", "failed", "rate", "code"),
    [
        (100, 1, 0.01, 0),
        (100, 2, 0.01, 3),
        (100, 29, 0.29, 0),  # 0.29 * 100 is 28.999999999999996
        (100, 30, 0.29, 3),
        (100, 7, 0.07, 0),
        (1000, 57, 0.057, 0),
        (10, 1, 0.0, 3),
        (10, 0, 0.0, 0),
        (10, 10, 1.0, 0),
        (0, 0, 0.0, 0),
    ],
)
def test_max_rate_is_a_share_of_the_planned_images(
    output: FakeOutput, rows: int, failed: int, rate: float, code: int
) -> None:
    output.put_part(0, rows, failed)
    result = output.finalize(max_rate=rate)
    assert result.exit_code == code
    assert output.has_success == (code == 0)
    assert output.read_json("_batchjob/report.json")["status"] == ("over_budget" if code else "complete")


def test_message_over_budget_names_the_most_frequent_error(output: FakeOutput) -> None:
    output.put_part(0, failed=3, footer_fields={"errors": {"decode/truncated": 1, "fetch/not_found": 2}})
    message = output.finalize().message
    assert message == (
        "3 of 10 images failed, errors.max_rate allows 1.00%; most often fetch/not_found (2, such as 0.png: ends too "
        "early)\n"
        "all 10 rows, error rows among them, can be read in memory://out/predictions/*.parquet; there is no _SUCCESS\n"
        "next: `batchjob errors memory://out` lists the images; mend them and `batchjob retry JOB.yaml`, or raise "
        "errors.max_rate: the next run then completes at once"
    )


@pytest.mark.parametrize(
    ("errors", "text"),
    [
        ({"decode/a": 1, "fetch/b": 1}, "; decode/a (1), fetch/b (1)\n"),
        ({"decode/a": 2, "fetch/b": 2, "predict/c": 1}, "; decode/a (2), fetch/b (2) and 1 more kind\n"),
        ({"a/1": 1, "a/2": 1, "a/3": 1, "a/4": 1, "a/5": 1}, "; a/1 (1), a/2 (1), a/3 (1) and 2 more kinds\n"),
        ({"decode/a": 2, "fetch/b": 1}, "; most often decode/a (2)\n"),
    ],
)
def test_message_over_budget_says_most_often_of_one_kind_only(
    output: FakeOutput, errors: dict[str, int], text: str
) -> None:
    output.put_part(0, failed=sum(errors.values()), in_this_run=False, footer_fields={"errors": errors})
    assert text in output.finalize().message


def test_message_over_budget_without_an_example(output: FakeOutput) -> None:
    output.put_part(0, failed=1, in_this_run=False)
    assert "most often decode/truncated (1)\n" in output.finalize().message


def test_max_count_limits_error_rows(output: FakeOutput) -> None:
    output.put_part(0, rows=1000, failed=3)
    assert output.finalize(max_count=3).exit_code == 0
    result = output.finalize(max_count=2)
    assert result.exit_code == 3
    assert "3 of 1,000 images failed, errors.max_count allows 2; most often" in result.message


def test_run_that_stopped_early_misses_no_parts(output: FakeOutput) -> None:
    output.put_part(0, failed=5)
    output.abandon(1)
    result = output.finalize(stopped_early=True)
    assert (result.status, result.planned, result.failed) == ("over_budget", 20, 5)
    assert result.message.startswith("stopped early: 5 of 10 images failed so far, of 20 planned, errors.max_rate")
    assert not output.has_success
    assert output.read_json("_batchjob/report.json")["stopped_early"]


def test_vanished_part_is_an_error_although_the_run_stopped_early(output: FakeOutput) -> None:
    output.put_part(0, failed=5)
    missing_part = output.put_part(1)
    output.store.delete(missing_part)
    with pytest.raises(CheckFailed, match=f"{missing_part} vanished"):
        output.finalize(stopped_early=True)


def test_no_part_is_foreign_while_the_plan_is_incomplete(output: FakeOutput) -> None:
    output.put_part(0, failed=5)
    later = output.put_part(1)
    del output.expected_rows[later]
    assert output.finalize(stopped_early=True, plan_complete=False).exit_code == 3
    assert later in output.store.stored_keys()


# --- ground truth ---------------------------------------------------------------------------------------------------


def test_truth_is_summed_over_the_parts(output: FakeOutput) -> None:
    output.put_part(0, footer_fields={"truth": {"images": 10, "right": 8}})
    output.put_part(1, in_this_run=False, footer_fields={"truth": {"images": 5, "right": 4}})
    output.put_part(2)
    result = output.finalize()
    assert result.truth == {"accuracy": 0.8, "images": 15}
    assert output.read_json("_batchjob/report.json")["truth"] == result.truth
    assert result.to_text().splitlines()[1] == "accuracy 0.8 over 15 rows with truth"


@pytest.mark.parametrize(
    ("truth", "text"),
    [
        ({"truth": "label", "images": 1000, "accuracy": 0.804}, "accuracy 0.804 over 1,000 rows with truth"),
        (
            {"images": 1, "unknown_truth": 2, "accuracy": 1.0, "top_5_accuracy": 1.0, "confusion": {"a": {"a": 1}}},
            "accuracy 1, top_5_accuracy 1 over 1 row with truth, unknown_truth 2",
        ),
        ({"images": 0, "unknown_truth": 7, "accuracy": None}, "no rows with truth, unknown_truth 7"),
        ({"mae": 0.123456}, "mae 0.1235"),
        ({}, None),
    ],
)
def test_truth_is_formatted_in_one_line(truth: dict[str, Any], text: str | None) -> None:
    read_json = RunResult("complete", 1, 1, 0, output="out", truth=truth).to_text().splitlines()
    assert read_json[1:-1] == ([] if text is None else [text])


# --- results as text and JSON ---------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("error", "status", "code"),
    [
        (InvalidJob("no such key"), "invalid", 2),
        (CheckFailed("foreign part"), "over_budget", 3),
        (Incomplete("shards gave up"), "incomplete", 4),
        (AttemptFailed("disk full"), "incomplete", 4),
        (Temporary("not there yet"), "temporary", 75),
        (Unavailable("no network"), "temporary", 75),
        (BatchjobError("a bug"), "crashed", 1),
        (ValueError("a bug"), "crashed", 1),
        (KeyboardInterrupt(), "temporary", 75),
    ],
)
def test_every_error_has_its_exit_code(error: BaseException, status: str, code: int) -> None:
    result = RunResult.from_error(error, "out", 1.5)
    assert (result.status, result.exit_code, result.output, result.seconds) == (status, code, "out", 1.5)
    assert result.to_text() == result.message
    if isinstance(error, BatchjobError):
        assert result.message == error.message
    elif isinstance(error, ValueError):
        assert result.message == "ValueError: a bug"
    else:
        assert "resumes" in result.message


def test_run_result_is_one_line_of_json() -> None:
    text = RunResult("complete", 12, 11, 1, 4.00049, 2.99999, "out", 0).to_json()
    assert "\n" not in text
    content = json.loads(text)
    expected_names = "status planned predicted failed seconds images_per_second output exit_code"
    assert (
        content.items()
        >= dict(zip(expected_names.split(), ["complete", 12, 11, 1, 4.0, 3.0, "out", 0], strict=True)).items()
    )


@pytest.mark.parametrize(
    ("result", "text"),
    [
        (
            RunResult("complete", 1200, 1199, 1, 4.0, 300.0, "out"),
            "out: complete: 1,200 images, 1,199 predicted, 1 failed in 4.0 s, 300.0 images/s",
        ),
        (
            RunResult("complete", 300, 299, 1, seconds=15.0, images_per_second=4.0, output="out"),
            "out: complete: 300 images, 299 predicted, 1 failed; 60 of them in this run, in 15.0 s, 4.0 images/s",
        ),
        (
            RunResult("already_complete", 3, 3, 0, output="out"),
            "out: already complete: 3 images, 3 predicted, 0 failed",
        ),
    ],
)
def test_run_result_without_a_message_shows_its_counts(result: RunResult, text: str) -> None:
    assert result.to_text().splitlines()[0] == text


@pytest.mark.parametrize(
    ("result", "last"),
    [
        (RunResult("complete", 3, 2, 1, output="out"), "rows: out/predictions/*.parquet; next: `batchjob errors out`"),
        (
            RunResult("already_complete", 3, 3, 0, output="s3://b/out/", truth={"accuracy": 0.5, "images": 3}),
            "rows: s3://b/out/predictions/*.parquet; next: `batchjob status s3://b/out/`",
        ),
        (RunResult("incomplete", 3, 2, 0, output="out", exit_code=4, message="run again"), "run again"),
        (RunResult("complete", 3, 3, 0), "None: complete: 3 images, 3 predicted, 0 failed"),
    ],
)
def test_last_line_says_where_the_rows_are_and_what_to_type_next(result: RunResult, last: str) -> None:
    assert result.to_text().splitlines()[-1] == last


def test_plan_summary_as_text() -> None:
    (text,) = PlanSummary("ab", 5000, 3, 2000, "out", 1.25).lines()
    assert text == "plan ab in out: 5,000 images in 3 shards of 2,000, written in 1.2 s"
