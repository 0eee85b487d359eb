"""State of one run: parts that are there, parts that are planned, rows and error rows so far, the error budget."""

from __future__ import annotations

from dataclasses import replace

from batchjob.concurrency import run_in_background
from batchjob.driver.existing_output import (
    Heartbeat,
    delete_stale_parts,
    find_stale_parts,
    read_present_footers,
)
from batchjob.job.runtime import ErrorBudget
from batchjob.output.commit import list_parts
from batchjob.output.provenance import PartFooter, ShardResult
from batchjob.plan.chunks import Chunk
from batchjob.plan.head import PlanHead
from batchjob.storage.store import Store
from batchjob.types import ShardKey

__all__ = ["RunState", "find_exceeded_limit"]


class RunState:
    """Knowledge of one driver about its output while it works.

    Args:
        store: The output; its parts are listed at once.
        heartbeat: Called while that takes time, to keep the lease.
        retry: Parts with error rows are to be replaced.

    Attributes:
        expected_rows: Rows of each planned part, by name.
        new_parts: Shards that this run committed, by part name.
        existing_parts: Footer and ETag of parts that were there before, by name.
        planned: Images planned so far.
        plan_complete: True if all images are planned.
        rows_to_retry: Error rows that this run has still to retry; 0 unless `retry`.
        accepted_failures: Error rows with which the output was complete before a retry or repair; None if it was not.
    """

    def __init__(self, store: Store, heartbeat: Heartbeat, retry: bool = False) -> None:
        self._store, self._retry = store, retry
        self._listing = run_in_background(lambda: list_parts(store), heartbeat)
        self._rows = self._error_rows = self.rows_to_retry = 0
        self.expected_rows: dict[str, int] = {}
        self.new_parts: dict[str, ShardResult] = {}
        self.existing_parts: dict[str, tuple[PartFooter, str | None]] = {}
        self.planned, self.plan_complete = 0, False
        self.accepted_failures: int | None = None

    @property
    def part_count(self) -> int:
        """Number of parts that were there when the run began, without the stale ones that it has deleted."""
        return len(self._listing)

    @property
    def counts(self) -> tuple[int, int, int]:
        """Images planned so far, rows predicted, error rows."""
        return self.planned, self._rows - self._error_rows, self._error_rows

    @property
    def failed(self) -> int:
        """Error rows so far, without those that are still to be retried."""
        return self._error_rows - self.rows_to_retry

    def read_existing_parts(self, head: PlanHead, heartbeat: Heartbeat) -> None:
        """Read the footers of this plan's parts, so that the error budget counts the failures of earlier runs.

        Raises:
            CheckFailed: A part was not written by batchjob.
        """
        for name, footer in read_present_footers(self._store, self._listing, heartbeat):
            if footer is not None and footer.plan == head.plan:
                self.existing_parts[name] = footer.compact(), self._listing[name].etag
                self._count_rows(footer)
                self.rows_to_retry += footer.failed if self._retry else 0

    def add_chunk(self, chunk: Chunk) -> tuple[int, list[ShardKey]]:
        """Add a chunk of the plan.

        Returns:
            The number of its images that need no work any more, and its shards that do.
        """
        self.expected_rows.update((key.part_key, key.rows) for key in chunk.shards)
        self.planned, self.plan_complete = chunk.end_cursor.rows, chunk.is_last
        remaining = [key for key in map(self._select_for_work, chunk.shards) if key is not None]
        done = sum(key.rows for key in chunk.shards) - sum(key.images_to_read for key in remaining)
        return done, remaining

    def record_commit(self, result: ShardResult) -> None:
        """Count a shard that a worker of this run has committed."""
        key, footer = result.key, result.footer.compact()
        self.new_parts[key.part_key] = replace(result, footer=footer)
        if key.revision:
            self._error_rows += footer.failed - key.error_rows
            self.rows_to_retry -= key.error_rows
        else:
            self._count_rows(footer)

    def delete_stale_parts(self, heartbeat: Heartbeat) -> None:
        """Delete parts that the plan, as far as it is known, does not name, if discarded plans left them.

        Raises:
            CheckFailed, Temporary: See `existing_output.delete_stale_parts`.
        """
        unplanned = self._listing.keys() - self.expected_rows.keys()
        delete_stale_parts(self._store, unplanned, heartbeat)
        self._listing = {name: info for name, info in self._listing.items() if name not in unplanned}

    def check_parts(self, replaced: PlanHead | None, heartbeat: Heartbeat) -> None:
        """Check that a new plan may be made: all parts belong to discarded plans or to the one that is replaced.

        Raises:
            CheckFailed, Temporary: See `existing_output.delete_stale_parts`.
        """
        find_stale_parts(self._store, self._listing, heartbeat, replaced)

    def find_exceeded_limit(self, budget: ErrorBudget) -> str:
        """Return the limit of the error budget that this run is certain to exceed; empty if there is none yet."""
        planned = self.planned if self.plan_complete else None
        return find_exceeded_limit(budget, self.failed, planned, self.accepted_failures)

    def _select_for_work(self, key: ShardKey) -> ShardKey | None:
        """Return the key to dispatch, of the next revision if the part is to be replaced; None if it is good."""
        if key.part_key not in self._listing:
            return key
        if not self._retry or key.part_key not in self.existing_parts:
            return None
        footer, _ = self.existing_parts[key.part_key]
        return replace(key, revision=footer.revision + 1, error_rows=footer.failed) if footer.failed else None

    def _count_rows(self, footer: PartFooter) -> None:
        self._rows += footer.rows
        self._error_rows += footer.failed


def find_exceeded_limit(
    budget: ErrorBudget, failed: int, planned: int | None, accepted_failures: int | None = None
) -> str:
    """Return the setting of the error budget that is exceeded, with its value; empty if none is.

    Args:
        budget: The limits.
        failed: Error rows.
        planned: Images in the plan; None if not all of them are known yet.
        accepted_failures: Error rows that are accepted whatever the limits say; None if there is no such number.
    """
    if accepted_failures is not None and failed <= accepted_failures:
        return ""
    if budget.max_count is not None and failed > budget.max_count:
        return f"errors.max_count allows {budget.max_count:,}"
    # A division, because the product has rounding errors: 0.29 * 100 is less than 29.
    if planned and failed / planned > budget.max_rate:
        return f"errors.max_rate allows {budget.max_rate:.2%}"
    return ""
