"""What a driver knows of its output, and the end of a run: parts against plan, error budget, report, `_SUCCESS`."""

from __future__ import annotations

from dataclasses import replace

from batchjob.concurrency import run_in_background
from batchjob.driver.existing_output import Heartbeat, delete_stale_parts, read_present_footers
from batchjob.job.runtime import ErrorBudget
from batchjob.output.commit import list_parts as parts_of_commit
from batchjob.output.provenance import PartFooter, ShardResult
from batchjob.plan.chunks import Chunk
from batchjob.plan.head import PlanHead
from batchjob.storage.store import Store
from batchjob.types import ShardKey

__all__ = ["RunState", "find_exceeded_limit"]


class RunState:
    """What one driver knows of its output while it works: parts that are there, parts to come, and what they hold.

    Args:
        store: the output.
        beat: called while that takes time, to keep the lease.
        retry: parts with error rows are to be replaced.

    Attributes:
        pending: error rows that are still to be retried.
    """

    def __init__(self, store: Store, heartbeat: Heartbeat, retry: bool = False) -> None:
        self._store, self._retry = store, retry
        self._there = run_in_background(lambda: parts_of_commit(store), heartbeat)
        self._rows = self._failed = self.rows_to_retry = 0
        self.expected_rows: dict[str, int] = {}
        self.new_parts: dict[str, ShardResult] = {}
        self.existing_parts: dict[str, tuple[PartFooter, str | None]] = {}
        self.planned, self.plan_complete = 0, False

    @property
    def part_count(self) -> int:
        """Parts that were there when the run began."""
        return len(self._there)

    @property
    def counts(self) -> tuple[int, int, int]:
        """Images planned so far, rows predicted, rows failed."""
        return self.planned, self._rows - self._failed, self._failed

    def read_existing_parts(self, head: PlanHead, heartbeat: Heartbeat) -> None:
        """Read the footers of this plan's parts, so that the error budget counts what failed in earlier runs.

        Raises:
            CheckFailed: a part was not written by batchjob.
        """
        for key, made in read_present_footers(self._store, self._there, heartbeat):
            if made is not None and made.plan == head.plan:
                self.existing_parts[key] = made.compact(), self._there[key].etag
                self._count(made)
                self.rows_to_retry += made.failed if self._retry else 0

    def add_chunk(self, chunk: Chunk) -> tuple[int, list[ShardKey]]:
        """Take in a chunk of the plan: images of it that are committed already, and the shards to do."""
        self.expected_rows.update((key.part_key, key.rows) for key in chunk.shards)
        self.planned, self.plan_complete = chunk.end_cursor.rows, chunk.is_last
        left = [key for key in map(self._to_do, chunk.shards) if key is not None]
        return sum(key.rows for key in chunk.shards) - sum(key.images_to_read for key in left), left

    def record_commit(self, result: ShardResult) -> None:
        """Count a shard that a worker of this run has seen committed."""
        key, made = result.key, result.footer.compact()
        self.new_parts[key.part_key] = replace(result, footer=made)
        if key.revision:
            self._failed += made.failed - key.error_rows
            self.rows_to_retry -= key.error_rows
        else:
            self._count(made)

    def delete_stale_parts(self, heartbeat: Heartbeat) -> None:
        """Look at parts that the plan, as far as it is known, does not name. See `clear_foreign`."""
        foreign = self._there.keys() - self.expected_rows.keys()
        delete_stale_parts(self._store, foreign, heartbeat)
        self._there = {key: stat for key, stat in self._there.items() if key not in foreign}

    @property
    def failed(self) -> int:
        """Error rows so far, those left out that are to be retried."""
        return self._failed - self.rows_to_retry

    def find_exceeded_limit(self, budget: ErrorBudget) -> str:
        """What makes it certain that the run ends over its error budget; empty while nothing does."""
        return find_exceeded_limit(budget, self.failed, self.planned if self.plan_complete else None)

    def _to_do(self, key: ShardKey) -> ShardKey | None:
        """As it is to be handed out; None where its part is there and good."""
        if key.part_key not in self._there:
            return key
        if (
            not self._retry
            or key.part_key not in self.existing_parts
            or not (made := self.existing_parts[key.part_key][0]).failed
        ):
            return None
        return replace(key, revision=made.revision + 1, error_rows=made.failed)

    def _count(self, made: PartFooter) -> None:
        self._rows += made.rows
        self._failed += made.failed


def find_exceeded_limit(budget: ErrorBudget, failed: int, planned: int | None) -> str:
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
