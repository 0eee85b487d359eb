"""Loader processes side by side: any free one takes the next request; one that dies costs what it had in hand.

Not torch's DataLoader: there one death costs all processes and every batch under way, and is noticed after 5 s; its
processes share one queue, whose lock a killed one may keep.
"""

from __future__ import annotations

import logging
import multiprocessing
import threading
import time
from collections import deque
from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from multiprocessing.connection import wait

from batchjob.errors import AttemptFailed
from batchjob.loader.dataset import BatchRequest, ImageDataset
from batchjob.loader.quarantine import Quarantine
from batchjob.loader.settings import LoaderConfig
from batchjob.loader.suspect_trial import try_image_alone
from batchjob.loader.worker_process import LoaderProcess, LoadResult, WorkerExit
from batchjob.types import Batch

__all__ = ["LoaderProcessPool"]

_log = logging.getLogger(__name__)
_IN_HAND = 2  # requests a process has: one at work, one so that it need not wait for the next
_LOOK_SECONDS = 0.1
_CLOSE_SECONDS = 5.0


@dataclass(eq=False)
class _PendingBatch:
    """A request on its way; `spared` once it has cost a process that no image of it was to blame for."""

    number: int
    request: BatchRequest
    item: LoadResult | None = None
    spared: bool = False


@dataclass(eq=False)
class _ProcessQueue:
    process: LoaderProcess
    in_hand: deque[_PendingBatch] = field(default_factory=deque)


class LoaderProcessPool:
    """Starts its processes when it is made. One thread asks for batches; any may close it.

    Args:
        images: what each process loads with.
        plan: from `settle`, of one process at least.
        quarantine: of images that are not tried any more.

    Attributes:
        deaths: processes lost so far, those of trials included.
        last_sign: when one of its processes was last seen to have come a step further, on the monotonic clock.
    """

    def __init__(self, dataset: ImageDataset, config: LoaderConfig, quarantine: Quarantine) -> None:
        self._images, self._plan, self.quarantine = dataset, config, quarantine
        self.process_deaths, self.last_progress = 0, time.monotonic()
        self._changed = threading.Condition()
        self._tasks: deque[_PendingBatch] = deque()  # in the order of their batches, until those are handed out
        self._waiting: deque[_PendingBatch] = deque()
        self._numbers = self._epoch = 0
        self._broken: Exception | None = None
        self._closed = threading.Event()
        self._ear, self._bell = multiprocessing.Pipe(duplex=False)
        self._members = [_ProcessQueue(self._process()) for _ in range(config.processes)]
        self._suspects: dict[LoaderProcess, threading.Thread] = {}
        self._threads = [
            threading.Thread(target=target, name=f"batchjob-loader-{target.__name__.strip('_')}", daemon=True)
            for target in (self._listen, self._watch)
        ]
        for thread in self._threads:
            thread.start()

    # -- for the one who asks ----------------------------------------------------------------------------------

    def batches(self, requests: Iterator[BatchRequest]) -> Iterator[LoadResult]:
        """What is loaded, in the order of the requests, so many of which are under way at a time.

        Raises:
            Exception: what keeps the processes from working; this crew is of no more use then.
        """
        self._epoch += 1
        epoch = self._epoch
        self._forget()
        try:
            self._ask(requests)
            while (item := self._next()) is not None:
                self._ask(requests)
                yield item
        finally:
            if epoch == self._epoch:
                self._forget()

    @property
    def healthy(self) -> bool:
        """Whether it can still be used."""
        return self._broken is None

    def close(self) -> None:
        """End all processes. Each may finish its batch, for a few seconds."""
        self._closed.set()
        while not self._changed.acquire(timeout=_CLOSE_SECONDS):  # whoever has it sends to one that takes nothing
            for member in list(self._members):
                member.process.kill("closing")
        self._changed.release()
        self._break(AttemptFailed("the loader was closed"))
        self._bell.send(None)
        for thread in self._threads:
            thread.join()
        with self._changed:
            suspects = dict(self._suspects)
        for process in suspects:
            process.kill("closing")
        for thread in suspects.values():
            thread.join(_CLOSE_SECONDS)  # it may be at a store that does not answer
        for member in self._members:
            member.process.request_exit()
        for member in self._members:
            member.process.close()
        self._ear.close()
        self._bell.close()

    def _forget(self) -> None:
        with self._changed:
            self._tasks.clear()
            self._waiting.clear()

    def _ask(self, requests: Iterator[BatchRequest]) -> None:
        while len(self._tasks) < self._plan.processes * self._plan.prefetch:
            request = next(requests, None)
            if request is None:
                return
            with self._changed:
                task = self._task(request)
                self._tasks.append(task)
                self._waiting.append(task)
                self._dispatch()

    def _next(self) -> LoadResult | None:
        with self._changed:
            if not self._tasks:
                return None
            while (item := self._tasks[0].item) is None:
                if self._broken is not None:
                    raise self._broken
                self._changed.wait()
            self._tasks.popleft()
            return item

    # -- under the lock ----------------------------------------------------------------------------------------

    def _task(self, request: BatchRequest, spared: bool = False) -> _PendingBatch:
        self._numbers += 1
        return _PendingBatch(self._numbers, request, spared=spared)

    def _dispatch(self) -> None:
        """Hand what waits to the members that have the least in hand."""
        while self._waiting:
            member = min(self._members, key=lambda member: len(member.in_hand), default=None)
            if member is None or len(member.in_hand) >= _IN_HAND:
                return
            task = self._waiting.popleft()
            member.in_hand.append(task)
            member.process.send(task.number, task.request)

    def _again(self, task: _PendingBatch) -> None:
        """Before all others that wait: it is the oldest that anybody waits for."""
        if task in self._tasks:
            self._waiting.appendleft(task)

    def _divide(self, task: _PendingBatch, death: WorkerExit) -> None:
        """It cost a process, and nobody knows why: halve it; what is left of it at last fails the attempt."""
        if task not in self._tasks:
            return
        if len(task.request.refs) > 1:
            at = self._tasks.index(task)
            halves = [self._task(half) for half in task.request.split()]
            del self._tasks[at]
            for half in reversed(halves):
                self._tasks.insert(at, half)
                self._waiting.appendleft(half)
        elif not task.spared:
            task.spared = True
            self._waiting.appendleft(task)
        else:
            task.item = AttemptFailed(f"a loader process {death.description}, and no image is to blame; run again")
            self._changed.notify_all()

    # -- in a thread: what processes send, and their deaths ----------------------------------------------------

    def _listen(self) -> None:
        try:
            while not self._closed.is_set():
                members = list(self._members)
                sources = [source for one in members for source in (one.process.pipe, one.process.sentinel)]
                ready = wait([*sources, self._ear])
                for member in members:
                    if member.process.pipe in ready or member.process.sentinel in ready:
                        self._collect(member)
                    if member.process.sentinel in ready and not self._closed.is_set():
                        self._bury(member)
        except Exception as error:  # noqa: BLE001 - raised where batches are asked for
            self._break(error)

    def _collect(self, member: _ProcessQueue) -> None:
        """Take in all that has arrived, even from one that has died since."""
        while (arrived := member.process.receive()) is not None:
            number, item = arrived
            with self._changed:
                task = next(task for task in member.in_hand if task.number == number)
                wanted = task in self._tasks
            if wanted and self._plan.pin_memory and isinstance(item, Batch):
                item = item.pin_memory()
            with self._changed:
                member.in_hand.remove(task)
                task.item = item
                self._dispatch()
                self._changed.notify_all()

    def _bury(self, member: _ProcessQueue) -> None:
        """Replace one that died; what it was at is looked into, what it had not come to waits again."""
        death = member.process.wait_for_exit()
        self.process_deaths += 1
        if not member.process.progress.started:
            raise AttemptFailed(f"loader process {member.process.pid} {death.description} as it started")
        fresh = _ProcessQueue(self._process())
        with self._changed:
            self._members[self._members.index(member)] = fresh
            at_work = None
            for task in reversed(member.in_hand):
                if death.snapshot is not None and task.number == death.snapshot.request_number:
                    at_work = task
                else:
                    self._again(task)
            _log.warning("loader process %s %s%s", member.process.pid, death.description, _over(at_work, death))
            if at_work in self._tasks and at_work is not None:
                self._look_into(at_work, death)
            self._dispatch()
        member.process.close()

    def _look_into(self, task: _PendingBatch, death: WorkerExit) -> None:
        assert death.snapshot is not None
        if death.snapshot.row is None or task.spared:
            self._divide(task, death)
            return
        suspect = self._process()
        thread = threading.Thread(
            target=self._judge,
            args=(suspect, task, death.snapshot.row, death),
            name="batchjob-loader-trial",
            daemon=True,
        )
        self._suspects[suspect] = thread
        thread.start()

    # -- in a thread for each suspect --------------------------------------------------------------------------

    def _judge(self, suspect: LoaderProcess, task: _PendingBatch, row: int, death: WorkerExit) -> None:
        """Try one image alone; the batch goes on without it, or in halves."""
        try:
            position = task.request.refs[row].position
            facts = self.quarantine.find(position)
            if facts is None:
                alone = replace(task.request.select_rows(range(row, row + 1)), known_errors={})
                verdict = try_image_alone(suspect, alone, self._plan.image_seconds)
                self.process_deaths += verdict.exit is not None
                facts = verdict.info
                if self._closed.is_set():
                    return
                if facts is not None and verdict.exit is not None:
                    facts = self.quarantine.record(position, facts)
            with self._changed:
                if facts is None:
                    self._divide(task, death)
                else:
                    _log.warning("image %s is an error row: %s", position, facts.error and facts.error.message)
                    task.request = task.request.with_known_error(row, facts)
                    self._again(task)
                self._dispatch()
        except Exception as error:  # noqa: BLE001 - raised where batches are asked for
            self._break(error)
        finally:
            suspect.kill("done")
            suspect.close()
            with self._changed:
                self._suspects.pop(suspect, None)

    # -- in a thread: the clock --------------------------------------------------------------------------------

    def _watch(self) -> None:
        """Not in the thread that listens, and without the lock: whoever has it may wait for a process that is stuck."""
        signs: list[tuple[float, ...]] = []
        while not self._closed.wait(_LOOK_SECONDS):
            processes = [*(member.process for member in list(self._members)), *list(self._suspects)]
            signs, before = [process.progress.version for process in processes], signs
            if signs != before:
                self.last_progress = time.monotonic()
            for process in processes:
                if process.progress.is_overdue(self._plan.image_seconds):
                    process.kill("hang")
                elif process.stopped_longer_than(self._plan.image_seconds):
                    process.kill("halt")

    def _break(self, error: Exception) -> None:
        with self._changed:
            self._broken = self._broken or error
            self._changed.notify_all()

    def _process(self) -> LoaderProcess:
        return LoaderProcess(self._images, self._plan.memory_bytes, self._plan.image_seconds)


def _over(task: _PendingBatch | None, death: WorkerExit) -> str:
    if task is None or death.snapshot is None:
        return ""
    if death.snapshot.row is None:
        return " between images: its batch is loaded again, in halves"
    return f" over image {task.request.refs[death.snapshot.row].position}, which is tried alone now"
