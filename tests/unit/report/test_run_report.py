"""Report of a run, and the tuning decisions that go into it."""

from __future__ import annotations

import json
from collections import Counter
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

import batchjob
from batchjob.output.success import Totals
from batchjob.plan.head import PlanHead
from batchjob.report.run_report import build_run_report, read_tuning_records
from batchjob.report.run_result import RunResult
from batchjob.storage.store import Store, open_store

HEAD = PlanHead("0123456789abcdef", 3, {}, {}, 10, None, "1")
RESULT = RunResult("complete", 30, 27, 3, 4.00049, 7.5, "out", truth={"accuracy": 0.5})
TOTALS = Totals(
    rows=30,
    failed=3,
    errors=Counter({"fetch/not_found": 1, "decode/truncated": 2}),
    examples={"decode/truncated": "1.png: ends too early"},
    seconds={"wall": 9.0, "decode": 1.23456},
    execution_configs=Counter({"eager fp32": 10, "compiled bf16": 20}),
)


def build(result: RunResult = RESULT, totals: Totals = TOTALS, *, stopped_early: bool = False) -> dict[str, Any]:
    return build_run_report(HEAD, result, totals, workers=[{"device": "cpu"}], stopped_early=stopped_early)


@pytest.fixture
def store(tmp_path: Path) -> Store:
    return open_store(str(tmp_path / "out"))


def test_report_holds_the_plan_the_result_and_the_version() -> None:
    report = build()
    assert (
        report.items()
        >= {
            "status": "complete",
            "plan": "0123456789abcdef",
            "counts": {"planned": 30, "predicted": 27, "failed": 3},
            "images_per_second": 7.5,
            "truth": {"accuracy": 0.5},
            "workers": [{"device": "cpu"}],
            "examples": {"decode/truncated": "1.png: ends too early"},
            "batchjob": batchjob.__version__,
        }.items()
    )


def test_report_survives_json_unchanged() -> None:
    report = build()
    assert json.loads(json.dumps(report)) == report


@pytest.mark.parametrize(
    ("key", "names"),
    [("errors", ["decode/truncated", "fetch/not_found"]), ("recipes", ["compiled bf16", "eager fp32"])],
)
def test_most_frequent_error_and_execution_config_come_first(key: str, names: list[str]) -> None:
    assert list(build()[key]) == names


def test_wall_time_is_that_of_the_run_and_not_the_sum_of_the_parts() -> None:
    # Each part counts from its first batch to its commit, and parts overlap: their sum is 9 s in a run of 4 s.
    assert build()["seconds"] == {"wall": 4.0, "decode": 1.235}


@pytest.mark.parametrize("stopped_early", [True, False])
def test_run_that_stopped_early_says_so(stopped_early: bool) -> None:
    report = build(replace(RESULT, status="over_budget"), stopped_early=stopped_early)
    assert (report["status"], report["stopped_early"]) == ("over_budget", stopped_early)


def test_plan_without_tuning_has_no_tuning_records(store: Store) -> None:
    assert read_tuning_records(store, HEAD) == []


def test_tuning_records_of_this_plan_come_in_the_order_of_their_keys(store: Store) -> None:
    store.put_if_absent("_batchjob/plans/0003/tuning/b.json", b'{"device": "H200"}')
    store.put_if_absent("_batchjob/plans/0003/tuning/a.json", b'{"device": "cpu"}')
    store.put_if_absent("_batchjob/plans/0002/tuning/a.json", b'{"device": "of a discarded plan"}')
    assert read_tuning_records(store, HEAD) == [{"device": "cpu"}, {"device": "H200"}]
