"""Crash isolation: any idle loader process takes the next request, and a crash costs only the batch in work.

This is not torch's DataLoader. There, one death costs all processes and every batch in flight, and is noticed after
5 s; its processes share one queue, whose lock a killed process may keep.
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

_REQUESTS_PER_PROCESS = 2  # one in work, and one so that the process need not wait for the next
_WATCH_SECONDS = 0.1
_CLOSE_SECONDS = 5.0


@dataclass(eq=False)
class _PendingBatch:
    """Request whose batch is not delivered yet.

    Attributes:
        number: Number of the request, unique in its pool.
        request: Images to load.
        result: Batch or error, once loaded.
        tried_again: True once the request has cost a process although none of its images is to blame.
    """

    number: int
    request: BatchRequest
    result: LoadResult | None = None
    tried_again: bool = False


@dataclass(eq=False)
class _ProcessQueue:
    """A process and the batches that it has been asked for, the oldest first."""

    process: LoaderProcess
    sent: deque[_PendingBatch] = field(default_factory=deque)


class LoaderProcessPool:
    """Set of loader processes that delivers batches in the order of their requests, and survives their deaths.

    The processes start with the pool. One thread asks for batches; any thread may close the pool. Three kinds of
    thread work inside: one receives results and notices deaths, one watches the clock, one tries each suspect.

    Example: two processes load requests 1 to 4 of 32 images each. The process with requests 1 and 3 dies over image 5
    of request 1. A new process takes its place and request 3 waits again, before request 4. Image 5 is tried alone; it
    kills that process too, so it goes to quarantine, and request 1 waits again, without image 5, before request 3.

    Args:
        dataset: Dataset that each process loads batches with.
        config: Loader settings, of one process at least.
        quarantine: Images that are known to kill a process.

    Attributes:
        process_deaths: Processes lost so far, those of trials included.
        last_progress: Time of the last step that any process took, on the monotonic clock.
    """

    def __init__(self, dataset: ImageDataset, config: LoaderConfig, quarantine: Quarantine) -> None:
        self._dataset, self._config, self.quarantine = dataset, config, quarantine
        self.process_deaths, self.last_progress = 0, time.monotonic()
        self._changed = threading.Condition()
        self._undelivered: deque[_PendingBatch] = deque()  # in the order of delivery
        self._unsent: deque[_PendingBatch] = deque()
        self._request_count = self._epoch = 0
        self._failure: Exception | None = None
        self._closed = threading.Event()
        self._wakeup_reader, self._wakeup_writer = multiprocessing.Pipe(duplex=False)
        self._queues = [_ProcessQueue(self._start_process()) for _ in range(config.processes)]
        self._trials: dict[LoaderProcess, threading.Thread] = {}
        self._threads = [
            threading.Thread(target=self._receive_results, name="batchjob-loader-results", daemon=True),
            threading.Thread(target=self._watch_clock, name="batchjob-loader-clock", daemon=True),
        ]
        for thread in self._threads:
            thread.start()

    # -- for the thread that asks ------------------------------------------------------------------------------

    def batches(self, requests: Iterator[BatchRequest]) -> Iterator[LoadResult]:
        """Load requests, `processes` x `prefetch` of them at a time, and yield results in the order of the requests.

        Raises:
            Exception: The processes cannot work; this pool cannot be used any more.
        """
        self._epoch += 1
        epoch = self._epoch
        self._forget_requests()
        try:
            self._request_more(requests)
            while (result := self._wait_for_next()) is not None:
                self._request_more(requests)
                yield result
        finally:
            if epoch == self._epoch:
                self._forget_requests()

    @property
    def healthy(self) -> bool:
        """True as long as the pool can be used."""
        return self._failure is None

    def close(self) -> None:
        """End all processes. Each has a few seconds to finish its batch."""
        self._closed.set()
        # The lock may be held by a thread that sends a request to a process that receives nothing.
        while not self._changed.acquire(timeout=_CLOSE_SECONDS):
            for queue in list(self._queues):
                queue.process.kill("closing")
        self._changed.release()
        self._fail(AttemptFailed("the loader was closed"))
        self._wakeup_writer.send(None)
        for thread in self._threads:
            thread.join()
        with self._changed:
            trials = dict(self._trials)
        for process in trials:
            process.kill("closing")
        for thread in trials.values():
            thread.join(_CLOSE_SECONDS)  # it may wait for a store that does not answer
        for queue in self._queues:
            queue.process.request_exit()
        for queue in self._queues:
            queue.process.close()
        self._wakeup_reader.close()
        self._wakeup_writer.close()

    def _forget_requests(self) -> None:
        with self._changed:
            self._undelivered.clear()
            self._unsent.clear()

    def _request_more(self, requests: Iterator[BatchRequest]) -> None:
        while len(self._undelivered) < self._config.processes * self._config.prefetch:
            request = next(requests, None)
            if request is None:
                return
            with self._changed:
                pending = self._number_request(request)
                self._undelivered.append(pending)
                self._unsent.append(pending)
                self._send_unsent()

    def _wait_for_next(self) -> LoadResult | None:
        with self._changed:
            if not self._undelivered:
                return None
            while (result := self._undelivered[0].result) is None:
                if self._failure is not None:
                    raise self._failure
                self._changed.wait()
            self._undelivered.popleft()
            return result

    # -- under the lock ----------------------------------------------------------------------------------------

    def _number_request(self, request: BatchRequest) -> _PendingBatch:
        self._request_count += 1
        return _PendingBatch(self._request_count, request)

    def _send_unsent(self) -> None:
        """Send requests to the processes with the fewest in hand, as long as one has room."""
        while self._unsent:
            queue = min(self._queues, key=lambda queue: len(queue.sent), default=None)
            if queue is None or len(queue.sent) >= _REQUESTS_PER_PROCESS:
                return
            pending = self._unsent.popleft()
            queue.sent.append(pending)
            queue.process.send(pending.number, pending.request)

    def _send_again(self, pending: _PendingBatch) -> None:
        """Put a request before all that wait: it is the oldest one, and its batch is due first."""
        if pending in self._undelivered:
            self._unsent.appendleft(pending)

    def _split_request(self, pending: _PendingBatch, process_exit: WorkerExit) -> None:
        """Halve a request that has killed a process without a suspect; a single image that does so twice fails."""
        if pending not in self._undelivered:
            return
        if len(pending.request.refs) > 1:
            at = self._undelivered.index(pending)
            halves = [self._number_request(half) for half in pending.request.split()]
            del self._undelivered[at]
            for half in reversed(halves):
                self._undelivered.insert(at, half)
                self._unsent.appendleft(half)
        elif not pending.tried_again:
            pending.tried_again = True
            self._unsent.appendleft(pending)
        else:
            message = f"a loader process {process_exit.description}, and no image is to blame; run again"
            pending.result = AttemptFailed(message)
            self._changed.notify_all()

    # -- in the thread that receives results and notices deaths ------------------------------------------------

    def _receive_results(self) -> None:
        try:
            while not self._closed.is_set():
                queues = list(self._queues)
                sources = [source for one in queues for source in (one.process.pipe, one.process.sentinel)]
                ready = wait([*sources, self._wakeup_reader])
                for queue in queues:
                    if queue.process.pipe in ready or queue.process.sentinel in ready:
                        self._collect_results(queue)
                    if queue.process.sentinel in ready and not self._closed.is_set():
                        self._replace_dead_process(queue)
        except Exception as error:  # noqa: BLE001 - raised in the thread that asks for batches
            self._fail(error)

    def _collect_results(self, queue: _ProcessQueue) -> None:
        """Take all results that have arrived, even from a process that has died since."""
        while (received := queue.process.receive()) is not None:
            number, result = received
            with self._changed:
                pending = next(pending for pending in queue.sent if pending.number == number)
                wanted = pending in self._undelivered
            if wanted and self._config.pin_memory and isinstance(result, Batch):
                result = result.pin_memory()
            with self._changed:
                queue.sent.remove(pending)
                pending.result = result
                self._send_unsent()
                self._changed.notify_all()

    def _replace_dead_process(self, queue: _ProcessQueue) -> None:
        """Start a new process, examine the request that the dead one worked on, and send its other requests again."""
        process_exit = queue.process.wait_for_exit()
        self.process_deaths += 1
        if not queue.process.progress.started:
            raise AttemptFailed(f"loader process {queue.process.pid} {process_exit.description} as it started")
        new_queue = _ProcessQueue(self._start_process())
        with self._changed:
            self._queues[self._queues.index(queue)] = new_queue
            in_work = None
            for pending in reversed(queue.sent):
                if process_exit.snapshot is not None and pending.number == process_exit.snapshot.request_number:
                    in_work = pending
                else:
                    self._send_again(pending)
            description, consequence = process_exit.description, _describe_consequence(in_work, process_exit)
            _log.warning("loader process %s %s%s", queue.process.pid, description, consequence)
            if in_work in self._undelivered and in_work is not None:
                self._examine(in_work, process_exit)
            self._send_unsent()
        queue.process.close()

    def _examine(self, pending: _PendingBatch, process_exit: WorkerExit) -> None:
        """Try the image that was in work alone; split the request if there was none."""
        assert process_exit.snapshot is not None
        if process_exit.snapshot.row is None or pending.tried_again:
            self._split_request(pending, process_exit)
            return
        process = self._start_process()
        thread = threading.Thread(
            target=self._try_suspect,
            args=(process, pending, process_exit.snapshot.row, process_exit),
            name="batchjob-loader-trial",
            daemon=True,
        )
        self._trials[process] = thread
        thread.start()

    # -- in a thread for each suspect --------------------------------------------------------------------------

    def _try_suspect(self, process: LoaderProcess, pending: _PendingBatch, row: int, process_exit: WorkerExit) -> None:
        """Try one image alone; its request goes on without it if it fails, or in halves if it does not."""
        try:
            position = pending.request.refs[row].position
            info = self.quarantine.find(position)
            if info is None:
                alone = replace(pending.request.select_rows(range(row, row + 1)), known_errors={})
                trial = try_image_alone(process, alone, self._config.image_seconds)
                self.process_deaths += trial.exit is not None
                info = trial.info
                if self._closed.is_set():
                    return
                if info is not None and trial.exit is not None:
                    info = self.quarantine.record(position, info)
            with self._changed:
                if info is None:
                    self._split_request(pending, process_exit)
                else:
                    _log.warning("image %s is an error row: %s", position, info.error and info.error.message)
                    pending.request = pending.request.with_known_error(row, info)
                    self._send_again(pending)
                self._send_unsent()
        except Exception as error:  # noqa: BLE001 - raised in the thread that asks for batches
            self._fail(error)
        finally:
            process.kill("done")
            process.close()
            with self._changed:
                self._trials.pop(process, None)

    # -- in the thread that watches the clock ------------------------------------------------------------------

    def _watch_clock(self) -> None:
        """Kill processes that take too long. No lock: its holder may wait for the very process that is stuck."""
        versions: list[tuple[float, ...]] = []
        while not self._closed.wait(_WATCH_SECONDS):
            processes = [*(queue.process for queue in list(self._queues)), *list(self._trials)]
            versions, before = [process.progress.version for process in processes], versions
            if versions != before:
                self.last_progress = time.monotonic()
            for process in processes:
                if process.progress.is_overdue(self._config.image_seconds):
                    process.kill("hang")
                elif process.stopped_longer_than(self._config.image_seconds):
                    process.kill("halt")

    def _fail(self, error: Exception) -> None:
        """Make the pool unusable; the first error is raised in the thread that asks for batches."""
        with self._changed:
            self._failure = self._failure or error
            self._changed.notify_all()

    def _start_process(self) -> LoaderProcess:
        return LoaderProcess(self._dataset, self._config.memory_bytes, self._config.image_seconds)


def _describe_consequence(pending: _PendingBatch | None, process_exit: WorkerExit) -> str:
    if pending is None or process_exit.snapshot is None:
        return ""
    if process_exit.snapshot.row is None:
        return " between images: its batch is loaded again, in halves"
    return f" over image {pending.request.refs[process_exit.snapshot.row].position}, which is tried alone now"
