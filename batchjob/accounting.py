"""The end of a run: what lies there against what was planned, the error budget, the report, `_SUCCESS`."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import asdict, dataclass, replace
from typing import Any

import batchjob
from batchjob import ledger, plan
from batchjob.errors import CheckFailed, Incomplete, NotFound
from batchjob.ledger import Part, Totals
from batchjob.plan import Head
from batchjob.pool import Loaded
from batchjob.records import Provenance, ShardResult, Stat
from batchjob.report import Outcome
from batchjob.schedule import GivenUp
from batchjob.storage import Store

__all__ = ["Run", "clear_foreign", "conclude"]


@dataclass(frozen=True)
class Run:
    """What a driver did: parts it expects (name → rows), shards it saw committed, those given up, workers, seconds."""

    expected: Mapping[str, int]
    fresh: Mapping[str, ShardResult]
    given_up: tuple[GivenUp, ...]
    workers: tuple[Loaded, ...]
    seconds: float


def conclude(store: Store, head: Head, run: Run, *, max_rate: float, beat: Callable[[], None]) -> Outcome:
    """Verify, report, and put `_SUCCESS` when every shard is there and the budget holds.

    Args:
        max_rate: share of the planned images that may be error rows.
        beat: called between reads, to keep the lease.

    Raises:
        CheckFailed: parts and plan disagree.
    """
    there = ledger.parts(store)
    # A worker lost between its PUT and its answer has committed all the same.
    run = replace(run, given_up=tuple(gone for gone in run.given_up if gone.key.part not in there))
    there = _checked_names(store, run, there)
    parts, totals = _add_up(store, head, run, there, beat)
    outcome = _outcome(store, run, totals, max_rate)
    facts = _facts(head, run, totals, outcome)
    ledger.write_report(store, facts)
    if outcome.exit_code == 0:
        ledger.write_success(store, facts, parts)
    return outcome


def clear_foreign(store: Store, names: Iterable[str]) -> None:
    """Delete these parts where a discarded plan left them.

    Raises:
        CheckFailed: one is of no such plan.
    """
    for key in sorted(names):
        try:
            made = ledger.inspect(store, key)
        except NotFound:
            continue
        if not plan.is_buried(store, made.plan):
            raise CheckFailed(
                f"{store.uri}/{key} is a part of plan {made.plan}, not of this output's; remove it and run again"
            )
        store.delete(key)


def _checked_names(store: Store, run: Run, there: Mapping[str, Stat]) -> dict[str, Stat]:
    """The plan's own parts. Raises CheckFailed where one is missing, or a foreign one lies beside them."""
    given_up = {gone.key.part for gone in run.given_up}
    if missing := sorted(run.expected.keys() - there.keys() - given_up):
        raise CheckFailed(f"{store.uri}: {', '.join(missing[:3])} vanished after its commit; run again to redo it")
    clear_foreign(store, there.keys() - run.expected.keys())
    return {key: stat for key, stat in there.items() if key in run.expected}


def _add_up(
    store: Store, head: Head, run: Run, there: Mapping[str, Stat], beat: Callable[[], None]
) -> tuple[list[Part], Totals]:
    parts, totals = [], Totals()
    for key, made in _made(store, run, there):
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


def _made(store: Store, run: Run, there: Mapping[str, Stat]) -> Iterator[tuple[str, Provenance]]:
    """Provenance of every part: as its commit returned it while the tag still stands, else read from its footer."""
    known = {
        key: result.made
        for key, result in run.fresh.items()
        if key in there and result.etag and result.etag == there[key].etag
    }
    yield from ledger.inspect_all(store, sorted(there.keys() - known.keys()))
    yield from sorted(known.items())


def _outcome(store: Store, run: Run, totals: Totals, max_rate: float) -> Outcome:
    planned = sum(run.expected.values())
    status, code, message = "complete", 0, ""
    if run.given_up:
        status, code, message = Incomplete.status, Incomplete.exit_code, _given_up(run)
    elif planned and totals.failed / planned > max_rate:  # divided, for 0.29 * 100 is less than 29
        status, code, message = (
            CheckFailed.status,
            CheckFailed.exit_code,
            _over_budget(store, totals, planned, max_rate),
        )
    rate = sum(result.made.rows for result in run.fresh.values()) / max(run.seconds, 1e-9)
    good = totals.rows - totals.failed
    return Outcome(status, planned, good, totals.failed, run.seconds, rate, store.uri, code, message)


def _given_up(run: Run) -> str:
    first = run.given_up[0]
    return (
        f"{len(run.given_up)} shards gave up after their attempts, the first, number {first.key.index}, with: "
        f"{first.reason}; the same command tries them again"
    )


def _over_budget(store: Store, totals: Totals, planned: int, max_rate: float) -> str:
    worst, count = totals.errors.most_common(1)[0]
    example = totals.examples.get(worst)
    return (
        f"{totals.failed:,} of {planned:,} images failed, errors.max_rate allows {max_rate:.2%}; most often {worst} "
        f"({count:,}{f', such as {example}' if example else ''}); see `batchjob errors {store.uri}`"
    )


def _facts(head: Head, run: Run, totals: Totals, outcome: Outcome) -> dict[str, Any]:
    """What `report.json` and `_SUCCESS` say."""
    return {
        "status": outcome.status,
        "plan": head.plan,
        "counts": {"planned": outcome.planned, "predicted": outcome.predicted, "failed": outcome.failed},
        "errors": dict(totals.errors.most_common()),
        "examples": totals.examples,
        "seconds": {"wall": run.seconds, **{stage: round(spent, 3) for stage, spent in totals.seconds.items()}},
        "images_per_second": outcome.images_per_second,
        "workers": [asdict(worker) for worker in run.workers],
        "batchjob": batchjob.__version__,
    }
