"""Questions about an existing output: whose plan it has, whether it is finished, which parts are stale."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import replace
from typing import Any

from batchjob.concurrency import parallel_map, run_in_background
from batchjob.driver.job_files import JobFiles, check_files, find_changed_files
from batchjob.errors import CheckFailed, InvalidJob, NotFound, Temporary
from batchjob.functions.function_target import FUNCTION_KEY
from batchjob.job.fingerprint import diff_fingerprints
from batchjob.job.job import Job
from batchjob.output.commit import delete_objects, list_parts, read_footer
from batchjob.output.listed_parts import find_part_mismatches
from batchjob.output.provenance import PartFooter
from batchjob.output.success import delete_orphaned_success, read_success
from batchjob.plan.head import PlanHead, discard_plan, is_plan_id_discarded, read_current_head
from batchjob.report.run_result import RunResult
from batchjob.storage.store import Store
from batchjob.text import format_count

__all__ = [
    "Heartbeat",
    "apply_plan_defaults",
    "are_stale_parts",
    "check_fingerprint",
    "delete_stale_parts",
    "discard_current_plan",
    "find_finished_result",
    "find_plan_to_discard",
    "find_stale_parts",
    "is_to_be_replaced",
    "list_stale_parts",
    "no_plan_to_retry_error",
    "read_present_footers",
]

# Called again and again while something takes long, to keep the lease; what it raises ends the work.
Heartbeat = Callable[[], object]


# -- Whose plan is it? -------------------------------------------------------------------------------------------------


def check_fingerprint(store: Store, job: Job, head: PlanHead) -> None:
    """Check that the plan in force is this job's.

    Raises:
        InvalidJob: It is another job's; the message shows the difference.
    """
    if lines := diff_fingerprints(head.fingerprint, job.fingerprint()):
        listed = "\n".join(f"  {line}" for line in lines)
        only_there = "the script that holds the function resumes and retries it; " if _is_of_script(head, job) else ""
        raise InvalidJob(
            f"{store.uri} belongs to another job:\n{listed}\n{only_there}choose another output.uri, restore these "
            "settings, or "
            f"`batchjob discard {store.uri} --yes` (or `batchjob run --fresh`) to throw its rows away"
        )


def _is_of_script(head: PlanHead, job: Job) -> bool:
    """Return True if the plan holds a function by value and the job does not, as one from a job file."""

    def holds_function(fingerprint: Mapping[str, Any]) -> bool:
        sections = (section for section in fingerprint.values() if isinstance(section, Mapping))
        values = (value for section in sections for value in section.values())
        return any(isinstance(value, Mapping) and FUNCTION_KEY in value for value in values)

    return holds_function(head.fingerprint) and not holds_function(job.fingerprint())


def apply_plan_defaults(job: Job, store: Store, head: PlanHead | None) -> Job:
    """Return the job with the defaults of the plan that it resumes; the job itself if there is no plan.

    Raises:
        InvalidJob: The plan is another job's.
    """
    if head is None:
        return job
    check_fingerprint(store, job, head)
    return job.with_defaults(head.defaults)


# -- Is it finished? ---------------------------------------------------------------------------------------------------


def find_finished_result(store: Store, job: Job, repair: bool, retry: bool) -> RunResult | None:
    """Return the result of an output that this very job has finished; None if there is work to do.

    Takes no lease, loads no model and writes nothing.

    Args:
        store: The output.
        job: The job.
        repair: Missing parts are to be made again, so they are no error.
        retry: Error rows are to be retried.

    Raises:
        InvalidJob: The output belongs to another job, was made with other files, or there is no plan to retry.
        CheckFailed: `_SUCCESS` is there, but parts that it lists are missing or others are there; not if `repair`.
    """
    number, head = read_current_head(store)
    if head is None:
        if retry:
            raise no_plan_to_retry_error(store, number)
        return None
    check_fingerprint(store, job, head)
    success = read_success(store)
    if success is None or success[0].get("plan") != head.plan:
        return None
    summary, _ = success
    if mismatches := find_part_mismatches(store, summary, list_parts(store)):
        unlisted = set(mismatches) - {part["name"] for part in summary["parts"]}
        # The run then lists the parts that a retry replaced, and deletes the stale ones.
        if repair or (_are_retried(store, head, set(mismatches) - unlisted) and are_stale_parts(store, unlisted)):
            return None
        raise CheckFailed(
            f"{store.uri}/_SUCCESS stands, but what it lists does not: "
            f"{format_count(len(mismatches), 'part')} gone, changed or "
            f"added ({', '.join(mismatches[:3])}); restore what was there, or make again what is gone with "
            "`batchjob run --repair`"
        )
    # A retry reads images that the plan names, whatever names them now.
    check_files(store, head, JobFiles(job), with_input=not (retry or repair))
    counts = summary["counts"]
    if retry and counts["failed"]:
        return None
    result = RunResult(
        "already_complete",
        counts["planned"],
        counts["predicted"],
        counts["failed"],
        output=store.uri,
        truth=summary.get("truth", {}),
    )
    if retry:
        return replace(result, message=f"{store.uri}: no row holds an error, so there is nothing to retry")
    # A manifest was compared with the other files. Listing a folder would take long, and tell nothing most times.
    if head.source_version is None:
        text = "new files below the input are not looked for: `batchjob run --check-input` does"
        return replace(result, message=f"{result.describe_counts()}; {text}")
    return result


def no_plan_to_retry_error(store: Store, number: int) -> InvalidJob:
    """Make the error of a retry on an output without a plan.

    Args:
        store: The output.
        number: Number of the plan that would be made now; all before it were discarded.
    """
    reason = "its plan was discarded and nothing has been run since" if number else "nothing has been run there yet"
    return InvalidJob(f"{store.uri}: {reason}, so there is nothing to retry; `batchjob run` first")


def _are_retried(store: Store, head: PlanHead, names: Iterable[str]) -> bool:
    """Return True if a retry replaced all these parts.

    That happens when the driver of a retry lost its lease and another driver put `_SUCCESS` meanwhile.
    """
    try:
        footers = (read_footer(store, name) for name in sorted(names))
        return all(footer.plan == head.plan and footer.revision for footer in footers)
    except (NotFound, CheckFailed):
        return False


def is_to_be_replaced(store: Store, job: Job, head: PlanHead) -> bool:
    """Return True if a fresh run discards the plan: it is another job's, of other files, or finished.

    An unfinished plan of this very job is what an earlier try of the same fresh run has left.
    """
    if diff_fingerprints(head.fingerprint, job.fingerprint()):
        return True
    success, files = read_success(store), JobFiles(job)
    if success is not None and success[0].get("plan") == head.plan:
        return True
    return files.is_other_input(store, head) or bool(find_changed_files(store, head, files, with_input=True))


# -- Which parts are stale? --------------------------------------------------------------------------------------------


def read_present_footers(
    store: Store, names: Iterable[str], heartbeat: Heartbeat
) -> Iterator[tuple[str, PartFooter | None]]:
    """Read the footers of parts, in the order of their names; None for a part that is no longer there.

    Raises:
        CheckFailed: A part was not written by batchjob.
    """

    def read(name: str) -> tuple[str, PartFooter | None]:
        try:
            return name, read_footer(store, name)
        except NotFound:
            return name, None

    return parallel_map(read, sorted(names), heartbeat)


def are_stale_parts(store: Store, names: Iterable[str]) -> bool:
    """Return True if all these parts belong to discarded plans.

    Raises:
        CheckFailed: A part was not written by batchjob.
    """
    footers = read_present_footers(store, names, lambda: None)
    plan_ids = {footer.plan for _, footer in footers if footer is not None}
    return all(is_plan_id_discarded(store, plan_id) for plan_id in sorted(plan_ids))


def find_stale_parts(
    store: Store, names: Iterable[str], heartbeat: Heartbeat, replaced: PlanHead | None = None
) -> list[str]:
    """Return those of these parts that are there, if all of them belong to discarded plans.

    Args:
        store: The output.
        names: Keys of parts.
        heartbeat: Called while that takes time, to keep the lease.
        replaced: Head of a plan whose parts count as those of a discarded one.

    Raises:
        CheckFailed: A part belongs to a plan that this output does not have, or was not written by batchjob.
        Temporary: A part belongs to the plan in force, which another driver has made meanwhile.
    """
    footers = read_present_footers(store, names, heartbeat)
    plan_by_part = {name: footer.plan for name, footer in footers if footer is not None}
    plan_ids = sorted(set(plan_by_part.values()) - {replaced.plan if replaced else ""})
    discarded = parallel_map(lambda plan_id: is_plan_id_discarded(store, plan_id), plan_ids, heartbeat)
    is_discarded = dict(zip(plan_ids, discarded, strict=True))
    for name, plan_id in plan_by_part.items():
        if not is_discarded.get(plan_id, True):
            _, head = run_in_background(lambda: read_current_head(store), heartbeat)
            if head is not None and head.plan == plan_id:
                raise Temporary(f"{store.uri}: another driver has begun plan {plan_id} meanwhile; run again")
            raise CheckFailed(
                f"{store.uri}/{name} is a part of plan {plan_id}, not of this output's; remove it and run again"
            )
    return list(plan_by_part)


def delete_stale_parts(store: Store, names: Iterable[str], heartbeat: Heartbeat = lambda: None) -> None:
    """Delete parts that discarded plans left; delete none of them if one belongs to another plan.

    Raises:
        CheckFailed, Temporary: See `find_stale_parts`.
    """
    delete_objects(store, find_stale_parts(store, names, heartbeat), heartbeat)


# -- What is there to discard? -----------------------------------------------------------------------------------------


def find_plan_to_discard(store: Store) -> PlanHead | None:
    """Return the head of the plan in force; None if there is only what an interrupted discard has left.

    Raises:
        InvalidJob: There is neither.
    """
    number, head = read_current_head(store)
    if head is None and not (number and list_parts(store)):
        raise InvalidJob(f"{store.uri}: no plan in force, nothing to discard")
    return head


def discard_current_plan(store: Store, head: PlanHead | None) -> None:
    """Put the plan's tombstone, if there is a plan, and delete the `_SUCCESS` that no plan stands for any more."""
    if head is not None:
        discard_plan(store, head)
    # A `_SUCCESS` that lies there once another driver has made a plan is that plan's.
    delete_orphaned_success(store, lambda: read_current_head(store)[1] is None)


def list_stale_parts(store: Store) -> list[str]:
    """List the parts of discarded plans, after a discard.

    Raises:
        Temporary: Another driver has made a new plan meanwhile.
    """
    # The parts are listed first: what is there before no plan is seen to be in force is of no later plan.
    parts = list_parts(store)
    _, head = read_current_head(store)
    if head is not None:
        raise Temporary(f"{store.uri}: another driver has begun plan {head.plan} meanwhile; nothing of it was deleted")
    return list(parts)
