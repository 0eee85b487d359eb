"""The composition root of control: plan or resume, hand out shards, account, finish."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial

from batchjob.driver.control_loop import TURN_SECONDS, Drain, Turns, take_lease
from batchjob.driver.dispatcher import Dispatch, MakePool
from batchjob.driver.existing_output import (
    _already_complete,
    _as_planned,
    _bury,
    _leftovers,
    _nothing_planned,
    _something_to_discard,
    clear_foreign,
)
from batchjob.driver.finalize import Run, conclude
from batchjob.driver.plan_prefetcher import Feeder
from batchjob.driver.planner import Planning
from batchjob.driver.progress import Progress
from batchjob.driver.run_state import Books
from batchjob.errors import BatchjobError
from batchjob.job.job import Job
from batchjob.output import commit
from batchjob.output.success import read_success, withdraw_success
from batchjob.plan import reader
from batchjob.plan.head import Head, current
from batchjob.report.run_result import Outcome, PlanSummary
from batchjob.sources.listing import FEW_IMAGES, TYPICAL_BYTES, Peek
from batchjob.storage.objects import Stat
from batchjob.storage.options import Options
from batchjob.storage.store import Store, open_store
from batchjob.text import counted
from batchjob.worker.messages import Setup

__all__ = ["discard", "plan_only", "run"]

_WAITING_ENOUGH = 10_000


def run(
    job: Job,
    make_pool: MakePool,
    *,
    allow_empty: bool,
    progress: Progress,
    repair: bool = False,
    retry: bool = False,
) -> Outcome:
    """Run a job to its end, or up to where it can go; what is committed already is not done again.

    Args:
        job: what to run.
        make_pool: makes its workers, if any are needed.
        allow_empty: an input without images is no error.
        progress: who is told how it goes.
        repair: what is gone from a finished output is made again.
        retry: images whose rows hold an error are read again, and their parts replaced.

    Raises:
        JobError: every planned ending but success; its class says which, and it carries the counts.
    """
    began = time.monotonic()
    store = open_store(job.output.uri, job.storage)
    if (outcome := _already_complete(store, job, repair, retry)) is not None:
        return outcome
    with _in_control(store, progress, job.errors.outage_seconds) as turns:
        session = _Session(job, _patient(job), turns, make_pool, progress, retry)
        try:
            head = session.work(allow_empty, repair)
            return session.finish(head, began)
        except BatchjobError as error:
            error.counts = session.counts
            raise


def plan_only(job: Job, *, allow_empty: bool, progress: Progress) -> PlanSummary:
    """Freeze a job's plan without running it.

    Raises:
        JobError: see `run`.
    """
    began = time.monotonic()
    store = open_store(job.output.uri, job.storage)
    with _in_control(store, progress, job.errors.outage_seconds) as turns:
        store = _patient(job)
        number, head = turns.during(lambda: current(store))
        planning = Planning(_as_planned(job, store, head), store, turns, progress.note)
        progress.start(None)
        try:
            if head is None:
                seen = planning.look_further(planning.look(allow_empty), 0)
                Books(store, turns.beat).clear_foreign(turns.beat)
                head = planning.freeze(number, seen, 0, 0, partial(clear_foreign, store))
            images, shards = _write(planning, head, turns, progress)
        finally:
            progress.stop()
            planning.close()
    return PlanSummary(head.plan, images, shards, head.shard_size, store.uri, time.monotonic() - began)


def discard(uri: str, options: Options | None = None, progress: Progress | None = None) -> str:
    """Bury the plan in force and delete its parts; the next run plans anew. Returns a sentence saying what went.

    Raises:
        Temporary: a driver is at work there, or a signal came; the same command finishes what it began.
        InvalidJob: there is no plan.
    """
    store = open_store(uri, options)
    _something_to_discard(store)  # before the lease leaves a trace in a folder that is not ours
    with _in_control(store, progress) as turns:
        _, head = turns.during(lambda: _something_to_discard(store))
        turns.confirm()  # who was stopped for long would bury what another driver has finished since
        turns.during(lambda: _bury(store, head))
        leftovers = turns.during(lambda: _leftovers(store))
        deleted = commit.delete_all(store, leftovers, turns.beat)
    name = f"plan {head.plan} (number {head.number})" if head else "an earlier plan's leftovers"
    return f"{store.uri}: discarded {name}, deleted {counted(deleted, 'part')}"


@contextmanager
def _in_control(store: Store, progress: Progress | None, outage: float = 0.0) -> Iterator[Turns]:
    """The lease on an output, and signals as requests to stop. Raises Temporary where another driver is at work."""
    with Drain() as drain:  # around the lease, which nobody is to leave behind
        lease = take_lease(store, drain, progress.note if progress else lambda text: None)
        turns = Turns(lease, drain, store.uri, outage)
        try:
            yield turns
        finally:
            turns.leave()


def _patient(job: Job) -> Store:
    """The output once it is known to be there: an outage is waited for."""
    return open_store(job.output.uri, job.storage, outage=job.errors.outage_seconds)


def _write(planning: Planning, head: Head, turns: Turns, progress: Progress) -> tuple[int, int]:
    """Write a plan to its end; its images and shards."""
    images = shards = 0
    feeder = Feeder(planning.chunks(head))
    try:
        while not feeder.finished:
            turns.beat()
            if (chunk := feeder.take(TURN_SECONDS)) is not None:
                images, shards = chunk.cursor.rows, shards + len(chunk.shards)
                progress.planned(images, chunk.last)
    finally:
        feeder.close()
    return images, shards


class _Session:
    """One driver's work on one job, under the lease."""

    def __init__(
        self, job: Job, store: Store, turns: Turns, make_pool: MakePool, progress: Progress, retry: bool
    ) -> None:
        self._books = Books(store, turns.beat, retry)  # before the look at the plan: what it finds is of no later one
        self._number, self._resumed = turns.during(lambda: current(store))
        self._job = _as_planned(job, store, self._resumed)
        self._store, self._turns, self._progress = store, turns, progress
        self._planning = Planning(self._job, store, turns, progress.note)
        self._dispatch = Dispatch(job.errors.attempts, make_pool, progress, self._books.commit)
        self._dispatch.starting = turns.listen_to_signals
        turns.listen, turns.before_stop = self._dispatch.listen, lambda: self._dispatch.drain(turns.beat)
        self._stopped_early = False
        self._retry = retry
        self._success: Stat | None = None  # as a retry or a repair has found it

    @property
    def counts(self) -> tuple[int, int, int]:
        """Images planned so far, rows predicted, rows failed."""
        return self._books.counts

    def work(self, allow_empty: bool, repair: bool) -> Head:
        """Plan or resume, and do every shard that is left; the plan's head."""
        self._progress.start(None)
        try:
            head = self._resumed or (_nothing_planned(self._store) if self._retry else self._new_plan(allow_empty))
            if self._resumed:
                self._look_back(head, repair)
            feeder = Feeder(self._planning.chunks(head))
            try:
                self._loop(feeder, head)
            finally:
                feeder.close()
            return head
        finally:
            self._progress.stop()
            self._planning.close()
            self._dispatch.close()

    def finish(self, head: Head, began: float) -> Outcome:
        """Verify what lies there against the plan, write the report, and `_SUCCESS` when the budget holds."""
        books = self._books
        ran = Run(
            books.expected,
            books.fresh,
            tuple(self._dispatch.schedule.given_up),
            tuple(self._dispatch.workers),
            time.monotonic() - began,
            books.older,
            books.whole,
            self._stopped_early,
        )
        job, beat = self._job, self._turns.beat
        self._turns.confirm()  # who has slept through another driver's work is not the one to say how it ended
        return conclude(self._store, head, ran, budget=job.errors, summary=job.task.summary, beat=beat)

    def _new_plan(self, allow_empty: bool) -> Head:
        """Freeze a plan, but only once the input is known to be there and the model to stand on its device."""
        few = self._planning.look(allow_empty)
        self._start_workers(few)
        seen = self._planning.look_further(few, self._dispatch.size)
        while not (workers := self._dispatch.workers):
            self._turns.turn()
        seen = self._planning.look_further(seen, self._dispatch.size)  # how many they are may have shown only now
        self._planning.check_columns(name for loaded in workers for name in loaded.columns)
        self._books.clear_foreign(self._turns.beat)
        row_bytes = max(loaded.row_bytes for loaded in workers)
        clear = partial(clear_foreign, self._store)  # what a worker of a discarded plan has put there since
        return self._planning.freeze(self._number, seen, self._dispatch.size, row_bytes, clear)

    def _look_back(self, head: Head, repair: bool) -> None:
        self._progress.note(f"resuming plan {head.plan}: {counted(self._books.parts, 'part')} committed")
        if (repair or self._retry) and (found := self._turns.during(lambda: read_success(self._store))):
            _, self._success = found
        if repair:
            self._withdraw_success()
        self._books.look_back(head, self._turns.beat)
        if self._retry:
            self._progress.note(f"to be retried: {counted(self._books.pending, 'error row')}")
        if self._books.failed:
            self._progress.advance(0, self._books.failed)  # of images that are counted as the plan is read

    def _loop(self, feeder: Feeder, head: Head) -> None:
        """Hand out shards until all are done or given up, or too much has failed."""
        schedule = self._dispatch.schedule
        while not (feeder.finished and schedule.idle):
            self._absorb(feeder)
            if self._job.errors.abort_early and self._books.exceeded(self._job.errors):
                self._stopped_early = True
                self._dispatch.drain(self._turns.beat)
                return
            if schedule.waiting:
                self._hand_out(head)
            elif feeder.finished and self._dispatch.started:
                self._dispatch.back_up(head.number)
            self._turns.turn() if self._dispatch.started else self._turns.beat()

    def _absorb(self, feeder: Feeder) -> None:
        """Take in confirmed chunks as long as few shards wait; look for foreign parts once all are known."""
        schedule, all_known_before = self._dispatch.schedule, feeder.finished
        patience = 0.0 if self._dispatch.started else TURN_SECONDS
        while schedule.waiting < _WAITING_ENOUGH and (chunk := feeder.take(patience)) is not None:
            done, left = self._books.add(chunk)
            schedule.add(left)
            self._progress.planned(chunk.cursor.rows, chunk.last)
            self._progress.resumed(done)
            self._turns.beat()
        if feeder.finished and not all_known_before:
            self._books.clear_foreign(self._turns.beat)

    def _hand_out(self, head: Head) -> None:
        if not self._dispatch.started:
            first = self._turns.during(lambda: reader.PlanReader(self._store, head).first(FEW_IMAGES + 1))
            sample = tuple(ref.location for ref in first[:FEW_IMAGES])
            size = sum(TYPICAL_BYTES if ref.size is None else ref.size for ref in first)
            self._start_workers(Peek(len(first), len(first) <= FEW_IMAGES, sample, image_bytes=size))
        if self._dispatch.workers:
            self._withdraw_success()
            self._dispatch.hand_out(head.number)

    def _withdraw_success(self) -> None:
        """Before the first part is replaced or made anew; at a retry not before somebody stands ready to do it."""
        if self._success is not None:
            version, self._success = self._success.version or "", None
            self._turns.confirm()  # so that what was read before is no later driver's
            self._turns.during(lambda: withdraw_success(self._store, version))

    def _start_workers(self, seen: Peek) -> None:
        job, few_bytes = self._job, seen.image_bytes if seen.whole else None
        self._dispatch.start(Setup(job.portable(), str(job.base), self._turns.witness, seen.sample, few_bytes))
