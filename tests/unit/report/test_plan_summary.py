"""Summary of a plan in one human-readable line."""

from __future__ import annotations

import pytest

from batchjob.report.plan_summary import PlanSummary


@pytest.mark.parametrize(
    ("summary", "line"),
    [
        (PlanSummary("ab", 1, 1, 2000, "out", 0.0), "plan ab in out: 1 image in 1 shard of 2,000, written in 0.0 s"),
        (PlanSummary("ab", 0, 1, 10, "out", 0.04), "plan ab in out: 0 images in 1 shard of 10, written in 0.0 s"),
        (
            PlanSummary("ab", 12_345_678, 1235, 10_000, "s3://b/out", 71.26),
            "plan ab in s3://b/out: 12,345,678 images in 1,235 shards of 10,000, written in 71.3 s",
        ),
    ],
    ids=["singular", "empty", "large"],
)
def test_counts_have_plurals_and_thousands_separators(summary: PlanSummary, line: str) -> None:
    assert summary.lines() == [line]
