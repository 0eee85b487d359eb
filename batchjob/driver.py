"""The composition root of control: plan or resume, hand out shards, account, finish."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor, wait
from functools import cached_property
from typing import Any, TypeVar

import pyarrow as pa

import batchjob
from batchjob import accounting, ledger, plan
from batchjob.accounting import Run
from batchjob.drain import Drain
from batchjob.errors import BatchjobError, CheckFailed, InvalidJob, JobError, Temporary, Unavailable
from batchjob.feeder import Feeder, Input, Peek, peek
from batchjob.job import Job, difference
from batchjob.lease import Lease
from batchjob.loader import FEW_IMAGES
from batchjob.plan import Head
from batchjob.pool import Done, Event, Failed, Loaded, Pool, Ready, Setup, WorkerFailed
from batchjob.progress import Progress
from batchjob.records import Cursor, ShardKey, ShardResult
from batchjob.report import Outcome, PlanSummary
from batchjob.schedule import Schedule
from batchjob.sink import row_schema
from batchjob.storage import Options, Reader, Store, open_store, probe

__all__ = ["discard", "plan_only", "run"]

T = TypeVar("T")
MakePool = Callable[[], Pool]


_TURN_SECONDS = 0.2
_DRAIN_SECONDS = 12.0
_PART_BYTES = 512 << 20
_PART_LIMIT = 4 << 30
_SHARD_ROWS = (64, 8192)
_SHARDS_A_WORKER = 4
_UNAVAILABLE_IN_A_ROW = 3
_WAITING_ENOUGH = 10_000


def run(job: Job, make_pool: MakePool, *, allow_empty: bool, progress: Progress) -> Outcome:
    """Run a job to its end, or up to where it can go; what is committed already is not done again.

    Raises:
        JobError: every planned ending but success; its class says which.
    """
    began = time.monotonic()
    store = open_store(job.output.uri, job.storage)
    if (outcome := _already_complete(store, job)) is not None:
        return outcome
    lease = Lease.acquire(store, note=progress.note)
    try:
        with Drain() as drain:
            session = _Session(job, store, lease, make_pool, drain, progress)
            session.work(allow_empty)
            return session.finish(time.monotonic() - began)
    finally:
        lease.release()


def plan_only(job: Job, *, allow_empty: bool, progress: Progress) -> PlanSummary:
    """Freeze a job's plan without running it.

    Raises:
        JobError: see `run`.
    """
    store = open_store(job.output.uri, job.storage)
    lease = Lease.acquire(store, note=progress.note)
    try:
        with Drain() as drain:
            return _Session(job, store, lease, None, drain, progress).plan_only(allow_empty)
    finally:
        lease.release()


def discard(uri: str, options: Options | None = None) -> str:
    """Bury the plan in force and delete its parts; the next run plans anew. Returns a sentence saying what went.

    Raises:
        Temporary: a driver is at work there.
        InvalidJob: there is no plan.
    """
    store = open_store(uri, options)
    _something_to_discard(store)  # before the lease leaves a trace in a folder that is not ours
    lease = Lease.acquire(store)
    try:
        number, head = _something_to_discard(store)
        if head is not None:
            plan.bury(store, head)
        store.delete(ledger.SUCCESS)
        leftovers = ledger.parts(store)
        for key in leftovers:
            store.delete(key)
        name = f"plan {head.plan} (number {number})" if head else "an earlier plan's leftovers"
        return f"{store.uri}: discarded {name}, deleted {len(leftovers)} parts"
    finally:
        lease.release()


def _something_to_discard(store: Store) -> tuple[int, Head | None]:
    """The plan in force, or what a discard that was cut short has left. Raises InvalidJob where there is neither."""
    number, head = plan.current(store)
    if head is None and not (number and ledger.parts(store)):
        raise InvalidJob(f"{store.uri}: no plan in force, nothing to discard")
    return number, head


def _already_complete(store: Store, job: Job) -> Outcome | None:
    """The outcome of a finished output of this very job, without lease, model or PUT.

    Raises:
        InvalidJob: the output belongs to another job.
        CheckFailed: `_SUCCESS` stands, but parts that it lists are gone or others are there.
    """
    _, head = plan.current(store)
    if head is None:
        return None
    _compare(store, job, head)
    success = ledger.read_success(store)
    if success is None or success[0].get("plan") != head.plan:
        return None
    facts, _ = success
    if odd := ledger.missing_from_success(facts, ledger.parts(store)):
        raise CheckFailed(
            f"{store.uri}/_SUCCESS stands, but {len(odd)} parts are gone, changed or not listed in it "
            f"({', '.join(odd[:3])}); restore them, or `batchjob discard {store.uri} --yes` and run again"
        )
    counts = facts["counts"]
    return Outcome("already_complete", counts["planned"], counts["predicted"], counts["failed"], 0.0, 0.0, store.uri, 0)


def _compare(store: Store, job: Job, head: Head) -> None:
    if lines := difference(head.fingerprint, job.fingerprint()):
        listed = "\n".join(f"  {line}" for line in lines)
        raise InvalidJob(
            f"{store.uri} belongs to another job:\n{listed}\nchoose another output.uri, restore these settings, or "
            f"`batchjob discard {store.uri} --yes` to throw its rows away"
        )


class _Session:
    """One driver's turn at a job, under the lease."""

    def __init__(
        self, job: Job, store: Store, lease: Lease, make_pool: MakePool | None, drain: Drain, progress: Progress
    ) -> None:
        self.job, self.store, self.lease, self.drain, self.progress = job, store, lease, drain, progress
        self.make_pool = make_pool
        self.schedule = Schedule(job.errors.attempts)
        self.committed = ledger.parts(store)
        self.expected: dict[str, int] = {}
        self.fresh: dict[str, ShardResult] = {}
        self.pool: Pool | None = None
        self.loaded: list[Loaded] = []
        self.head: Head | None = None
        self.unavailable = 0
        self.aside = ThreadPoolExecutor(1, thread_name_prefix="aside")

    # -- plan or resume ----------------------------------------------------------------------------------------

    def work(self, allow_empty: bool) -> None:
        """Plan or resume, and do every shard that is left."""
        self.progress.start(None)
        try:
            number, head = plan.current(self.store)
            self.head = head or self._new_plan(number, allow_empty)
            _compare(self.store, self.job, self.head)
            if head is not None:
                self.progress.note(f"resuming plan {head.plan}: {len(self.committed)} parts are committed")
            feeder = Feeder(plan.extend(self.store, self.head, self._refs, self._unchanged))
            try:
                self._loop(feeder)
            finally:
                feeder.close()
        finally:
            self.progress.stop()
            self.aside.shutdown(wait=False, cancel_futures=True)
            if self.pool is not None:
                self.pool.close()

    @cached_property
    def _input(self) -> Input:
        return Input(self.job, Reader(self.job.storage))

    def _refs(self, after: Cursor) -> Iterator[pa.RecordBatch]:
        return self._input.refs(after)

    def _unchanged(self) -> None:
        assert self.head is not None
        self._input.check_unchanged(self.head)

    def plan_only(self, allow_empty: bool) -> PlanSummary:
        """Freeze the plan and list the whole input into it; no worker is started."""
        began = time.monotonic()
        number, head = plan.current(self.store)
        if head is None:
            few = self._look_at_input(allow_empty)
            head = self._freeze(number, few if few.whole else self._peek_far())
        _compare(self.store, self.job, head)
        self.head = head
        images = shards = 0
        for chunk in plan.extend(self.store, head, self._refs, self._unchanged):
            images, shards = chunk.cursor.rows, shards + len(chunk.shards)
            self.progress.planned(images, chunk.last)
            self.lease.beat()
            if self.drain.asked.is_set():
                self._stop()
        return PlanSummary(head.plan, images, shards, head.shard_size, self.store.uri, time.monotonic() - began)

    def _new_plan(self, number: int, allow_empty: bool) -> Head:
        """Freeze a plan, but only once the input is known to be there and the model to stand on its device."""
        few = self._look_at_input(allow_empty)
        self._start_pool(few)
        seen = few if few.whole else self._peek_far()
        while not self.loaded:
            self._turn()
        self._check_columns()
        return self._freeze(number, seen)

    def _look_at_input(self, allow_empty: bool) -> Peek:
        """Everything that can be said of job, input and store without a model. Nothing is frozen by it."""
        self._beating(lambda: probe(self.store))
        self._beating(self._check_files)
        self._beating(lambda: self._input.require(self.progress.note))
        self._check_columns()
        few = self._beating(lambda: peek(self._input, FEW_IMAGES))
        if few.rows == 0 and not allow_empty:
            raise InvalidJob(
                f"{self.job.input.uri}: no images there (input.uri, its extensions, include and exclude); "
                "put some there, or run with --allow-empty for an output of no rows"
            )
        return few

    def _check_files(self) -> None:
        """Weights, code and labels are there, as far as that shows without torch."""
        reader = Reader(self.job.storage)
        self.job.model.check(reader, self.job.base)
        self.job.task.check(reader)

    def _peek_far(self) -> Peek:
        return self._beating(lambda: peek(self._input, plan.CHUNK_ROWS))

    def _freeze(self, number: int, seen: Peek) -> Head:
        head = plan.new_head(
            number,
            job=self.job.portable(),
            fingerprint=self.job.fingerprint(),
            shard_size=self._shard_size(seen),
            source_version=self._beating(lambda: self._input.version),
            batchjob=batchjob.__version__,
        )
        self._check_foreign()
        if number:  # a discard that was cut short may have left it
            self.store.delete(ledger.SUCCESS)
        return self._beating(lambda: plan.freeze(self.store, head))

    def _check_columns(self) -> None:
        """Raises InvalidJob when a passthrough column clashes with ours, the task's or the output path's."""
        task = dict.fromkeys(name for loaded in self.loaded for name in loaded.columns)
        columns = [pa.field(name, pa.string()) for name in task]
        row_schema(self._input.fields, columns, self.job.input.has_id, self.job.output.uri)

    def _shard_size(self, seen: Peek) -> int:
        """Images a shard: as the job says, else small enough to share out and to keep a part near 512 MiB."""
        row_bytes = self.job.task.row_bytes
        wanted = self.job.runtime.shard_size
        if wanted == "auto":
            least, most = _SHARD_ROWS
            workers = max(1, self.pool.size if self.pool else 1)
            share = -(-seen.rows // (workers * _SHARDS_A_WORKER)) if seen.whole else most
            return max(1, min(max(least, share), most, _PART_BYTES // row_bytes))
        if wanted * row_bytes > _PART_LIMIT:
            raise InvalidJob(
                f"runtime.shard_size: {wanted:,} rows of up to {row_bytes:,} bytes may exceed 4 GiB a part; "
                f"give at most {_PART_LIMIT // row_bytes:,}"
            )
        return wanted

    # -- the control loop --------------------------------------------------------------------------------------

    def _loop(self, feeder: Feeder) -> None:
        """Hand out shards until all are done or given up. Every turn shows life and hears signals."""
        while not (feeder.finished and self.schedule.idle):
            self._absorb(feeder)
            if self.schedule.waiting:
                self._hand_out()
            self._turn()

    def _absorb(self, feeder: Feeder) -> None:
        """Take in confirmed chunks as long as few shards wait; look for foreign parts once all are known."""
        all_known_before = feeder.finished
        while self.schedule.waiting < _WAITING_ENOUGH and (chunk := feeder.take()) is not None:
            done = [key for key in chunk.shards if key.part in self.committed]
            self.expected.update((key.part, key.rows) for key in chunk.shards)
            self.schedule.add(key for key in chunk.shards if key.part not in self.committed)
            self.progress.planned(chunk.cursor.rows, chunk.last)
            self.progress.resumed(sum(key.rows for key in done))
        if feeder.finished and not all_known_before:
            self._check_foreign()

    def _hand_out(self) -> None:
        if self.pool is None:
            self._start_pool(self._beating(self._peek_at_plan))
        assert self.pool is not None
        assert self.head is not None
        while self.pool.free() > 0 and (key := self.schedule.take()) is not None:
            self.pool.submit(key, self.head.number)

    def _turn(self) -> None:
        """One turn: beat, hear signals, handle what the pool reports."""
        self.lease.beat()
        if self.drain.asked.is_set():
            self._stop()
        if self.pool is None:
            time.sleep(_TURN_SECONDS)
            return
        for event in self.pool.wait(_TURN_SECONDS):
            self._handle(event)

    def _handle(self, event: Event) -> None:
        match event:
            case Ready(worker, loaded):
                self.loaded.append(loaded)
                self.drain.listen()
                self.progress.note(
                    f"worker {worker}: {loaded.model} on {loaded.device}, {loaded.precision}, batches of "
                    f"{loaded.batch_size}, after {loaded.seconds:.1f} s"
                )
            case Done(result):
                self.unavailable = 0
                if self.schedule.finish(result.key):
                    self.fresh[result.key.part] = result
                    self.progress.advance(result.made.rows, result.made.failed)
            case Failed(key, error):
                self._attempt_failed(key, error)
            case WorkerFailed(error):
                raise error

    def _attempt_failed(self, key: ShardKey, error: BatchjobError) -> None:
        """Network and credentials use up no attempt, but end the run when they persist; other job errors end it now."""
        if isinstance(error, Unavailable):
            self.unavailable += 1
            if self.unavailable >= _UNAVAILABLE_IN_A_ROW:
                raise error
        elif isinstance(error, JobError):
            raise error
        gave_up = self.schedule.fail(key, error.message, counts=not isinstance(error, Unavailable))
        self.progress.note(f"shard {key.index} failed{', given up' if gave_up else ''}: {error.message}")

    def _stop(self) -> None:
        """Hand out no more, give what runs a moment to commit, then end as temporary."""
        self.progress.note(f"stopping: up to {_DRAIN_SECONDS:.0f} s for {self.schedule.running} running shards")
        until = time.monotonic() + _DRAIN_SECONDS
        while self.pool is not None and self.schedule.running and time.monotonic() < until:
            self.lease.beat()
            for event in self.pool.wait(_TURN_SECONDS):
                self._handle(event)
        raise Temporary(f"{self.store.uri}: stopped by a signal; the same command resumes")

    def _beating(self, work: Callable[[], T]) -> T:
        """Do something that blocks, aside, while the loop goes on turning."""
        future = self.aside.submit(work)
        while not future.done():
            self._turn() if self.pool is not None else self._wait(future)
        return future.result()

    def _wait(self, future: Future[Any]) -> None:
        wait([future], _TURN_SECONDS)
        self.lease.beat()
        if self.drain.asked.is_set():
            self._stop()

    def _start_pool(self, seen: Peek) -> None:
        assert self.make_pool is not None, "planning alone starts no workers"
        self.pool = self.make_pool()
        self.pool.start(Setup(self.job.portable(), str(self.job.base), self.lease.witness, seen.sample, seen.whole))

    def _peek_at_plan(self) -> Peek:
        assert self.head is not None
        first = plan.PlanReader(self.store, self.head).first(FEW_IMAGES + 1)
        return Peek(len(first), len(first) <= FEW_IMAGES, tuple(ref.location for ref in first[:FEW_IMAGES]))

    def _check_foreign(self) -> None:
        """Parts that this plan does not know: deleted if a discarded plan left them, else an alarm."""
        foreign = self.committed.keys() - self.expected.keys()
        accounting.clear_foreign(self.store, foreign)
        self.committed = {key: stat for key, stat in self.committed.items() if key not in foreign}

    # -- the end -----------------------------------------------------------------------------------------------

    def finish(self, seconds: float) -> Outcome:
        """Verify what lies there against the plan, write the report, and `_SUCCESS` when the budget holds."""
        assert self.head is not None
        return accounting.conclude(
            self.store,
            self.head,
            Run(self.expected, self.fresh, tuple(self.schedule.given_up), tuple(self.loaded), seconds),
            max_rate=self.job.errors.max_rate,
            beat=self.lease.beat,
        )
