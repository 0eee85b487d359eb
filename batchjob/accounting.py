"""What a driver knows of its output, and the end of a run: parts against plan, error budget, report, `_SUCCESS`."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import asdict, dataclass, field, replace
from typing import Any

import batchjob
from batchjob import ledger, plan
from batchjob.errors import CheckFailed, Incomplete, NotFound, Temporary
from batchjob.job import ErrorBudget
from batchjob.ledger import Part, Totals
from batchjob.parallel import aside, side_by_side
from batchjob.plan import Chunk, Head
from batchjob.pool import Loaded
from batchjob.records import Provenance, ShardKey, ShardResult, Stat
from batchjob.report import Outcome, counted
from batchjob.schedule import GivenUp
from batchjob.storage import Store

__all__ = ["Books", "Run", "are_leftovers", "clear_foreign", "conclude", "exceeded"]

Beat = Callable[[], object]
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


class Books:
    """What one driver knows of its output while it works: parts that are there, parts to come, and what they hold.

    Args:
        store: the output.
        beat: called while that takes time, to keep the lease.
        retry: parts with error rows are to be replaced.

    Attributes:
        pending: error rows that are still to be retried.
    """

    def __init__(self, store: Store, beat: Beat, retry: bool = False) -> None:
        self._store, self._retry = store, retry
        self._there = aside(lambda: ledger.parts(store), beat)
        self._rows = self._failed = self.pending = 0
        self.expected: dict[str, int] = {}
        self.fresh: dict[str, ShardResult] = {}
        self.older: dict[str, tuple[Provenance, str | None]] = {}
        self.planned, self.whole = 0, False

    @property
    def parts(self) -> int:
        """Parts that were there when the run began."""
        return len(self._there)

    @property
    def counts(self) -> tuple[int, int, int]:
        """Images planned so far, rows predicted, rows failed."""
        return self.planned, self._rows - self._failed, self._failed

    def look_back(self, head: Head, beat: Beat) -> None:
        """Read the footers of this plan's parts, so that the error budget counts what failed in earlier runs.

        Raises:
            CheckFailed: a part was not written by batchjob.
        """
        for key, made in _footers(self._store, self._there, beat):
            if made is not None and made.plan == head.plan:
                self.older[key] = made.compact(), self._there[key].etag
                self._count(made)
                self.pending += made.failed if self._retry else 0

    def add(self, chunk: Chunk) -> tuple[int, list[ShardKey]]:
        """Take in a chunk of the plan: images of it that are committed already, and the shards to do."""
        self.expected.update((key.part, key.rows) for key in chunk.shards)
        self.planned, self.whole = chunk.cursor.rows, chunk.last
        left = [key for key in map(self._to_do, chunk.shards) if key is not None]
        return sum(key.rows for key in chunk.shards) - sum(key.images for key in left), left

    def commit(self, result: ShardResult) -> None:
        """Count a shard that a worker of this run has seen committed."""
        key, made = result.key, result.made.compact()
        self.fresh[key.part] = replace(result, made=made)
        if key.revision:
            self._failed += made.failed - key.failed
            self.pending -= key.failed
        else:
            self._count(made)

    def clear_foreign(self, beat: Beat) -> None:
        """Look at parts that the plan, as far as it is known, does not name. See `clear_foreign`."""
        foreign = self._there.keys() - self.expected.keys()
        clear_foreign(self._store, foreign, beat)
        self._there = {key: stat for key, stat in self._there.items() if key not in foreign}

    @property
    def failed(self) -> int:
        """Error rows so far, those left out that are to be retried."""
        return self._failed - self.pending

    def exceeded(self, budget: ErrorBudget) -> str:
        """What makes it certain that the run ends over its error budget; empty while nothing does."""
        return exceeded(budget, self.failed, self.planned if self.whole else None)

    def _to_do(self, key: ShardKey) -> ShardKey | None:
        """As it is to be handed out; None where its part is there and good."""
        if key.part not in self._there:
            return key
        if not self._retry or key.part not in self.older or not (made := self.older[key.part][0]).failed:
            return None
        return replace(key, revision=made.revision + 1, failed=made.failed)

    def _count(self, made: Provenance) -> None:
        self._rows += made.rows
        self._failed += made.failed


def exceeded(budget: ErrorBudget, failed: int, planned: int | None) -> str:
    """Which setting allows fewer error rows, and how many; empty where none does.

    Args:
        budget: the limits.
        failed: error rows.
        planned: images, None where not all are known yet.
    """
    if budget.max_count is not None and failed > budget.max_count:
        return f"errors.max_count allows {budget.max_count:,}"
    if planned and failed / planned > budget.max_rate:  # divided, for 0.29 * 100 is less than 29
        return f"errors.max_rate allows {budget.max_rate:.2%}"
    return ""


def conclude(store: Store, head: Head, run: Run, *, budget: ErrorBudget, summary: Summary, beat: Beat) -> Outcome:
    """Verify, report, and put `_SUCCESS` when every shard is there and the budget holds.

    Args:
        budget: how many error rows there may be.
        summary: from the sums of all parts, how right the rows were.
        beat: called all along, to keep the lease.

    Raises:
        CheckFailed: parts and plan disagree.
    """
    there = aside(lambda: ledger.parts(store), beat)
    # A worker lost between its PUT and its answer has committed all the same.
    run = replace(run, given_up=tuple(gone for gone in run.given_up if not _stands(gone.key, run, there)))
    there = _checked_names(store, run, there, beat)
    parts, totals = _add_up(store, head, run, there, beat)
    outcome = replace(_outcome(store, run, totals, budget), truth=summary(totals.truth))
    facts = _facts(head, run, totals, outcome)

    def wanted() -> None:
        if plan.is_discarded(store, head):
            raise Temporary(f"{store.uri}: the plan was discarded while this run was ending; run again")

    def write() -> None:
        ledger.write_report(store, facts | {"tuning": _decisions(store, head)})
        if outcome.exit_code == 0:
            ledger.write_success(store, facts, parts, wanted)

    aside(write, beat)
    return outcome


def clear_foreign(store: Store, names: Iterable[str], beat: Beat = lambda: None) -> None:
    """Delete these parts where a discarded plan left them.

    Raises:
        CheckFailed: one is of no such plan; nothing is deleted then.
        Temporary: likewise, but it is of the plan that is in force by now.
    """
    found = {key: made.plan for key, made in _footers(store, names, beat) if made is not None}
    plans = sorted(set(found.values()))
    buried = dict(zip(plans, side_by_side(lambda name: plan.is_buried(store, name), plans, beat), strict=True))
    for key, name in found.items():
        if not buried[name]:
            _, head = aside(lambda: plan.current(store), beat)
            if head is not None and head.plan == name:
                raise Temporary(f"{store.uri}: another driver has begun plan {name} meanwhile; run again")
            raise CheckFailed(
                f"{store.uri}/{key} is a part of plan {name}, not of this output's; remove it and run again"
            )
    ledger.delete_all(store, found, beat)


def are_leftovers(store: Store, names: Iterable[str]) -> bool:
    """Whether all of these are parts of discarded plans. Raises CheckFailed where one was not written by batchjob."""
    found = [made.plan for _, made in _footers(store, names, lambda: None) if made is not None]
    return all(plan.is_buried(store, name) for name in sorted(set(found)))


def _footers(store: Store, names: Iterable[str], beat: Beat) -> Iterator[tuple[str, Provenance | None]]:
    """The footers of these parts; None of one that is gone."""

    def look(key: str) -> tuple[str, Provenance | None]:
        try:
            return key, ledger.inspect(store, key)
        except NotFound:
            return key, None

    return side_by_side(look, sorted(names), beat)


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
    yield from ledger.inspect_all(store, sorted(there.keys() - known.keys()), beat)
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
