"""What a driver knows of its output, and the end of a run: parts against plan, error budget, report, `_SUCCESS`."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from typing import NoReturn

from batchjob.concurrency import parallel_map, run_in_background
from batchjob.errors import CheckFailed, InvalidJob, NotFound, Temporary
from batchjob.job.fingerprint import diff_fingerprints
from batchjob.job.job import Job
from batchjob.output import commit
from batchjob.output.commit import delete_objects, read_footer
from batchjob.output.provenance import PartFooter
from batchjob.output.success import delete_orphaned_success, find_part_mismatches, read_success
from batchjob.plan.head import PlanHead, discard_plan, is_plan_id_discarded, read_current_head
from batchjob.report.run_result import RunResult
from batchjob.storage.store import Store
from batchjob.text import format_count

__all__ = ["are_stale_parts", "check_fingerprint", "delete_stale_parts"]

Heartbeat = Callable[[], object]


def delete_stale_parts(store: Store, names: Iterable[str], heartbeat: Heartbeat = lambda: None) -> None:
    """Delete these parts where a discarded plan left them.

    Raises:
        CheckFailed: one is of no such plan; nothing is deleted then.
        Temporary: likewise, but it is of the plan that is in force by now.
    """
    found = {key: made.plan for key, made in read_present_footers(store, names, heartbeat) if made is not None}
    plans = sorted(set(found.values()))
    buried = dict(
        zip(plans, parallel_map(lambda name: is_plan_id_discarded(store, name), plans, heartbeat), strict=True)
    )
    for key, name in found.items():
        if not buried[name]:
            _, head = run_in_background(lambda: read_current_head(store), heartbeat)
            if head is not None and head.plan == name:
                raise Temporary(f"{store.uri}: another driver has begun plan {name} meanwhile; run again")
            raise CheckFailed(
                f"{store.uri}/{key} is a part of plan {name}, not of this output's; remove it and run again"
            )
    delete_objects(store, found, heartbeat)


def are_stale_parts(store: Store, names: Iterable[str]) -> bool:
    """Whether all of these are parts of discarded plans. Raises CheckFailed where one was not written by batchjob."""
    found = [made.plan for _, made in read_present_footers(store, names, lambda: None) if made is not None]
    return all(is_plan_id_discarded(store, name) for name in sorted(set(found)))


def read_present_footers(
    store: Store, names: Iterable[str], beat: Heartbeat
) -> Iterator[tuple[str, PartFooter | None]]:
    """The footers of these parts; None of one that is gone."""

    def look(key: str) -> tuple[str, PartFooter | None]:
        try:
            return key, read_footer(store, key)
        except NotFound:
            return key, None

    return parallel_map(look, sorted(names), beat)


def discard_current_plan(store: Store, head: PlanHead | None) -> None:
    if head is not None:
        discard_plan(store, head)
    delete_orphaned_success(store, lambda: read_current_head(store)[1] is None)  # else it is the next plan's by now


def list_stale_parts(store: Store) -> list[str]:
    """Parts of discarded plans only: what lay there before a look showed that no plan is in force.

    Raises:
        Temporary: another driver has taken over and planned anew.
    """
    found = commit.list_parts(store)
    _, head = read_current_head(store)
    if head is not None:
        raise Temporary(f"{store.uri}: another driver has begun plan {head.plan} meanwhile; nothing of it was deleted")
    return list(found)


def find_plan_to_discard(store: Store) -> tuple[int, PlanHead | None]:
    """The plan in force, or what a discard that was cut short has left. Raises InvalidJob where there is neither."""
    number, head = read_current_head(store)
    if head is None and not (number and commit.list_parts(store)):
        raise InvalidJob(f"{store.uri}: no plan in force, nothing to discard")
    return number, head


def find_finished_result(store: Store, job: Job, repair: bool, retry: bool) -> RunResult | None:
    """The outcome of a finished output of this very job, without lease, model or PUT. None where there is work to do.

    Raises:
        InvalidJob: the output belongs to another job, or `retry` finds nothing to begin with.
        CheckFailed: `_SUCCESS` stands, but parts that it lists are gone or others are there; not where `repair`.
    """
    _, head = read_current_head(store)
    if head is None:
        return raise_nothing_to_retry(store) if retry else None
    check_fingerprint(store, job, head)
    success = read_success(store)
    if success is None or success[0].get("plan") != head.plan:
        return None
    facts, _ = success
    if odd := find_part_mismatches(facts, commit.list_parts(store)):
        added = set(odd) - {part["name"] for part in facts["parts"]}
        if repair or (_are_retried(store, head, set(odd) - added) and are_stale_parts(store, added)):
            return None  # the run lists the former, and clears away the latter
        raise CheckFailed(
            f"{store.uri}/_SUCCESS stands, but what it lists does not: "
            f"{format_count(len(odd), 'part')} gone, changed or "
            f"added ({', '.join(odd[:3])}); restore what was there, or make again what is gone with "
            "`batchjob run --repair`"
        )
    counts = facts["counts"]
    if retry and counts["failed"]:
        return None
    sums = counts["planned"], counts["predicted"], counts["failed"]
    said = f"{store.uri}: no row holds an error, so there is nothing to retry" if retry else ""
    return RunResult("already_complete", *sums, output=store.uri, message=said, truth=facts.get("truth", {}))


def raise_nothing_to_retry(store: Store) -> NoReturn:
    raise InvalidJob(f"{store.uri}: nothing has been run there yet, so there is nothing to retry; `batchjob run` first")


def _are_retried(store: Store, head: PlanHead, names: Iterable[str]) -> bool:
    """Whether all of these were replaced by a retry, whose driver had lost its lease when somebody put `_SUCCESS`."""
    try:
        made = (commit.read_footer(store, name) for name in sorted(names))
        return all(one.plan == head.plan and one.revision for one in made)
    except (NotFound, CheckFailed):
        return False


def apply_plan_defaults(job: Job, store: Store, head: PlanHead | None) -> Job:
    """The job with the defaults of the plan that it resumes. Raises InvalidJob where that is another job's."""
    if head is None:
        return job
    check_fingerprint(store, job, head)
    return job.with_defaults(head.defaults)


def check_fingerprint(store: Store, job: Job, head: PlanHead) -> None:
    """Raises InvalidJob, with the difference, where the plan in force is another job's."""
    if lines := diff_fingerprints(head.fingerprint, job.fingerprint()):
        listed = "\n".join(f"  {line}" for line in lines)
        raise InvalidJob(
            f"{store.uri} belongs to another job:\n{listed}\nchoose another output.uri, restore these settings, or "
            f"`batchjob discard {store.uri} --yes` to throw its rows away"
        )
