"""Report of a run: the content of `report.json` and `_SUCCESS`."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import Any

from batchjob import __version__
from batchjob.output.success import Totals
from batchjob.plan.head import PlanHead
from batchjob.report.run_result import RunResult
from batchjob.storage.store import Store

__all__ = ["build_run_report", "read_tuning_records"]


def build_run_report(
    head: PlanHead, result: RunResult, totals: Totals, *, workers: Sequence[Mapping[str, Any]], stopped_early: bool
) -> dict[str, Any]:
    """Build the report of a run; its keys are stored, so they never change.

    Args:
        head: Head of the plan.
        result: Result of the run.
        totals: Sums over all parts.
        workers: Facts about each worker that the run had.
        stopped_early: True if the run stopped because it was over its error budget.
    """
    return {
        "status": result.status,
        "stopped_early": stopped_early,
        "plan": head.plan,
        "counts": {"planned": result.planned, "predicted": result.predicted, "failed": result.failed},
        "errors": dict(totals.errors.most_common()),
        "examples": totals.examples,
        "seconds": {
            **{stage: round(seconds, 3) for stage, seconds in totals.seconds.items()},
            "wall": round(result.seconds, 3),
        },
        "images_per_second": result.images_per_second,
        "truth": result.truth,
        "recipes": dict(totals.execution_configs.most_common()),
        "workers": workers,
        "batchjob": __version__,
    }


def read_tuning_records(store: Store, head: PlanHead) -> list[Any]:
    """Read the tuning decisions of a plan, one for each kind of device."""
    keys = sorted(info.uri for info in store.list(f"{head.folder}tuning/"))
    return [json.loads(store.read(key).data) for key in keys]
