"""Crash isolation: torch's DataLoader whose batches come in order and survive the deaths of its processes."""

from __future__ import annotations

import logging
import multiprocessing
import threading
import time
from collections import deque
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from operator import itemgetter

import torch
from torch.utils.data import DataLoader, Sampler

from batchjob.concurrency import start_forkserver
from batchjob.errors import AttemptFailed
from batchjob.loader.dataset import (
    BatchRequest,
    ImageDataset,
    IsolatedDataset,
    LoadedBatch,
    LoadResult,
    NumberedRequest,
    start_worker,
)
from batchjob.loader.quarantine import Quarantine
from batchjob.loader.settings import LoaderConfig
from batchjob.loader.suspect_trial import start_trial, wait_for_trial
from batchjob.loader.worker_context import ReplaceableWorker, WorkerContext
from batchjob.loader.worker_limits import SkippedRequests
from batchjob.loader.worker_process import LoaderProcess, WorkerExit
from batchjob.types import ImageInfo

__all__ = ["IsolatedLoader"]

_log = logging.getLogger(__name__)

_WATCH_SECONDS = 0.1
_CLOSE_SECONDS = 5.0
_LOST_SECONDS = 1.0
# A process that dies again and again without any result does so over something else than an image.
_MAX_FRUITLESS_DEATHS = 5


@dataclass(eq=False)
class _PendingBatch:
    """Request whose batch is not delivered yet.

    Attributes:
        request: Images to load.
        result: Batch or error, once loaded.
        tried_again: True once the request has cost a process although none of its images is to blame.
    """

    request: BatchRequest
    result: LoadResult | None = None
    tried_again: bool = False


class IsolatedLoader:
    """DataLoader that delivers batches in the order of their requests, and survives the deaths of its processes.

    One thread asks for batches; any thread may close the loader. Inside, one thread iterates over the DataLoader, one
    watches the clock, and one handles each death.

    Example: two processes load requests 1 to 4 of 32 images each. The process with requests 1 and 3 dies over image 5
    of request 1. A new process takes its place and loads request 3; request 1 is skipped there. Image 5 is tried
    alone; it kills that process too, so it goes to quarantine, and request 1, without image 5, is asked for again as
    request 5, before all others.

    Args:
        dataset: Dataset that each process loads batches with.
        config: Loader settings, of one process at least.
        quarantine: Images that are known to kill a process.
        device: Device of the pinned batches; None for the first one.

    Attributes:
        process_deaths: Processes lost so far, those of trials included.
        last_progress: Time of the last step that any process took, on the monotonic clock.
    """

    def __init__(
        self, dataset: ImageDataset, config: LoaderConfig, quarantine: Quarantine, device: int | None = None
    ) -> None:
        self._dataset, self._config, self.quarantine, self._device = dataset, config, quarantine, device
        self.process_deaths, self.last_progress = 0, time.monotonic()
        self._changed = threading.Condition()
        self._undelivered: deque[_PendingBatch] = deque()  # in the order of delivery
        self._unsent: deque[_PendingBatch] = deque()
        self._sent: dict[int, _PendingBatch] = {}  # by number
        self._skipped = SkippedRequests(multiprocessing.get_context("forkserver"))
        self._request_count = self._epoch = 0
        self._all_requested = False
        self._failure: Exception | None = None
        self._closed = threading.Event()
        self._context = WorkerContext(self._on_death)
        self._trials: set[LoaderProcess] = set()
        self._death_threads: list[threading.Thread] = []
        self._puller = threading.Thread(target=self._pull_batches, name="batchjob-loader-batches", daemon=True)
        self._clock = threading.Thread(target=self._watch_clock, name="batchjob-loader-clock", daemon=True)
        self._puller.start()
        self._clock.start()

    # -- for the thread that asks ------------------------------------------------------------------------------

    def batches(
        self, requests: Iterator[BatchRequest], is_wanted: Callable[[BatchRequest], bool] = lambda request: True
    ) -> Iterator[LoadResult]:
        """Load requests, `config.batches_ahead` of them at a time, and yield results in the order of the requests.

        Args:
            requests: Requests; taken in this thread.
            is_wanted: Returns False for a request whose batch is not needed any more; it is then skipped.

        Raises:
            Exception: The processes cannot work; this loader cannot be used any more.
        """
        self._epoch += 1
        epoch, self._all_requested = self._epoch, False
        self._skip(lambda request: True)
        try:
            self._request_more(requests)
            while self._undelivered:
                result = self._wait_for_next()
                self._request_more(requests)
                yield result
                if self._skip(lambda request: not is_wanted(request)):
                    self._request_more(requests)
        finally:
            if epoch == self._epoch:
                self._skip(lambda request: True)

    @property
    def healthy(self) -> bool:
        """True as long as the loader can be used."""
        return self._failure is None

    def close(self) -> None:
        """End all processes. Each has a few seconds to finish its batch."""
        seconds = _CLOSE_SECONDS if self.healthy else 0.0
        self._closed.set()
        self._fail(AttemptFailed("the loader was closed"))
        with self._changed:
            self._unsent.clear()
            for number in self._sent:
                self._skipped.add(number)
        for trial in tuple(self._trials):
            trial.kill("closing")
        self._puller.join(seconds)
        if self._puller.is_alive():
            self._context.kill_processes()
        for thread in (self._puller, self._clock):
            thread.join()
        for thread in tuple(self._death_threads):
            thread.join(_CLOSE_SECONDS)  # it may wait for a store that does not answer
        self._context.close()

    def _request_more(self, requests: Iterator[BatchRequest]) -> None:
        while len(self._undelivered) < self._config.window and not self._all_requested:
            request = next(requests, None)
            with self._changed:
                if request is None:
                    self._all_requested = True
                else:
                    self._undelivered.append(_PendingBatch(request))
                    self._unsent.append(self._undelivered[-1])
                self._changed.notify_all()

    def _wait_for_next(self) -> LoadResult:
        with self._changed:
            # Another batch is due than before, so a new epoch may be due as well.
            self._changed.notify_all()
            while (result := self._undelivered[0].result) is None:
                if self._failure is not None:
                    raise self._failure
                self._changed.wait()
            self._undelivered.popleft()
            return result

    def _skip(self, is_skipped: Callable[[BatchRequest], bool]) -> bool:
        """Forget requests, in a process too; return True if there were any."""
        with self._changed:
            skipped = {pending for pending in self._undelivered if is_skipped(pending.request)}
            if skipped:
                self._undelivered = deque(pending for pending in self._undelivered if pending not in skipped)
                self._unsent = deque(pending for pending in self._unsent if pending not in skipped)
                for number in [number for number, pending in self._sent.items() if pending in skipped]:
                    self._skipped.add(number)
                    del self._sent[number]
            return bool(skipped)

    # -- in the thread of the DataLoader -----------------------------------------------------------------------

    def _pull_batches(self) -> None:
        """Iterate over the DataLoader: one epoch after the other, each as long as there are requests."""
        try:
            start_forkserver("batchjob.loader.loader")
            if self._config.pin_memory and self._device is not None:
                torch.accelerator.set_device_index(self._device)  # DataLoader pins in a thread for this device
            data_loader = self._make_data_loader()
            while not self._closed.is_set():
                for loaded in data_loader:
                    self._take(loaded)
                with self._changed:
                    self._changed.wait_for(self._is_epoch_due)
        except Exception as error:  # noqa: BLE001 - raised in the thread that asks for batches
            self._fail(error)
        finally:
            self._context.end_processes()

    def _make_data_loader(self) -> DataLoader[LoadedBatch]:
        config = self._config
        return _DataLoader(
            IsolatedDataset(self._dataset, self._skipped, config.memory_bytes, config.image_seconds),
            batch_sampler=_RequestSampler(self._next_request),
            collate_fn=itemgetter(0),  # each list of the sampler holds one request
            num_workers=config.processes,
            prefetch_factor=config.prefetch,
            persistent_workers=True,
            in_order=False,  # a slow process holds up no other; the order is that of `_undelivered`
            pin_memory=config.pin_memory,
            worker_init_fn=start_worker,
            multiprocessing_context=self._context,
            generator=torch.Generator(),  # otherwise its seed comes from the program's own generator
        )

    def _next_request(self) -> NumberedRequest | None:
        """Number the next request; None, which ends the epoch, if there is none now."""
        with self._changed:
            if not self._unsent:
                return None
            pending = self._unsent.popleft()
            self._request_count += 1
            self._sent[self._request_count] = pending
            return NumberedRequest(self._request_count, pending.request)

    def _take(self, loaded: LoadedBatch) -> None:
        with self._changed:
            pending = self._sent.pop(loaded.number, None)
            if pending is not None:
                pending.result = loaded.result
                self._changed.notify_all()

    def _is_epoch_due(self) -> bool:
        """Return True if a new epoch has enough to do, since its start involves all processes."""
        if self._closed.is_set():
            return True
        enough = len(self._unsent) >= self._config.processes or self._all_requested
        return bool(self._unsent) and (enough or self._undelivered[0].result is None)

    # -- in a thread for each death ----------------------------------------------------------------------------

    def _on_death(self, worker: ReplaceableWorker, process: LoaderProcess) -> None:
        name, both = "batchjob-loader-death", (worker, process)
        thread = threading.Thread(target=self._handle_death, args=both, name=name, daemon=True)
        self._death_threads = [*(other for other in self._death_threads if other.is_alive()), thread]
        thread.start()

    def _handle_death(self, worker: ReplaceableWorker, process: LoaderProcess) -> None:
        """Replace a process that has died, and examine the request that it worked on."""
        try:
            process_exit = process.wait_for_exit()
            process.connection.close()
            self.process_deaths += 1
            if not process.progress.started or worker.fruitless_deaths > _MAX_FRUITLESS_DEATHS:
                when = "again and again" if process.progress.started else "as it started"
                raise AttemptFailed(f"loader process {process.pid} {process_exit.description} {when}")
            in_work = self._take_back(process_exit)
            consequence = _describe_consequence(in_work, process_exit)
            _log.warning("loader process %s %s%s", process.pid, process_exit.description, consequence)
            if self._closed.is_set():
                self._context.end_processes()  # otherwise DataLoader would wait for what this process does not answer
                return
            worker.start()
            if in_work is not None:
                self._examine(in_work, process_exit)
        except Exception as error:  # noqa: BLE001 - raised in the thread that asks for batches
            self._fail(error)

    def _take_back(self, process_exit: WorkerExit) -> _PendingBatch | None:
        """Skip the request that a dead process worked on, which the next one gets too; return it if it is wanted."""
        if process_exit.snapshot is None:
            return None
        with self._changed:
            self._skipped.add(process_exit.snapshot.request_number)
            return self._sent.pop(process_exit.snapshot.request_number, None)

    def _examine(self, pending: _PendingBatch, process_exit: WorkerExit) -> None:
        """Try the image that was in work alone; the request goes on without it, or in halves if it is not to blame."""
        snapshot = process_exit.snapshot
        assert snapshot is not None
        if snapshot.row is None or pending.tried_again:
            self._split_request(pending, process_exit)
            return
        position = pending.request.refs[snapshot.row].position
        info = self.quarantine.find(position) or self._try_alone(pending.request, snapshot.row)
        if self._closed.is_set():
            return
        if info is None:
            self._split_request(pending, process_exit)
            return
        _log.warning("image %s is an error row: %s", position, info.error and info.error.message)
        with self._changed:
            pending.request = pending.request.with_known_error(snapshot.row, info)
            self._send_again(pending)

    def _try_alone(self, request: BatchRequest, row: int) -> ImageInfo | None:
        """Try one image in a disposable process; record it if it is deadly."""
        alone = replace(request.select_rows(range(row, row + 1)), known_errors={})
        process = start_trial(self._dataset, alone, self._config)
        self._trials.add(process)
        try:
            if self._closed.is_set():
                process.kill("closing")
            trial = wait_for_trial(process, self._config.image_seconds)
        finally:
            self._trials.discard(process)
            process.kill("done")
            process.close()
        self.process_deaths += trial.exit is not None
        if trial.info is None or trial.exit is None or self._closed.is_set():
            return trial.info
        return self.quarantine.record(alone.refs[0].position, trial.info)

    def _split_request(self, pending: _PendingBatch, process_exit: WorkerExit) -> None:
        """Halve a request that has killed a process without a suspect; a single image that does so twice fails."""
        with self._changed:
            if pending not in self._undelivered:
                return
            if len(pending.request.refs) > 1:
                at = self._undelivered.index(pending)
                del self._undelivered[at]
                for half in reversed(pending.request.split()):
                    self._undelivered.insert(at, _PendingBatch(half))
                    self._send_again(self._undelivered[at])
            elif not pending.tried_again:
                pending.tried_again = True
                self._send_again(pending)
            else:
                message = f"a loader process {process_exit.description}, and no image is to blame; run again"
                pending.result = AttemptFailed(message)
                self._changed.notify_all()

    def _send_again(self, pending: _PendingBatch) -> None:
        """Put a request before all that wait: it is the oldest one, and its batch is due first. Under the lock."""
        if pending in self._undelivered:
            self._unsent.appendleft(pending)
            self._changed.notify_all()

    # -- in the thread that watches the clock ------------------------------------------------------------------

    def _watch_clock(self) -> None:
        """Kill processes that take too long."""
        versions: list[tuple[float, ...]] = []
        while not self._closed.wait(_WATCH_SECONDS):
            workers = [worker.process for worker in tuple(self._context.workers)]
            processes = [process for process in (*workers, *tuple(self._trials)) if process is not None]
            versions, before = [process.progress.version for process in processes], versions
            if versions != before:
                self.last_progress = time.monotonic()
            for process in processes:
                if process.progress.is_overdue(self._config.image_seconds):
                    process.kill("hang")
                elif process.stopped_longer_than(self._config.image_seconds):
                    process.kill("halt")
                elif process.lost_longer_than(_LOST_SECONDS):
                    process.kill("lost")

    def _fail(self, error: Exception) -> None:
        """Make the loader unusable; the first error is raised in the thread that asks for batches."""
        with self._changed:
            self._failure = self._failure or error
            self._changed.notify_all()


class _DataLoader(DataLoader[LoadedBatch]):
    """DataLoader that does not warn of more processes than cores: their number is the job's decision."""

    def check_worker_number_rationality(self) -> None: ...


class _RequestSampler(Sampler[list[NumberedRequest]]):
    """Batch sampler that yields requests, one in a list, as long as there are any; it never blocks."""

    def __init__(self, next_request: Callable[[], NumberedRequest | None]) -> None:
        self._next_request = next_request

    def __iter__(self) -> Iterator[list[NumberedRequest]]:
        while (request := self._next_request()) is not None:
            yield [request]


def _describe_consequence(pending: _PendingBatch | None, process_exit: WorkerExit) -> str:
    if pending is None or process_exit.snapshot is None:
        return ""
    if process_exit.snapshot.row is None:
        return " between images: its batch is loaded again, in halves"
    return f" over image {pending.request.refs[process_exit.snapshot.row].position}, which is tried alone now"
