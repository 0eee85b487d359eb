"""What an output holds, for `status` and `errors`: plan, parts, `_SUCCESS` and lease, without torch or Ray."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from batchjob.errors import InvalidJob
from batchjob.output import commit
from batchjob.output.error_rows import read_error_rows as error_rows_of_error_rows
from batchjob.output.success import find_part_mismatches, read_success
from batchjob.plan.chunks import read_chunks as chunks_of_chunks
from batchjob.plan.head import PlanHead, read_current_head
from batchjob.storage.store import Store
from batchjob.text import format_count

__all__ = ["ErrorCounts", "OutputStatus", "count_errors", "read_errors", "read_status"]

_MAX_FOOTERS_READ = 2_000  # more would take longer than a status may


@dataclass(frozen=True)
class OutputStatus:
    """An output at a glance.

    Attributes:
        status: `complete` (`_SUCCESS` stands and agrees), `incomplete`, or `damaged` (`_SUCCESS` lists other parts).
        planned: images planned so far; all of them if `plan_finished`.
        rows: in committed parts; `failed` of them error rows, None where too many parts would have to be read.
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

    def lines(self) -> list[str]:
        """For a person."""
        grows = "" if self.plan_finished else ", and growing"
        failed = "" if self.failed is None else f", {self.failed:,} with an error"
        planned = f"{format_count(self.planned, 'image')} in {format_count(self.shards, 'shard')}{grows}"
        return [
            f"{self.output}: {self.status}",
            f"plan      {self.plan} of {self.created}: {planned}",
            f"committed {format_count(self.rows, 'row')} in {format_count(self.parts, 'part')}{failed}",
            *([self._next_step] if self._without_success else []),
        ]

    @property
    def _without_success(self) -> bool:
        """Whether all is done and yet not complete."""
        return self.status == "incomplete" and self.plan_finished and self.parts == self.shards

    @property
    def _next_step(self) -> str:
        if not self.failed:
            return "all of it is done; the run that writes _SUCCESS is at work, or run again"
        return (
            f"all of it is done, but for _SUCCESS too many may have failed: see `batchjob errors {self.output}`; "
            "mend them and `batchjob retry`, or raise errors.max_rate: then a run ends at once, and does nothing again"
        )


@dataclass(frozen=True)
class ErrorCounts:
    """Error rows by `stage/type`, the most frequent first."""

    total: int
    by_type: dict[str, int]


def read_status(store: Store) -> OutputStatus:
    """Look at an output.

    Raises:
        InvalidJob: there is no plan, or one in a format that this version does not know.
    """
    head = _head(store)
    there = commit.list_parts(store)
    chunks = list(chunks_of_chunks(store, head))
    keys = {key.part_key: key.rows for chunk in chunks for key in chunk.shards}
    mine = [name for name in there if name in keys]
    success = read_success(store)
    if success is not None and success[0].get("plan") == head.plan:
        state = "damaged" if find_part_mismatches(success[0], there) else "complete"
        failed: int | None = success[0]["counts"]["failed"]
    else:
        state = "incomplete"
        failed = _failed(store, mine)
    return OutputStatus(
        status=state,
        output=store.uri,
        plan=head.plan,
        created=head.created,
        plan_finished=bool(chunks) and chunks[-1].is_last,
        planned=chunks[-1].end_cursor.rows if chunks else 0,
        shards=len(keys),
        parts=len(mine),
        rows=sum(keys[name] for name in mine),
        failed=failed,
    )


def read_errors(store: Store) -> Iterator[dict[str, Any]]:
    """Every error row: `position, uri, error_stage, error_type, error_message`, in plan order. Raises: see `status`."""
    _head(store)
    return error_rows_of_error_rows(store)


def count_errors(store: Store) -> ErrorCounts:
    """How many error rows of which kind, by the parts' footers alone. Raises: see `status`."""
    _head(store)
    counts: Counter[str] = Counter()
    for _, made in commit.read_footers(store, sorted(commit.list_parts(store))):
        counts.update(made.errors)
    return ErrorCounts(counts.total(), dict(counts.most_common()))


def _head(store: Store) -> PlanHead:
    number, head = read_current_head(store)
    if head is not None:
        return head
    if number:
        raise InvalidJob(f"{store.uri}: its plan was discarded and nothing was planned since; run the job again")
    raise InvalidJob(f"{store.uri}: no plan here (yet); `batchjob run` makes one, in the folder that output.uri names")


def _failed(store: Store, names: list[str]) -> int | None:
    if len(names) > _MAX_FOOTERS_READ:
        return None
    return sum(made.failed for _, made in commit.read_footers(store, names))
