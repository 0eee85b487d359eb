"""What a driver knows of its output, and the end of a run: parts against plan, error budget, report, `_SUCCESS`."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Mapping
from dataclasses import asdict, dataclass, field, replace
from typing import Any

import batchjob
from batchjob.concurrency import run_in_background
from batchjob.driver.existing_output import Heartbeat, delete_stale_parts
from batchjob.driver.run_state import find_exceeded_limit
from batchjob.driver.scheduler import AbandonedShard
from batchjob.errors import CheckFailed, Incomplete, Temporary
from batchjob.job.runtime import ErrorBudget
from batchjob.output import success
from batchjob.output.commit import list_parts as parts_of_commit
from batchjob.output.commit import read_footers
from batchjob.output.provenance import PartFooter, ShardResult
from batchjob.output.success import Part, Totals
from batchjob.plan.head import PlanHead, is_discarded
from batchjob.report.run_result import RunResult
from batchjob.storage.objects import ObjectInfo
from batchjob.storage.store import Store
from batchjob.text import format_count
from batchjob.types import ShardKey
from batchjob.worker.messages import WorkerInfo

__all__ = ["RunSummary", "finalize_run"]

Summarize = Callable[[Mapping[str, float]], dict[str, Any]]


@dataclass(frozen=True)
class RunSummary:
    """What a driver did.

    Attributes:
        expected: rows of each part of the plan, by name; of all of them if `whole`.
        fresh: shards it saw committed, by part.
        given_up: shards that failed as often as they may.
        workers: that it had.
        seconds: wall time.
        older: what is known of parts that were there before, with the tag they were read under.
        stopped_early: it handed out no more because it was over the error budget.
    """

    expected_rows: Mapping[str, int]
    new_parts: Mapping[str, ShardResult]
    given_up: tuple[AbandonedShard, ...]
    workers: tuple[WorkerInfo, ...]
    seconds: float
    existing_parts: Mapping[str, tuple[PartFooter, str | None]] = field(default_factory=dict)
    plan_complete: bool = True
    stopped_early: bool = False


def finalize_run(
    store: Store, head: PlanHead, run: RunSummary, *, budget: ErrorBudget, summarize: Summarize, heartbeat: Heartbeat
) -> RunResult:
    """Verify, report, and put `_SUCCESS` when every shard is there and the budget holds.

    Args:
        budget: how many error rows there may be.
        summary: from the sums of all parts, how right the rows were.
        beat: called all along, to keep the lease.

    Raises:
        CheckFailed: parts and plan disagree.
    """
    there = run_in_background(lambda: parts_of_commit(store), heartbeat)
    # A worker lost between its PUT and its answer has committed all the same.
    run = replace(run, given_up=tuple(gone for gone in run.given_up if not _stands(gone.key, run, there)))
    there = _checked_names(store, run, there, heartbeat)
    parts, totals = _add_up(store, head, run, there, heartbeat)
    outcome = replace(_outcome(store, run, totals, budget), truth=summarize(totals.truth))
    facts = _facts(head, run, totals, outcome)

    def wanted() -> None:
        if is_discarded(store, head):
            raise Temporary(f"{store.uri}: the plan was discarded while this run was ending; run again")

    def write() -> None:
        success.write_report(store, facts | {"tuning": _decisions(store, head)})
        if outcome.exit_code == 0:
            success.write_success(store, facts, parts, wanted)

    run_in_background(write, heartbeat)
    return outcome


def _stands(key: ShardKey, run: RunSummary, there: Mapping[str, ObjectInfo]) -> bool:
    """Whether the shard's part is there, at a retry the new one."""
    return key.part_key in there and not (
        key.revision and run.existing_parts[key.part_key][1] == there[key.part_key].etag
    )


def _checked_names(
    store: Store, run: RunSummary, there: Mapping[str, ObjectInfo], beat: Heartbeat
) -> dict[str, ObjectInfo]:
    """The plan's own parts. Raises CheckFailed where one is missing, or a foreign one lies beside them."""
    given_up = {gone.key.part_key for gone in run.given_up}
    missing = sorted(run.expected_rows.keys() - there.keys() - given_up)
    if gone := [
        name for name in missing if not run.stopped_early or name in run.new_parts or name in run.existing_parts
    ]:
        raise CheckFailed(f"{store.uri}: {', '.join(gone[:3])} vanished after its commit; run again to redo it")
    if run.plan_complete:
        delete_stale_parts(store, there.keys() - run.expected_rows.keys(), beat)
    return {key: stat for key, stat in there.items() if key in run.expected_rows}


def _add_up(
    store: Store, head: PlanHead, run: RunSummary, there: Mapping[str, ObjectInfo], beat: Heartbeat
) -> tuple[list[Part], Totals]:
    parts, totals = [], Totals()
    for key, made in _made(store, run, there, beat):
        if (made.plan, made.rows) != (head.plan, run.expected_rows[key]):
            raise CheckFailed(
                f"{store.uri}/{key} says {made.rows} rows of plan {made.plan}, the plan {head.plan} says "
                f"{run.expected_rows[key]} rows; remove it and run again"
            )
        totals.add(made)
        if key in run.new_parts:
            totals.examples = {**run.new_parts[key].error_examples, **totals.examples}
        parts.append(Part(key, made.rows, made.failed, there[key].etag, there[key].size))
        beat()
    return sorted(parts, key=lambda part: part.name), totals


def _made(
    store: Store, run: RunSummary, there: Mapping[str, ObjectInfo], beat: Heartbeat
) -> Iterator[tuple[str, PartFooter]]:
    """Provenance of every part: as this run learned it while the tag still stands, else read from its footer."""
    seen = {**run.existing_parts, **{key: (result.footer, result.etag) for key, result in run.new_parts.items()}}
    known = {key: made for key, (made, etag) in seen.items() if key in there and etag and etag == there[key].etag}
    yield from read_footers(store, sorted(there.keys() - known.keys()), beat)
    yield from sorted(known.items())


def _outcome(store: Store, run: RunSummary, totals: Totals, budget: ErrorBudget) -> RunResult:
    planned = sum(run.expected_rows.values())
    status, code, message = "complete", 0, ""
    limit = find_exceeded_limit(budget, totals.failed, planned)
    unfinished = run.stopped_early and totals.rows < planned
    if run.given_up and not unfinished:
        status, code, message = Incomplete.status, Incomplete.exit_code, _given_up(run)
    elif limit:
        said = _stopped_early(totals, planned) if unfinished else _over_budget(totals, planned)
        message = f"{said}, {limit}; {_worst(totals)}; see `batchjob errors {store.uri}`"
        message += "; errors.abort_early=false does the rest all the same" if unfinished else ""
        status, code = CheckFailed.status, CheckFailed.exit_code
    rate = sum(result.key.images_to_read for result in run.new_parts.values()) / max(run.seconds, 1e-9)
    good = totals.rows - totals.failed
    return RunResult(status, planned, good, totals.failed, run.seconds, rate, store.uri, code, message)


def _given_up(run: RunSummary) -> str:
    first = run.given_up[0]
    return (
        f"{format_count(len(run.given_up), 'shard')} gave up after all attempts, the first, number "
        f"{first.key.index}, with: "
        f"{first.reason}; the same command tries again"
    )


def _over_budget(totals: Totals, planned: int) -> str:
    return f"{totals.failed:,} of {format_count(planned, 'image')} failed"


def _stopped_early(totals: Totals, planned: int) -> str:
    return f"stopped early: {totals.failed:,} of {totals.rows:,} images failed so far, of {planned:,} planned"


def _worst(totals: Totals) -> str:
    worst, count = totals.errors.most_common(1)[0]
    example = totals.examples.get(worst)
    return f"most often {worst} ({count:,}{f', such as {example}' if example else ''})"


def _decisions(store: Store, head: PlanHead) -> list[Any]:
    """How each kind of device was tuned, as it lies beside the plan."""
    found = sorted(stat.uri for stat in store.list(f"{head.folder}tuning/"))
    return [json.loads(store.read(key).data) for key in found]


def _facts(head: PlanHead, run: RunSummary, totals: Totals, outcome: RunResult) -> dict[str, Any]:
    """What `report.json` and `_SUCCESS` say."""
    return {
        "status": outcome.status,
        "stopped_early": run.stopped_early,
        "plan": head.plan,
        "counts": {"planned": outcome.planned, "predicted": outcome.predicted, "failed": outcome.failed},
        "errors": dict(totals.errors.most_common()),
        "examples": totals.examples,
        "seconds": {
            **{stage: round(spent, 3) for stage, spent in totals.seconds.items()},
            "wall": round(run.seconds, 3),
        },
        "images_per_second": outcome.images_per_second,
        "truth": outcome.truth,
        "recipes": dict(totals.execution_configs.most_common()),
        "workers": [asdict(worker) for worker in run.workers],
        "batchjob": batchjob.__version__,
    }
