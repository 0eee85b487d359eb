"""Contents of an output, read without torch or Ray for `batchjob status` and `batchjob errors`."""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from batchjob.errors import InvalidJob
from batchjob.output.commit import list_parts, read_footers
from batchjob.output.error_rows import read_error_rows
from batchjob.output.listed_parts import find_part_mismatches
from batchjob.output.success import read_accepted_failures, read_success
from batchjob.plan.chunks import read_chunks
from batchjob.plan.head import PlanHead, read_current_head
from batchjob.storage.store import Store
from batchjob.text import format_count
from batchjob.uris import is_local

__all__ = ["OutputStatus", "count_errors", "read_errors", "read_status"]

# Reading more footers than this would take longer than a status command may take.
_MAX_FOOTERS_READ = 2_000
_MAX_MISMATCHES_SHOWN = 3


@dataclass(frozen=True)
class OutputStatus:
    """State of an output. Its fields are the keys of `batchjob status --json`.

    Attributes:
        status: `complete` (`_SUCCESS` is there and agrees with the parts), `incomplete`, or `damaged` (`_SUCCESS`
            lists other parts).
        output: URI of the output.
        plan: Id of the plan in force.
        created: Time at which the plan was made, in ISO 8601, UTC.
        plan_finished: True if all images are planned.
        planned: Images planned so far.
        shards: Shards planned so far.
        parts: Committed parts of this plan.
        rows: Rows in the committed parts.
        failed: Error rows among them; None if too many parts would have to be read.
        accepted: Error rows with which the output was complete before a retry or repair; None if it never was.
        mismatches: Names of the parts that are gone, changed or added since `_SUCCESS` was written.
    """

    status: str
    output: str
    plan: str
    created: str
    plan_finished: bool
    planned: int
    shards: int
    parts: int
    rows: int
    failed: int | None
    accepted: int | None = None
    mismatches: tuple[str, ...] = ()

    def lines(self) -> list[str]:
        """Return the status as lines of text for a person."""
        grows = "" if self.plan_finished else ", and growing"
        failed = "" if self.failed is None else f", {self.failed:,} with an error"
        planned = f"{format_count(self.planned, 'image')} in {format_count(self.shards, 'shard')}{grows}"
        return [
            f"{self.output}: {self.status}",
            f"plan      {self.plan} of {self.created}: {planned}",
            f"committed {format_count(self.rows, 'row')} in {format_count(self.parts, 'part')}{failed}",
            *self._describe_damage(),
            *([self._next_step] if self._lacks_only_success else []),
        ]

    def _describe_damage(self) -> list[str]:
        if not self.mismatches:
            return []
        listed = ", ".join(self.mismatches[:_MAX_MISMATCHES_SHOWN])
        more = ", …" if len(self.mismatches) > _MAX_MISMATCHES_SHOWN else ""
        count = format_count(len(self.mismatches), "part")
        advice = "restore what was there, or delete what is left of it and `batchjob run --repair`"
        return [f"damaged   {count} gone, changed or added since _SUCCESS: {listed}{more}; {advice}"]

    @property
    def _lacks_only_success(self) -> bool:
        """True if all parts are committed, but `_SUCCESS` is missing."""
        return self.status == "incomplete" and self.plan_finished and self.parts == self.shards

    @property
    def _next_step(self) -> str:
        if not self.failed or (self.accepted is not None and self.failed <= self.accepted):
            return "all of it is done; the run that writes _SUCCESS is at work, or run again"
        return (
            f"every image has a row, and {self.failed:,} of them failed, maybe more than errors.max_rate allows: "
            f"`batchjob errors {self.output}` lists them; mend them and `batchjob retry JOB.yaml`, or raise "
            "errors.max_rate: the next run then completes at once"
        )


def read_status(store: Store) -> OutputStatus:
    """Read the state of an output.

    Raises:
        InvalidJob: There is no plan, or its format is unknown to this version.
    """
    head = _require_head(store)
    listing = list_parts(store)
    chunks = list(read_chunks(store, head))
    planned_rows = {key.part_key: key.rows for chunk in chunks for key in chunk.shards}
    committed = [name for name in listing if name in planned_rows]
    success, accepted, mismatches = read_success(store), None, []
    if success is not None and success[0].get("plan") == head.plan:
        mismatches = find_part_mismatches(store, success[0], listing)
        state = "damaged" if mismatches else "complete"
        failed: int | None = success[0]["counts"]["failed"]
    else:
        state = "incomplete"
        failed = _count_failed_rows(store, committed)
        accepted = read_accepted_failures(store, head.plan)
    return OutputStatus(
        status=state,
        output=store.uri,
        plan=head.plan,
        created=head.created,
        plan_finished=bool(chunks) and chunks[-1].is_last,
        planned=chunks[-1].end_cursor.rows if chunks else 0,
        shards=len(planned_rows),
        parts=len(committed),
        rows=sum(planned_rows[name] for name in committed),
        failed=failed,
        accepted=accepted,
        mismatches=tuple(mismatches),
    )


def read_errors(store: Store) -> Iterator[dict[str, Any]]:
    """Read all error rows, in plan order.

    Returns:
        Dicts with `position`, `uri`, `error_stage`, `error_type` and `error_message`.

    Raises:
        InvalidJob: There is no plan, or its format is unknown to this version.
    """
    _require_head(store)
    return read_error_rows(store)


def count_errors(store: Store) -> Counter[str]:
    """Count the error rows by `stage/type` from the footers of the parts alone.

    Raises:
        InvalidJob: There is no plan, or its format is unknown to this version.
    """
    _require_head(store)
    counts: Counter[str] = Counter()
    for _, footer in read_footers(store, sorted(list_parts(store))):
        counts.update(footer.errors)
    return counts


def _require_head(store: Store) -> PlanHead:
    """Read the head of the plan in force, or raise InvalidJob with the next step."""
    number, head = read_current_head(store)
    if head is not None:
        return head
    if number:
        raise InvalidJob(f"{store.uri}: its plan was discarded and nothing was planned since; run the job again")
    if is_local(store.uri) and os.path.isfile(store.uri):  # noqa: PTH113 - Path.is_file raises for a name too long
        raise InvalidJob(f"{store.uri} is a file; name a job file (.yaml), or the folder that output.uri names")
    raise InvalidJob(f"{store.uri}: no plan here (yet); `batchjob run` makes one, in the folder that output.uri names")


def _count_failed_rows(store: Store, names: list[str]) -> int | None:
    if len(names) > _MAX_FOOTERS_READ:
        return None
    return sum(footer.failed for _, footer in read_footers(store, names))
