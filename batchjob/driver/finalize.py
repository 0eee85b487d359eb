"""What a driver knows of its output, and the end of a run: parts against plan, error budget, report, `_SUCCESS`."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Mapping
from dataclasses import asdict, dataclass, field, replace
from typing import Any

import batchjob
from batchjob.concurrency import aside
from batchjob.driver.existing_output import Beat, clear_foreign
from batchjob.driver.run_state import exceeded
from batchjob.driver.scheduler import GivenUp
from batchjob.errors import CheckFailed, Incomplete, Temporary
from batchjob.job.runtime import ErrorBudget
from batchjob.output import success
from batchjob.output.commit import inspect_all
from batchjob.output.commit import parts as parts_of_commit
from batchjob.output.provenance import Provenance, ShardResult
from batchjob.output.success import Part, Totals
from batchjob.plan.head import Head, is_discarded
from batchjob.report.run_result import Outcome
from batchjob.storage.objects import Stat
from batchjob.storage.store import Store
from batchjob.text import counted
from batchjob.types import ShardKey
from batchjob.worker.messages import Loaded

__all__ = ["Run", "conclude"]

Summary = Callable[[Mapping[str, float]], dict[str, Any]]


@dataclass(frozen=True)
class Run:
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

    expected: Mapping[str, int]
    fresh: Mapping[str, ShardResult]
    given_up: tuple[GivenUp, ...]
    workers: tuple[Loaded, ...]
    seconds: float
    older: Mapping[str, tuple[Provenance, str | None]] = field(default_factory=dict)
    whole: bool = True
    stopped_early: bool = False


def conclude(store: Store, head: Head, run: Run, *, budget: ErrorBudget, summary: Summary, beat: Beat) -> Outcome:
    """Verify, report, and put `_SUCCESS` when every shard is there and the budget holds.

    Args:
        budget: how many error rows there may be.
        summary: from the sums of all parts, how right the rows were.
        beat: called all along, to keep the lease.

    Raises:
        CheckFailed: parts and plan disagree.
    """
    there = aside(lambda: parts_of_commit(store), beat)
    # A worker lost between its PUT and its answer has committed all the same.
    run = replace(run, given_up=tuple(gone for gone in run.given_up if not _stands(gone.key, run, there)))
    there = _checked_names(store, run, there, beat)
    parts, totals = _add_up(store, head, run, there, beat)
    outcome = replace(_outcome(store, run, totals, budget), truth=summary(totals.truth))
    facts = _facts(head, run, totals, outcome)

    def wanted() -> None:
        if is_discarded(store, head):
            raise Temporary(f"{store.uri}: the plan was discarded while this run was ending; run again")

    def write() -> None:
        success.write_report(store, facts | {"tuning": _decisions(store, head)})
        if outcome.exit_code == 0:
            success.write_success(store, facts, parts, wanted)

    aside(write, beat)
    return outcome


def _stands(key: ShardKey, run: Run, there: Mapping[str, Stat]) -> bool:
    """Whether the shard's part is there, at a retry the new one."""
    return key.part in there and not (key.revision and run.older[key.part][1] == there[key.part].etag)


def _checked_names(store: Store, run: Run, there: Mapping[str, Stat], beat: Beat) -> dict[str, Stat]:
    """The plan's own parts. Raises CheckFailed where one is missing, or a foreign one lies beside them."""
    given_up = {gone.key.part for gone in run.given_up}
    missing = sorted(run.expected.keys() - there.keys() - given_up)
    if gone := [name for name in missing if not run.stopped_early or name in run.fresh or name in run.older]:
        raise CheckFailed(f"{store.uri}: {', '.join(gone[:3])} vanished after its commit; run again to redo it")
    if run.whole:
        clear_foreign(store, there.keys() - run.expected.keys(), beat)
    return {key: stat for key, stat in there.items() if key in run.expected}


def _add_up(store: Store, head: Head, run: Run, there: Mapping[str, Stat], beat: Beat) -> tuple[list[Part], Totals]:
    parts, totals = [], Totals()
    for key, made in _made(store, run, there, beat):
        if (made.plan, made.rows) != (head.plan, run.expected[key]):
            raise CheckFailed(
                f"{store.uri}/{key} says {made.rows} rows of plan {made.plan}, the plan {head.plan} says "
                f"{run.expected[key]} rows; remove it and run again"
            )
        totals.add(made)
        if key in run.fresh:
            totals.examples = {**run.fresh[key].examples, **totals.examples}
        parts.append(Part(key, made.rows, made.failed, there[key].etag, there[key].size))
        beat()
    return sorted(parts, key=lambda part: part.name), totals


def _made(store: Store, run: Run, there: Mapping[str, Stat], beat: Beat) -> Iterator[tuple[str, Provenance]]:
    """Provenance of every part: as this run learned it while the tag still stands, else read from its footer."""
    seen = {**run.older, **{key: (result.made, result.etag) for key, result in run.fresh.items()}}
    known = {key: made for key, (made, etag) in seen.items() if key in there and etag and etag == there[key].etag}
    yield from inspect_all(store, sorted(there.keys() - known.keys()), beat)
    yield from sorted(known.items())


def _outcome(store: Store, run: Run, totals: Totals, budget: ErrorBudget) -> Outcome:
    planned = sum(run.expected.values())
    status, code, message = "complete", 0, ""
    limit = exceeded(budget, totals.failed, planned)
    unfinished = run.stopped_early and totals.rows < planned
    if run.given_up and not unfinished:
        status, code, message = Incomplete.status, Incomplete.exit_code, _given_up(run)
    elif limit:
        said = _stopped_early(totals, planned) if unfinished else _over_budget(totals, planned)
        message = f"{said}, {limit}; {_worst(totals)}; see `batchjob errors {store.uri}`"
        message += "; errors.abort_early=false does the rest all the same" if unfinished else ""
        status, code = CheckFailed.status, CheckFailed.exit_code
    rate = sum(result.key.images for result in run.fresh.values()) / max(run.seconds, 1e-9)
    good = totals.rows - totals.failed
    return Outcome(status, planned, good, totals.failed, run.seconds, rate, store.uri, code, message)


def _given_up(run: Run) -> str:
    first = run.given_up[0]
    return (
        f"{counted(len(run.given_up), 'shard')} gave up after all attempts, the first, number {first.key.index}, with: "
        f"{first.reason}; the same command tries again"
    )


def _over_budget(totals: Totals, planned: int) -> str:
    return f"{totals.failed:,} of {counted(planned, 'image')} failed"


def _stopped_early(totals: Totals, planned: int) -> str:
    return f"stopped early: {totals.failed:,} of {totals.rows:,} images failed so far, of {planned:,} planned"


def _worst(totals: Totals) -> str:
    worst, count = totals.errors.most_common(1)[0]
    example = totals.examples.get(worst)
    return f"most often {worst} ({count:,}{f', such as {example}' if example else ''})"


def _decisions(store: Store, head: Head) -> list[Any]:
    """How each kind of device was tuned, as it lies beside the plan."""
    found = sorted(stat.uri for stat in store.list(f"{head.folder}tuning/"))
    return [json.loads(store.read(key).data) for key in found]


def _facts(head: Head, run: Run, totals: Totals, outcome: Outcome) -> dict[str, Any]:
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
        "recipes": dict(totals.recipes.most_common()),
        "workers": [asdict(worker) for worker in run.workers],
        "batchjob": batchjob.__version__,
    }
