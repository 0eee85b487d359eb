"""What a driver knows of its output, and the end of a run: parts against plan, error budget, report, `_SUCCESS`."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from typing import NoReturn

from batchjob.concurrency import aside, side_by_side
from batchjob.errors import CheckFailed, InvalidJob, NotFound, Temporary
from batchjob.job.fingerprint import difference
from batchjob.job.job import Job
from batchjob.output import commit
from batchjob.output.commit import delete_all, inspect
from batchjob.output.provenance import Provenance
from batchjob.output.success import clear_success, missing_from_success, read_success
from batchjob.plan.head import Head, bury, current, is_buried
from batchjob.report.run_result import Outcome
from batchjob.storage.store import Store
from batchjob.text import counted

__all__ = ["are_leftovers", "clear_foreign", "compare"]

Beat = Callable[[], object]


def clear_foreign(store: Store, names: Iterable[str], beat: Beat = lambda: None) -> None:
    """Delete these parts where a discarded plan left them.

    Raises:
        CheckFailed: one is of no such plan; nothing is deleted then.
        Temporary: likewise, but it is of the plan that is in force by now.
    """
    found = {key: made.plan for key, made in _footers(store, names, beat) if made is not None}
    plans = sorted(set(found.values()))
    buried = dict(zip(plans, side_by_side(lambda name: is_buried(store, name), plans, beat), strict=True))
    for key, name in found.items():
        if not buried[name]:
            _, head = aside(lambda: current(store), beat)
            if head is not None and head.plan == name:
                raise Temporary(f"{store.uri}: another driver has begun plan {name} meanwhile; run again")
            raise CheckFailed(
                f"{store.uri}/{key} is a part of plan {name}, not of this output's; remove it and run again"
            )
    delete_all(store, found, beat)


def are_leftovers(store: Store, names: Iterable[str]) -> bool:
    """Whether all of these are parts of discarded plans. Raises CheckFailed where one was not written by batchjob."""
    found = [made.plan for _, made in _footers(store, names, lambda: None) if made is not None]
    return all(is_buried(store, name) for name in sorted(set(found)))


def _footers(store: Store, names: Iterable[str], beat: Beat) -> Iterator[tuple[str, Provenance | None]]:
    """The footers of these parts; None of one that is gone."""

    def look(key: str) -> tuple[str, Provenance | None]:
        try:
            return key, inspect(store, key)
        except NotFound:
            return key, None

    return side_by_side(look, sorted(names), beat)


def _bury(store: Store, head: Head | None) -> None:
    if head is not None:
        bury(store, head)
    clear_success(store, lambda: current(store)[1] is None)  # else it is the next plan's by now


def _leftovers(store: Store) -> list[str]:
    """Parts of discarded plans only: what lay there before a look showed that no plan is in force.

    Raises:
        Temporary: another driver has taken over and planned anew.
    """
    found = commit.parts(store)
    _, head = current(store)
    if head is not None:
        raise Temporary(f"{store.uri}: another driver has begun plan {head.plan} meanwhile; nothing of it was deleted")
    return list(found)


def _something_to_discard(store: Store) -> tuple[int, Head | None]:
    """The plan in force, or what a discard that was cut short has left. Raises InvalidJob where there is neither."""
    number, head = current(store)
    if head is None and not (number and commit.parts(store)):
        raise InvalidJob(f"{store.uri}: no plan in force, nothing to discard")
    return number, head


def _already_complete(store: Store, job: Job, repair: bool, retry: bool) -> Outcome | None:
    """The outcome of a finished output of this very job, without lease, model or PUT. None where there is work to do.

    Raises:
        InvalidJob: the output belongs to another job, or `retry` finds nothing to begin with.
        CheckFailed: `_SUCCESS` stands, but parts that it lists are gone or others are there; not where `repair`.
    """
    _, head = current(store)
    if head is None:
        return _nothing_planned(store) if retry else None
    compare(store, job, head)
    success = read_success(store)
    if success is None or success[0].get("plan") != head.plan:
        return None
    facts, _ = success
    if odd := missing_from_success(facts, commit.parts(store)):
        added = set(odd) - {part["name"] for part in facts["parts"]}
        if repair or (_are_retried(store, head, set(odd) - added) and are_leftovers(store, added)):
            return None  # the run lists the former, and clears away the latter
        raise CheckFailed(
            f"{store.uri}/_SUCCESS stands, but what it lists does not: {counted(len(odd), 'part')} gone, changed or "
            f"added ({', '.join(odd[:3])}); restore what was there, or make again what is gone with "
            "`batchjob run --repair`"
        )
    counts = facts["counts"]
    if retry and counts["failed"]:
        return None
    sums = counts["planned"], counts["predicted"], counts["failed"]
    said = f"{store.uri}: no row holds an error, so there is nothing to retry" if retry else ""
    return Outcome("already_complete", *sums, output=store.uri, message=said, truth=facts.get("truth", {}))


def _nothing_planned(store: Store) -> NoReturn:
    raise InvalidJob(f"{store.uri}: nothing has been run there yet, so there is nothing to retry; `batchjob run` first")


def _are_retried(store: Store, head: Head, names: Iterable[str]) -> bool:
    """Whether all of these were replaced by a retry, whose driver had lost its lease when somebody put `_SUCCESS`."""
    try:
        made = (commit.inspect(store, name) for name in sorted(names))
        return all(one.plan == head.plan and one.revision for one in made)
    except (NotFound, CheckFailed):
        return False


def _as_planned(job: Job, store: Store, head: Head | None) -> Job:
    """The job with the defaults of the plan that it resumes. Raises InvalidJob where that is another job's."""
    if head is None:
        return job
    compare(store, job, head)
    return job.completed(head.defaults)


def compare(store: Store, job: Job, head: Head) -> None:
    """Raises InvalidJob, with the difference, where the plan in force is another job's."""
    if lines := difference(head.fingerprint, job.fingerprint()):
        listed = "\n".join(f"  {line}" for line in lines)
        raise InvalidJob(
            f"{store.uri} belongs to another job:\n{listed}\nchoose another output.uri, restore these settings, or "
            f"`batchjob discard {store.uri} --yes` to throw its rows away"
        )
