"""End of a run: compare parts with plan, sum up, check the error budget, write the report and `_SUCCESS`."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import asdict, dataclass, field, replace
from typing import Any

from batchjob.concurrency import run_in_background
from batchjob.driver.existing_output import Heartbeat, delete_stale_parts
from batchjob.driver.run_state import find_exceeded_limit
from batchjob.driver.scheduler import AbandonedShard
from batchjob.errors import CheckFailed, Incomplete, Temporary
from batchjob.job.runtime import ErrorBudget
from batchjob.output.commit import list_parts, read_footers
from batchjob.output.provenance import PartFooter, ShardResult
from batchjob.output.success import Part, Totals, write_report, write_success
from batchjob.plan.head import PlanHead, is_discarded
from batchjob.report.run_report import build_run_report, read_tuning_records
from batchjob.report.run_result import RunResult
from batchjob.storage.objects import ObjectInfo
from batchjob.storage.store import Store
from batchjob.text import format_count
from batchjob.types import ShardKey
from batchjob.worker.messages import WorkerInfo

__all__ = ["RunSummary", "finalize_run"]

_MAX_TIED_ERRORS = 3

# Computes a task's metrics from its sums over all parts.
Summarize = Callable[[Mapping[str, float]], dict[str, Any]]


@dataclass(frozen=True)
class RunSummary:
    """Work of one driver.

    Attributes:
        expected_rows: Rows of each planned part, by name; of all parts if `plan_complete`.
        new_parts: Shards that this run committed, by part name.
        given_up: Shards that used up their attempts.
        workers: Workers that the run had.
        seconds: Wall time, in seconds.
        existing_parts: Footer and ETag of parts that were there before, by name.
        plan_complete: True if all images are planned.
        stopped_early: True if it stopped dispatching because it was over its error budget.
        accepted_failures: Error rows with which the output was complete before; None if it was not.
    """

    expected_rows: Mapping[str, int]
    new_parts: Mapping[str, ShardResult]
    given_up: tuple[AbandonedShard, ...]
    workers: tuple[WorkerInfo, ...]
    seconds: float
    existing_parts: Mapping[str, tuple[PartFooter, str | None]] = field(default_factory=dict)
    plan_complete: bool = True
    stopped_early: bool = False
    accepted_failures: int | None = None


def finalize_run(
    store: Store, head: PlanHead, run: RunSummary, *, budget: ErrorBudget, summarize: Summarize, heartbeat: Heartbeat
) -> RunResult:
    """Check the output against its plan and write the report; write `_SUCCESS` if all is there and within budget.

    Args:
        store: The output.
        head: Head of the plan.
        run: Work of this driver.
        budget: Limits of error rows.
        summarize: Computes the task's metrics from its sums over all parts.
        heartbeat: Called all along, to keep the lease.

    Raises:
        CheckFailed: Parts and plan disagree.
        Temporary: The plan was discarded meanwhile.
    """
    listing = run_in_background(lambda: list_parts(store), heartbeat)
    # A worker that was lost between its PUT and its answer has committed all the same.
    abandoned = tuple(shard for shard in run.given_up if not _is_committed(shard.key, run, listing))
    run = replace(run, given_up=abandoned)
    listing = _check_part_names(store, run, listing, heartbeat)
    parts, totals = _sum_parts(store, head, run, listing, heartbeat)
    result = replace(_build_result(store, run, totals, budget), truth=summarize(totals.truth))
    workers = [asdict(worker) for worker in run.workers]
    report = build_run_report(head, result, totals, workers=workers, stopped_early=run.stopped_early)

    def raise_if_discarded() -> None:
        if is_discarded(store, head):
            raise Temporary(f"{store.uri}: the plan was discarded while this run was ending; run again")

    def write() -> None:
        write_report(store, report | {"tuning": read_tuning_records(store, head)})
        if result.exit_code == 0:
            write_success(store, report, parts, raise_if_discarded)

    run_in_background(write, heartbeat)
    return result


def _is_committed(key: ShardKey, run: RunSummary, listing: Mapping[str, ObjectInfo]) -> bool:
    """Return True if the shard's part is there and, in a retry, is no longer the one that was to be replaced."""
    name = key.part_key
    return name in listing and not (key.revision and run.existing_parts[name][1] == listing[name].etag)


def _check_part_names(
    store: Store, run: RunSummary, listing: Mapping[str, ObjectInfo], heartbeat: Heartbeat
) -> dict[str, ObjectInfo]:
    """Return the parts of the plan, and delete stale ones.

    Raises:
        CheckFailed: A part is missing, or there is one that no plan of this output made.
    """
    given_up = {shard.key.part_key for shard in run.given_up}
    missing = sorted(run.expected_rows.keys() - listing.keys() - given_up)
    # A run that stopped early misses the parts that it did not come to.
    vanished = [
        name for name in missing if not run.stopped_early or name in run.new_parts or name in run.existing_parts
    ]
    if vanished:
        raise CheckFailed(f"{store.uri}: {', '.join(vanished[:3])} vanished after its commit; run again to redo it")
    if run.plan_complete:
        delete_stale_parts(store, listing.keys() - run.expected_rows.keys(), heartbeat)
    return {name: info for name, info in listing.items() if name in run.expected_rows}


def _sum_parts(
    store: Store, head: PlanHead, run: RunSummary, listing: Mapping[str, ObjectInfo], heartbeat: Heartbeat
) -> tuple[list[Part], Totals]:
    """Return the parts as `_SUCCESS` lists them, by name, and their sums; raise CheckFailed for a wrong footer."""
    parts, totals = [], Totals()
    for name, footer in _iter_footers(store, run, listing, heartbeat):
        if (footer.plan, footer.rows) != (head.plan, run.expected_rows[name]):
            raise CheckFailed(
                f"{store.uri}/{name} says {footer.rows} rows of plan {footer.plan}, the plan {head.plan} says "
                f"{run.expected_rows[name]} rows; remove it and run again"
            )
        totals.add(footer)
        if name in run.new_parts:
            totals.examples = {**run.new_parts[name].error_examples, **totals.examples}
        etag, size = listing[name].etag, listing[name].size
        parts.append(Part(name, footer.rows, footer.failed, etag, size, footer.attempt))
        heartbeat()
    return sorted(parts, key=lambda part: part.name), totals


def _iter_footers(
    store: Store, run: RunSummary, listing: Mapping[str, ObjectInfo], heartbeat: Heartbeat
) -> Iterator[tuple[str, PartFooter]]:
    """Yield the footer of each part; a part is read only if its ETag is not the one that this run has seen."""
    seen = {**run.existing_parts, **{name: (result.footer, result.etag) for name, result in run.new_parts.items()}}
    known = {
        name: footer for name, (footer, etag) in seen.items() if name in listing and etag and etag == listing[name].etag
    }
    yield from read_footers(store, sorted(listing.keys() - known.keys()), heartbeat)
    yield from sorted(known.items())


def _build_result(store: Store, run: RunSummary, totals: Totals, budget: ErrorBudget) -> RunResult:
    planned = sum(run.expected_rows.values())
    status, exit_code, message = "complete", 0, ""
    exceeded_limit = find_exceeded_limit(budget, totals.failed, planned, run.accepted_failures)
    is_unfinished = run.stopped_early and totals.rows < planned
    if run.given_up and not is_unfinished:
        status, exit_code, message = Incomplete.status, Incomplete.exit_code, _describe_abandoned(run)
    elif exceeded_limit:
        message = _describe_excess(store, totals, planned, exceeded_limit, is_unfinished)
        status, exit_code = CheckFailed.status, CheckFailed.exit_code
    images = sum(result.key.images_to_read for result in run.new_parts.values())
    return RunResult(
        status,
        planned,
        predicted=totals.rows - totals.failed,
        failed=totals.failed,
        seconds=run.seconds,
        images_per_second=images / max(run.seconds, 1e-9),
        output=store.uri,
        exit_code=exit_code,
        message=message,
    )


def _describe_abandoned(run: RunSummary) -> str:
    first = run.given_up[0]
    return (
        f"{format_count(len(run.given_up), 'shard')} gave up after all attempts, the first, number "
        f"{first.key.index}, with: {first.reason}; the same command tries again"
    )


def _describe_excess(store: Store, totals: Totals, planned: int, exceeded_limit: str, is_unfinished: bool) -> str:
    """Describe a run over its error budget in three lines: what failed, where the rows are, and what to type."""
    if is_unfinished:
        counts = f"stopped early: {totals.failed:,} of {totals.rows:,} images failed so far, of {planned:,} planned"
        rows = f"the {format_count(totals.rows, 'row')} done so far"
        advice = ", or set errors.abort_early=false, which does the rest all the same"
    else:
        counts = f"{totals.failed:,} of {format_count(planned, 'image')} failed"
        rows = f"all {format_count(totals.rows, 'row')}, error rows among them,"
        advice = ": the next run then completes at once"
    return (
        f"{counts}, {exceeded_limit}; {_describe_top_error(totals)}\n"
        f"{rows} can be read in {store.uri.rstrip('/')}/predictions/*.parquet; there is no _SUCCESS\n"
        f"next: `batchjob errors {store.uri}` lists the images; mend them and `batchjob retry JOB.yaml`, or raise "
        f"errors.max_rate{advice}"
    )


def _describe_top_error(totals: Totals) -> str:
    """Describe the most frequent kind of error, or the first ones where several are equally frequent."""
    ranking = totals.errors.most_common()
    top = [error_type for error_type, count in ranking if count == ranking[0][1]]
    described = [_describe_error(error_type, totals) for error_type in top[:_MAX_TIED_ERRORS]]
    if len(top) == 1:
        return f"most often {described[0]}"
    more = len(ranking) - len(described)
    return " and ".join([", ".join(described), *([format_count(more, "more kind")] if more else [])])


def _describe_error(error_type: str, totals: Totals) -> str:
    example = totals.examples.get(error_type)
    return f"{error_type} ({totals.errors[error_type]:,}{f', such as {example}' if example else ''})"
