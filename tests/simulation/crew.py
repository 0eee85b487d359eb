"""Workers that take turns: what they are handed through a real placement, and the parts that they commit."""

from __future__ import annotations

import secrets
import tempfile
import threading
from collections.abc import Sequence
from functools import lru_cache
from pathlib import Path

import pyarrow as pa
from memory_store import Call, MemoryStore

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
from batchjob.types import ErrorRecord as ImageError
from batchjob.types import ImageInfo, ImageRef, Shard, ShardKey
from batchjob.worker.messages import (
    ShardCommitted,
    ShardFailed,
    WorkerEvent,
    WorkerFailed,
    WorkerInfo,
    WorkerReady,
    WorkerSetup,
)
from simulation.actor import REST, Actor, Client

__all__ = ["Crew", "Worker"]

SCHEMA = build_row_schema([], [pa.field("score", pa.float64())])
MODEL = "fake@000000000000"
LOADED = WorkerInfo("cpu", "fp32", MODEL, ("score",), batch_size=2, seconds=0.0)
# Ids of one length each, so that a part that was once made can be had again under other ones.
_PLAN, _SHARD, _ATTEMPT = "p" * 16, "s" * 16, "a" * 16
_HEARD_TURNS = 2


class Crew:
    """The pool of one driver.

    Args:
        driver: whose it is.
        shared: the objects that all see.
        size: workers.
        mended: set once the images that were bad are good.

    Attributes:
        epoch: of the driver's lease; `seen` the highest it has seen since.
        looked: when it last looked, by its own clock.
        handed_out: shards, in order.
    """

    def __init__(self, driver: Actor, shared: MemoryStore, size: int, mended: threading.Event) -> None:
        self._driver, self._shared, self.size, self.mended = driver, shared, size, mended
        self._placement = Placement()
        self._events: list[tuple[str, WorkerEvent]] = []
        self._named = 0
        self.workers: list[Worker] = []
        self.closed = False
        self.epoch = self.seen = 0
        self.looked = 0.0
        self.handed_out: list[int] = []
        self._turns_since_seen = 0

    # -- Pool ----------------------------------------------------------------------------------------------------------

    def start(self, setup: WorkerSetup) -> None:
        for _ in range(self.size):
            self._hire()

    def free_slots(self) -> int:
        return self._placement.free_slots()

    def idle_workers(self) -> int:
        return self._placement.idle_workers()

    def submit(self, key: ShardKey, plan_number: int) -> None:
        assert self._turns_since_seen < _HEARD_TURNS, f"{self._driver.name} hands out under a lease it knows to be lost"
        self.handed_out.append(key.index)
        self._placement.submit(key, plan_number)
        self._hand_over()

    def submit_speculative(self, key: ShardKey, plan_number: int) -> None:
        assert self._turns_since_seen < _HEARD_TURNS, f"{self._driver.name} backs up under a lease it knows to be lost"
        self._placement.submit_speculative(key, plan_number)
        self._hand_over()

    def wait(self, timeout: float) -> list[WorkerEvent]:
        age = self._driver.clock - self.looked
        assert age <= HEARTBEAT_SECONDS, f"{self._driver.name} has not looked at the lease for {age} s"
        self._turns_since_seen += self.seen > self.epoch
        self._driver.wait("wait")
        if not self._events:
            self._driver.clock += timeout
        told, self._events = self._events, []
        for worker, event in told:
            self._placement.apply(worker, event)
        self._hand_over()
        return [event for _, event in told]

    def close(self) -> None:
        """Workers that are at work may be slow to hear of it."""
        self.closed = True

    # -- for workers and tests -----------------------------------------------------------------------------------------

    def tell(self, worker: str, event: WorkerEvent) -> None:
        self._events.append((worker, event))

    def lose(self, worker: Worker) -> None:
        """A worker's process died; another takes its place, as on a cluster."""
        self.workers.remove(worker)
        if self.closed:
            return
        lost = self._placement.remove_worker(worker.name)
        self._events = [(name, event) for name, event in self._events if name != worker.name]
        reason = f"worker {worker.name} was lost"
        self._events += [("", ShardFailed(key, AttemptFailed(reason))) for key in lost[:1]]
        self._events += [("", ShardFailed(key, AttemptInterrupted(reason))) for key in lost[1:]]
        self._hire()

    def _hire(self) -> None:
        self._named += 1
        self.workers.append(Worker(f"{self._driver.name} worker {self._named}", self, self._shared))

    def _hand_over(self) -> None:
        by_name = {worker.name: worker for worker in self.workers}
        for due in self._placement.take_assignments():
            by_name[due.worker].todo.append((due.key, due.plan_number))


class Worker(Actor):
    """Takes shards and commits their parts, as `worker.Worker` does, but for torch.

    Attributes:
        todo: what it was handed.
        crew: that it belongs to.
    """

    def __init__(self, name: str, crew: Crew, shared: MemoryStore) -> None:
        self.todo: list[tuple[ShardKey, int]] = []
        self.crew = crew
        self._plan: tuple[PlanHead, PlanReader] | None = None
        self.store = Client(shared, self)
        super().__init__(name, self._work_on)

    @property
    def resting(self) -> bool:
        """Whether there is nothing for it to do."""
        return self.stop == Call(REST, "") and not self.todo

    def _work_on(self) -> None:
        self.crew.tell(self.name, WorkerReady(self.name, LOADED))
        while True:
            while not self.todo:
                if self.crew.closed:
                    return
                self.wait(REST)
            key, number = self.todo.pop(0)
            try:
                self._begin(number)
            except BatchjobError as error:
                self.crew.tell(self.name, WorkerFailed(error))
                return
            try:
                event: WorkerEvent = ShardCommitted(self._done(key))
            except BatchjobError as error:
                event = ShardFailed(key, error)
            self.crew.tell(self.name, event)

    def _begin(self, number: int) -> None:
        if self._plan is not None:
            return
        found, head = read_current_head(self.store)
        if head is None or found != number:
            raise Temporary("the plan was discarded while this run was starting")
        contract.put_or_verify(self.store, head, Contract(SCHEMA, MODEL, None))
        self._plan = head, PlanReader(self.store, head)

    def _done(self, key: ShardKey) -> ShardResult:
        assert self._plan is not None
        head, reader = self._plan
        shard = reader.read_shard(key)
        if key.revision:
            shard = retry.select_error_rows(self.store, shard)
        self.store.calls.append(Call("predict", ""))
        if self.wait("predict") is not None:
            raise AttemptFailed("a fault while predicting")

        def wanted() -> None:
            if is_discarded(self.store, head):
                raise Temporary("the plan was discarded while this run was at work")

        body, made = make_part(head.plan, shard, self.crew.mended.is_set())
        with tempfile.NamedTemporaryFile(prefix="part-", suffix=".parquet") as spooled:
            path = Path(spooled.name)
            path.write_bytes(body)
            if key.revision:
                stands, _ = retry.replace_part(self.store, key, path, made, wanted)
            else:
                stands = commit.commit_part(self.store, key, path, made, wanted)
        return ShardResult(key, stands.footer, {}, stands.committed_here, stands.info.etag)


def make_part(name: str, shard: Shard, mended: bool = False) -> tuple[bytes, PartFooter]:
    """A shard's part, at a retry the rows that were retried, and what its footer says."""
    bad = frozenset(ref.position for ref in shard.refs if "bad" in ref.uri and not mended)
    template = _template(shard.key.index, shard.key.revision, shard.refs, bad)
    made = _provenance(name, shard.key.id, secrets.token_hex(8), shard.key, len(shard.refs), len(bad))
    for old, new in ((_PLAN, name), (_SHARD, shard.key.id), (_ATTEMPT, made.attempt)):
        assert len(old) == len(new)
        template = template.replace(old.encode(), new.encode())
    return template, made


@lru_cache(maxsize=256)
def _template(index: int, number: int, refs: Sequence[ImageRef], bad: frozenset[int]) -> bytes:
    key = ShardKey(index, _SHARD, len(refs), 0, 0, number)
    shard = Shard(key, tuple(refs), pa.table({"none": [None] * len(refs)}).select([]))
    facts = [ImageInfo(error=_BAD if ref.position in bad else None) for ref in refs]
    scores = pa.array([float(ref.position) for ref, fact in zip(refs, facts, strict=True) if fact.error is None])
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "part"
        with PartWriter(path, SCHEMA) as writer:
            writer.add(
                build_rows(
                    SCHEMA,
                    shard=shard,
                    start=0,
                    image_infos=facts,
                    columns=[scores.cast(pa.float64())],
                    error_records=[None] * len(scores),
                    run_id="run",
                    model_id=MODEL,
                )
            )
            writer.close(_provenance(_PLAN, _SHARD, _ATTEMPT, key, len(refs), len(bad)))
        return path.read_bytes()


_BAD = ImageError("decode", "truncated", "ends too early")


def _provenance(name: str, shard: str, attempt: str, key: ShardKey, images: int, bad: int) -> PartFooter:
    return PartFooter(
        plan=name,
        shard=shard,
        index=key.index,
        attempt=attempt,
        revision=key.revision,
        fingerprint="f",
        model="m",
        rows=images,
        failed=bad,
        errors={"decode/truncated": bad} if bad else {},
        seconds={"wall": 0.5},
        versions={},
    )
