"""The end of a run: parts against plan, the error budget, the report, `_SUCCESS`, and what the user reads."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from memory_store import Fault, MemoryStore

from batchjob.driver.existing_output import delete_stale_parts
from batchjob.driver.finalize import RunSummary, finalize_run
from batchjob.driver.scheduler import AbandonedShard
from batchjob.errors import AttemptFailed, BatchjobError, CheckFailed, Incomplete, InvalidJob, Temporary, Unavailable
from batchjob.job.runtime import ErrorBudget
from batchjob.output import success
from batchjob.output.provenance import PartFooter, ShardResult
from batchjob.plan.head import PlanHead, discard_plan, new_head
from batchjob.plan.head import put_head as freeze_of_head
from batchjob.report.plan_summary import PlanSummary
from batchjob.report.run_result import RunResult
from batchjob.types import ShardKey
from batchjob.worker.messages import WorkerInfo

WORKER = WorkerInfo("cpu", "fp32", "net@000000000000", ("score",), batch_size=4, seconds=1.5)


class Output:
    """A frozen plan in memory, and the parts that a test puts there."""

    def __init__(self, spool: Path) -> None:
        self._spool = spool
        self.store = MemoryStore()
        self.head = self.freeze(0)
        self.expected: dict[str, int] = {}
        self.fresh: dict[str, ShardResult] = {}
        self.beats = 0

    def freeze(self, number: int) -> PlanHead:
        head = new_head(number, job={}, fingerprint={}, shard_size=10, source_version=None, batchjob="1")
        return freeze_of_head(self.store, head)

    def put(
        self, index: int, rows: int = 10, failed: int = 0, *, fresh: bool = True, says: Mapping[str, Any] = {}
    ) -> str:
        """Plan a shard and commit its part; its footer `says` something else, where asked. Returns its key."""
        key = ShardKey(index, f"{index:016x}", rows, 0, 0)
        made = PartFooter(
            plan=self.head.plan,
            shard=key.id,
            index=index,
            attempt=f"attempt-{index}",
            revision=0,
            fingerprint="f",
            model="m",
            rows=rows,
            failed=failed,
            errors={"decode/truncated": failed} if failed else {},
            seconds={"wall": 2.0, "predict": 0.25},
            versions={},
        )
        made = replace(made, **says)
        self.expected[key.part_key] = rows
        path = self._spool / key.id
        table = pa.table({"position": range(rows)}).replace_schema_metadata({PartFooter.KEY: made.to_json()})
        pq.write_table(table, path)
        stat = self.store.put_if_absent(key.part_key, path)
        if fresh:
            examples = dict.fromkeys(made.errors, f"{index}.png: ends too early")
            self.fresh[key.part_key] = ShardResult(key, made, examples, True, stat.etag)
        return key.part_key

    def give_up(self, index: int, reason: str = "worker 0 was lost") -> AbandonedShard:
        key = ShardKey(index, f"{index:016x}", 10, 0, 0)
        self.expected[key.part_key] = 10
        return AbandonedShard(key, reason)

    def conclude(
        self, *given_up: AbandonedShard, max_count: int | None = None, max_rate: float = 0.01, **run: Any
    ) -> RunResult:
        ran = RunSummary(self.expected, self.fresh, given_up, (WORKER,), 4.0, **run)
        budget = ErrorBudget(max_rate=max_rate, max_count=max_count)
        return finalize_run(self.store, self.head, ran, budget=budget, summarize=self.summary, heartbeat=self.beat)

    def summary(self, sums: Mapping[str, float]) -> dict[str, Any]:
        return {"accuracy": sums["right"] / sums["images"], "images": sums["images"]} if sums else {}

    def beat(self) -> None:
        self.beats += 1

    def footers_read(self) -> set[str]:
        return {call.key for call in self.store.calls if call.method == "read_tail"}

    def said(self, key: str) -> dict[str, Any]:
        facts: dict[str, Any] = json.loads(self.store.read(key).data)
        return facts

    @property
    def finished(self) -> bool:
        return success.SUCCESS in self.store.stored_keys()


@pytest.fixture
def output(tmp_path: Path) -> Output:
    return Output(tmp_path)


# --- sums -----------------------------------------------------------------------------------------------------------


def test_the_sums_are_those_of_the_parts(output: Output) -> None:
    output.put(0, failed=1)
    output.put(1, rows=7, failed=2)
    outcome = output.conclude(max_rate=0.5)
    assert outcome == RunResult("complete", 17, 14, 3, 4.0, 17 / 4.0, output.store.uri, 0, "")
    facts = output.said("_SUCCESS")
    assert facts["plan"] == output.head.plan
    assert facts["counts"] == {"planned": 17, "predicted": 14, "failed": 3}
    assert facts["errors"] == {"decode/truncated": 3}
    assert facts["examples"] == {"decode/truncated": "0.png: ends too early"}
    assert facts["seconds"] == {"wall": 4.0, "predict": 0.5}
    assert facts["workers"][0]["device"] == "cpu"
    assert facts["parts"][1].items() >= {"name": sorted(output.expected)[1], "rows": 7, "failed": 2}.items()


def test_success_comes_last(output: Output) -> None:
    output.put(0)
    output.conclude()
    assert output.store.written_keys()[-2:] == ["_batchjob/report.json", "_SUCCESS"]


def test_the_lease_is_kept_meanwhile(output: Output) -> None:
    for index in range(5):
        output.put(index)
    output.conclude()
    assert output.beats >= 5


def test_only_footers_that_are_not_known_are_read(output: Output) -> None:
    older = output.put(0, fresh=False)
    output.put(1)
    changed = output.put(2)
    untagged = output.put(3)
    output.fresh[changed] = replace(output.fresh[changed], etag="another")
    output.fresh[untagged] = replace(output.fresh[untagged], etag=None)
    outcome = output.conclude()
    assert output.footers_read() == {older, changed, untagged}
    assert (outcome.planned, outcome.images_per_second) == (40, 30 / 4.0)  # this run's own rows make its speed
    assert [part["name"] for part in output.said("_SUCCESS")["parts"]] == sorted(output.expected)


def test_a_report_and_a_success_that_stand_are_replaced(output: Output) -> None:
    output.put(0, failed=1)
    assert output.conclude().exit_code == 3
    assert output.conclude(max_rate=0.1).exit_code == 0
    before = output.said("_SUCCESS")
    output.put(1)
    assert output.conclude(max_rate=0.1).exit_code == 0
    assert len(output.said("_SUCCESS")["parts"]) == len(before["parts"]) + 1
    assert output.said("_batchjob/report.json")["counts"]["planned"] == 20


@pytest.mark.parametrize("fault", [Fault.LOST, Fault.REPEATED, Fault.CONFLICT])
def test_a_success_whose_answer_was_lost_stands(output: Output, fault: Fault) -> None:
    output.put(0)
    output.store.inject("put_if_absent", "_SUCCESS", fault)
    if fault is Fault.LOST:
        with pytest.raises(Unavailable):
            output.conclude()
    assert output.conclude().exit_code == 0
    assert output.said("_SUCCESS")["plan"] == output.head.plan


# --- checks ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("odd", [{"rows": 9}, {"plan": "another"}])
def test_a_part_that_is_not_what_was_planned_is_an_alarm(output: Output, odd: Mapping[str, Any]) -> None:
    output.put(0)
    key = output.put(1, fresh=False, says=odd)
    with pytest.raises(CheckFailed, match=f"{key} says .* rows of plan .* says 10 rows; remove it") as caught:
        output.conclude()
    assert caught.value.exit_code == 3
    assert not output.finished


def test_a_part_that_is_gone_is_an_alarm(output: Output) -> None:
    output.put(0)
    gone = output.put(1)
    output.store.delete(gone)
    with pytest.raises(CheckFailed, match=f"{gone} vanished after its commit; run again to redo it"):
        output.conclude()
    assert not output.finished


def test_a_part_of_no_plan_is_an_alarm(output: Output) -> None:
    output.put(0)
    foreign = output.put(1, says={"plan": "another"})
    del output.expected[foreign]
    with pytest.raises(CheckFailed, match=f"{foreign} is a part of plan another, not of this output's; remove it"):
        output.conclude()
    output.store.put_if_absent("predictions/notes.txt", b"mine")
    with pytest.raises(CheckFailed, match=r"notes\.txt was not written by batchjob"):
        output.conclude()
    assert foreign in output.store.stored_keys()
    assert not output.finished


def test_what_a_discarded_plan_left_is_deleted(output: Output) -> None:
    left = output.put(0)
    discard_plan(output.store, output.head)
    output.expected.clear()
    output.fresh.clear()
    output.head = replace(output.head, plan="second", number=1)
    mine = output.put(1)
    assert output.conclude().exit_code == 0
    assert left not in output.store.stored_keys()
    assert [part["name"] for part in output.said("_SUCCESS")["parts"]] == [mine]


def test_what_is_gone_already_need_not_be_deleted(output: Output) -> None:
    delete_stale_parts(output.store, ["predictions/part-0000000-gone.parquet"])


# --- shards given up ------------------------------------------------------------------------------------------------


def test_shards_given_up_leave_the_output_incomplete(output: Output) -> None:
    output.put(0)
    outcome = output.conclude(output.give_up(1, "out of memory"), output.give_up(2))
    assert (outcome.status, outcome.exit_code) == ("incomplete", 4)
    assert (outcome.planned, outcome.predicted) == (30, 10)
    assert outcome.message == (
        "2 shards gave up after all attempts, the first, number 1, with: out of memory; the same command tries again"
    )
    assert not output.finished
    assert output.said("_batchjob/report.json")["status"] == "incomplete"


def test_a_shard_that_was_committed_after_all_is_not_given_up(output: Output) -> None:
    output.put(0)
    gone = output.give_up(1)
    output.put(1, fresh=False)
    outcome = output.conclude(gone)
    assert (outcome.status, outcome.predicted) == ("complete", 20)
    assert output.finished


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
def test_the_budget_is_a_share_of_what_was_planned(
    output: Output, rows: int, failed: int, rate: float, code: int
) -> None:
    output.put(0, rows, failed)
    outcome = output.conclude(max_rate=rate)
    assert outcome.exit_code == code
    assert output.finished == (code == 0)
    assert output.said("_batchjob/report.json")["status"] == ("over_budget" if code else "complete")


def test_over_budget_the_commonest_error_is_named(output: Output) -> None:
    output.put(0, failed=3, says={"errors": {"decode/truncated": 1, "fetch/not_found": 2}})
    message = output.conclude().message
    assert message == (
        "3 of 10 images failed, errors.max_rate allows 1.00%; most often fetch/not_found (2, such as 0.png: ends too "
        "early); see `batchjob errors memory://out`"
    )


def test_without_an_example_none_is_given(output: Output) -> None:
    output.put(0, failed=1, fresh=False)
    assert "most often decode/truncated (1); see" in output.conclude().message


def test_a_count_is_a_budget_too(output: Output) -> None:
    output.put(0, rows=1000, failed=3)
    assert output.conclude(max_count=3).exit_code == 0
    outcome = output.conclude(max_count=2)
    assert outcome.exit_code == 3
    assert "3 of 1,000 images failed, errors.max_count allows 2; most often" in outcome.message


def test_a_run_that_stopped_early_misses_no_parts(output: Output) -> None:
    output.put(0, failed=5)
    output.give_up(1)
    outcome = output.conclude(stopped_early=True)
    assert (outcome.status, outcome.planned, outcome.failed) == ("over_budget", 20, 5)
    assert outcome.message.startswith("stopped early: 5 of 10 images failed so far, of 20 planned, errors.max_rate")
    assert not output.finished
    assert output.said("_batchjob/report.json")["stopped_early"]


def test_a_part_that_vanished_is_missed_though_the_run_stopped_early(output: Output) -> None:
    output.put(0, failed=5)
    gone = output.put(1)
    output.store.delete(gone)
    with pytest.raises(CheckFailed, match=f"{gone} vanished"):
        output.conclude(stopped_early=True)


def test_of_a_plan_that_is_not_whole_nothing_is_foreign(output: Output) -> None:
    output.put(0, failed=5)
    later = output.put(1)
    del output.expected[later]
    assert output.conclude(stopped_early=True, plan_complete=False).exit_code == 3
    assert later in output.store.stored_keys()


# --- how right the rows were -----------------------------------------------------------------------------------------


def test_truth_is_summed_over_the_parts(output: Output) -> None:
    output.put(0, says={"truth": {"images": 10, "right": 8}})
    output.put(1, fresh=False, says={"truth": {"images": 5, "right": 4}})
    output.put(2)
    outcome = output.conclude()
    assert outcome.truth == {"accuracy": 0.8, "images": 15}
    assert output.said("_batchjob/report.json")["truth"] == outcome.truth
    assert outcome.to_text().splitlines()[1] == "accuracy 0.8 over 15 rows with truth"


@pytest.mark.parametrize(
    ("truth", "line"),
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
def test_truth_is_told_in_a_line(truth: dict[str, Any], line: str | None) -> None:
    said = RunResult("complete", 1, 1, 0, output="out", truth=truth).to_text().splitlines()
    assert said[1:] == ([] if line is None else [line])


# --- what the user reads --------------------------------------------------------------------------------------------


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
    outcome = RunResult.from_error(error, "out", 1.5)
    assert (outcome.status, outcome.exit_code, outcome.output, outcome.seconds) == (status, code, "out", 1.5)
    assert outcome.to_text() == outcome.message
    if isinstance(error, BatchjobError):
        assert outcome.message == error.message
    elif isinstance(error, ValueError):
        assert outcome.message == "ValueError: a bug"
    else:
        assert "resumes" in outcome.message


def test_an_outcome_is_one_line_of_json() -> None:
    line = RunResult("complete", 12, 11, 1, 4.00049, 2.99999, "out", 0).to_json()
    assert "\n" not in line
    facts = json.loads(line)
    wanted = "status planned predicted failed seconds images_per_second output exit_code"
    assert facts.items() >= dict(zip(wanted.split(), ["complete", 12, 11, 1, 4.0, 3.0, "out", 0], strict=True)).items()


@pytest.mark.parametrize(
    ("outcome", "sentence"),
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
def test_an_outcome_without_a_message_gives_its_sums(outcome: RunResult, sentence: str) -> None:
    assert outcome.to_text() == sentence


def test_a_plan_in_numbers() -> None:
    (line,) = PlanSummary("ab", 5000, 3, 2000, "out", 1.25).lines()
    assert line == "plan ab in out: 5,000 images in 3 shards of 2,000, written in 1.2 s"
