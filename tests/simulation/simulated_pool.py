"""Simulated worker pool: a real placement, and workers that are actors and commit parts without torch."""

from __future__ import annotations

import secrets
import tempfile
import threading
from collections.abc import Sequence
from functools import lru_cache
from pathlib import Path

import pyarrow as pa

from batchjob.driver.lease import HEARTBEAT_SECONDS
from batchjob.errors import AttemptFailed, AttemptInterrupted, BatchjobError, Temporary
from batchjob.output import commit, retry
from batchjob.output.part_writer import PartWriter, build_rows
from batchjob.output.provenance import PartFooter, ShardResult
from batchjob.output.schema import build_row_schema
from batchjob.plan import contract
from batchjob.plan.contract import Contract
from batchjob.plan.head import PlanHead, is_discarded, read_current_head
from batchjob.plan.reader import PlanReader
from batchjob.pool.placement import Placement
from batchjob.types import ErrorRecord, ImageInfo, ImageRef, Shard, ShardKey
from batchjob.worker.messages import (
    ShardCommitted,
    ShardFailed,
    WorkerEvent,
    WorkerFailed,
    WorkerInfo,
    WorkerReady,
    WorkerSetup,
)
from tests.simulation.actor import REST, Actor
from tests.support.memory_store import Call, MemoryStore
from tests.support.part_footers import make_footer

__all__ = ["SimulatedPool", "SimulatedWorker"]

SCHEMA = build_row_schema([], [pa.field("score", pa.float64())])
MODEL = "fake@000000000000"
WORKER_INFO = WorkerInfo("cpu", "fp32", MODEL, ("score",), batch_size=2, seconds=0.0)
# Ids of fixed lengths, so that a part that was built once can be reused with other ids.
_PLAN, _SHARD, _ATTEMPT = "p" * 16, "s" * 16, "a" * 16
_MAX_WAITS = 2


class SimulatedPool:
    """Pool of one simulated driver.

    Args:
        driver: Driver that the pool belongs to.
        shared: Objects that all processes see.
        size: Number of workers.
        repaired: Set once the bad images are good.

    Attributes:
        epoch: Epoch of the driver's lease.
        newest_epoch: Newest epoch that the driver has seen since.
        last_look: Time of its last look at the lease, by its own clock.
        submitted: Indexes of the shards submitted, in order.
    """

    def __init__(self, driver: Actor, shared: MemoryStore, size: int, repaired: threading.Event) -> None:
        self._driver, self._shared, self.size, self.repaired = driver, shared, size, repaired
        self._placement = Placement()
        self._events: list[tuple[str, WorkerEvent]] = []
        self._worker_count = 0
        self.workers: list[SimulatedWorker] = []
        self.closed = False
        self.epoch = self.newest_epoch = 0
        self.last_look = 0.0
        self.submitted: list[int] = []
        self._waits_since_lost = 0

    # -- Pool ----------------------------------------------------------------------------------------------------------

    def start(self, setup: WorkerSetup) -> None:
        for _ in range(self.size):
            self._start_worker()

    def free_slots(self) -> int:
        return self._placement.free_slots()

    def idle_workers(self) -> int:
        return self._placement.idle_workers()

    def submit(self, key: ShardKey, plan_number: int) -> None:
        assert self._waits_since_lost < _MAX_WAITS, (
            f"{self._driver.name} dispatches under a lease that it knows to be lost"
        )
        self.submitted.append(key.index)
        self._placement.submit(key, plan_number)
        self._deliver_assignments()

    def submit_speculative(self, key: ShardKey, plan_number: int) -> None:
        assert self._waits_since_lost < _MAX_WAITS, (
            f"{self._driver.name} speculates under a lease that it knows to be lost"
        )
        self._placement.submit_speculative(key, plan_number)
        self._deliver_assignments()

    def wait(self, timeout: float) -> list[WorkerEvent]:
        age = self._driver.clock - self.last_look
        assert age <= HEARTBEAT_SECONDS, f"{self._driver.name} has not looked at the lease for {age} s"
        self._waits_since_lost += self.newest_epoch > self.epoch
        self._driver.wait("wait")
        if not self._events:
            self._driver.clock += timeout
        events, self._events = self._events, []
        for worker, event in events:
            self._placement.apply(worker, event)
        self._deliver_assignments()
        return [event for _, event in events]

    def close(self) -> None:
        """Close the pool; workers that are busy may notice that late."""
        self.closed = True

    # -- for workers and tests -----------------------------------------------------------------------------------------

    def report(self, worker: str, event: WorkerEvent) -> None:
        self._events.append((worker, event))

    def replace_lost_worker(self, worker: SimulatedWorker) -> None:
        """Replace a worker whose process died, as on a cluster."""
        self.workers.remove(worker)
        if self.closed:
            return
        lost = self._placement.remove_worker(worker.name)
        self._events = [(name, event) for name, event in self._events if name != worker.name]
        reason = f"worker {worker.name} was lost"
        self._events += [("", ShardFailed(key, AttemptFailed(reason))) for key in lost[:1]]
        self._events += [("", ShardFailed(key, AttemptInterrupted(reason))) for key in lost[1:]]
        self._start_worker()

    def _start_worker(self) -> None:
        self._worker_count += 1
        self.workers.append(SimulatedWorker(f"{self._driver.name} worker {self._worker_count}", self, self._shared))

    def _deliver_assignments(self) -> None:
        by_name = {worker.name: worker for worker in self.workers}
        for assignment in self._placement.take_assignments():
            by_name[assignment.worker].todo.append((assignment.key, assignment.plan_number))


class SimulatedWorker(Actor):
    """Worker that takes shards and commits their parts like the real one, but without torch.

    Attributes:
        todo: Shards that it was given, with their plan numbers.
        pool: Pool that it belongs to.
    """

    def __init__(self, name: str, pool: SimulatedPool, shared: MemoryStore) -> None:
        self.todo: list[tuple[ShardKey, int]] = []
        self.pool = pool
        self._plan: tuple[PlanHead, PlanReader] | None = None
        self.store = MemoryStore(shared.state, self.pause_before_call)
        super().__init__(name, self._run_shards)

    @property
    def is_resting(self) -> bool:
        """True if it has nothing to do."""
        return self.stop == Call(REST, "") and not self.todo

    def _run_shards(self) -> None:
        self.pool.report(self.name, WorkerReady(self.name, WORKER_INFO))
        while True:
            while not self.todo:
                if self.pool.closed:
                    return
                self.wait(REST)
            key, number = self.todo.pop(0)
            try:
                self._join_plan(number)
            except BatchjobError as error:
                self.pool.report(self.name, WorkerFailed(error))
                return
            try:
                event: WorkerEvent = ShardCommitted(self._commit_shard(key))
            except BatchjobError as error:
                event = ShardFailed(key, error)
            self.pool.report(self.name, event)

    def _join_plan(self, number: int) -> None:
        if self._plan is not None:
            return
        found, head = read_current_head(self.store)
        if head is None or found != number:
            raise Temporary("the plan was discarded while this run was starting")
        own = Contract(SCHEMA, MODEL, None)
        contract.verify(contract.put_or_read(self.store, head, own), own, self.store.uri)
        self._plan = head, PlanReader(self.store, head)

    def _commit_shard(self, key: ShardKey) -> ShardResult:
        assert self._plan is not None
        head, reader = self._plan
        shard = reader.read_shard(key)
        if key.revision:
            shard = retry.select_error_rows(self.store, shard)
        self.store.calls.append(Call("predict", ""))
        if self.wait("predict") is not None:
            raise AttemptFailed("a fault while predicting")

        def raise_if_discarded() -> None:
            if is_discarded(self.store, head):
                raise Temporary("the plan was discarded while this run was at work")

        body, footer = make_part(head.plan, shard, self.pool.repaired.is_set())
        with tempfile.NamedTemporaryFile(prefix="part-", suffix=".parquet") as file:
            path = Path(file.name)
            path.write_bytes(body)
            if key.revision:
                result, _ = retry.replace_part(self.store, key, path, footer, raise_if_discarded)
            else:
                result = commit.commit_part(self.store, key, path, footer, raise_if_discarded)
        return ShardResult(key, result.footer, {}, result.committed_here, result.info.etag)


def make_part(name: str, shard: Shard, repaired: bool = False) -> tuple[bytes, PartFooter]:
    """Make the part of a shard, in a retry only its retried rows; return its bytes and its footer."""
    bad = frozenset(ref.position for ref in shard.refs if "bad" in ref.uri and not repaired)
    template = _make_template(shard.key.index, shard.key.revision, shard.refs, bad)
    footer = _make_footer(name, shard.key.id, secrets.token_hex(8), shard.key, len(shard.refs), len(bad))
    for old, new in ((_PLAN, name), (_SHARD, shard.key.id), (_ATTEMPT, footer.attempt)):
        assert len(old) == len(new)
        template = template.replace(old.encode(), new.encode())
    return template, footer


@lru_cache(maxsize=256)
def _make_template(index: int, number: int, refs: Sequence[ImageRef], bad: frozenset[int]) -> bytes:
    key = ShardKey(index, _SHARD, len(refs), 0, 0, number)
    shard = Shard(key, tuple(refs), pa.table({"none": [None] * len(refs)}).select([]))
    image_infos = [ImageInfo(error=_BAD_IMAGE if ref.position in bad else None) for ref in refs]
    good = [ref for ref, info in zip(refs, image_infos, strict=True) if info.error is None]
    scores = pa.array([float(ref.position) for ref in good])
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "part"
        with PartWriter(path, SCHEMA) as writer:
            writer.add(
                build_rows(
                    SCHEMA,
                    shard=shard,
                    start=0,
                    image_infos=image_infos,
                    columns=[scores.cast(pa.float64())],
                    error_records=[None] * len(scores),
                    run_id="run",
                    model_id=MODEL,
                )
            )
            writer.close(_make_footer(_PLAN, _SHARD, _ATTEMPT, key, len(refs), len(bad)))
        return path.read_bytes()


_BAD_IMAGE = ErrorRecord("decode", "truncated", "ends too early")


def _make_footer(name: str, shard: str, attempt: str, key: ShardKey, images: int, bad: int) -> PartFooter:
    errors = {"decode/truncated": bad} if bad else {}
    return make_footer(
        key, plan=name, shard=shard, attempt=attempt, rows=images, failed=bad, errors=errors, seconds={"wall": 0.5}
    )
