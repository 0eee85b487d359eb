"""Multiprocessing context for torch's DataLoader: a process that dies is replaced, and no two share a lock."""

from __future__ import annotations

import ctypes
import multiprocessing
import os
import queue
import threading
import time
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from multiprocessing.connection import Connection, wait
from multiprocessing.context import ForkServerContext
from typing import Any

from batchjob.loader.worker_limits import WorkerProgress
from batchjob.loader.worker_process import OUT_OF_MEMORY_CODE, LoaderProcess, run_beside_parent

__all__ = ["ReplaceableWorker", "WorkerContext", "get_progress"]

_CLOSED_SECONDS = 0.02


class WorkerContext(ForkServerContext):
    """Context with which a DataLoader starts its processes; it knows them, and what each of them has in hand.

    With the standard library's context, all processes of a DataLoader share one queue of results. A killed process may
    keep the lock of that queue or leave half a message in it, and DataLoader, which notices the death up to 5 s later,
    can only give up all processes. Here each process has a connection of its own, and what DataLoader takes for a
    process stays as it is while the real process is replaced. The new process gets what the dead one has not answered.

    It rests on one property of DataLoader's processes: they answer each item of their index queue with one item of
    the result queue, in order.

    Example: process 7 has been sent requests 1, 3 and 5, has answered 1, and dies. `on_death` is called, and replaces
    it; process 9 is sent requests 3 and 5. To the DataLoader it is the same worker.

    Args:
        on_death: Called with the worker and its dead process, in the thread that waits for results; it must not block.

    Attributes:
        workers: Workers of the DataLoader.
        closed: Set once no process is needed any more.
    """

    def __init__(self, on_death: Callable[[ReplaceableWorker, LoaderProcess], None]) -> None:
        super().__init__()
        self.on_death, self.closed = on_death, threading.Event()
        self.workers: list[ReplaceableWorker] = []
        self._events: list[SharedFlag] = []
        # Ends a wait for results, so that it looks at the new processes.
        self.wakeup_reader, self._wakeup_writer = multiprocessing.Pipe(duplex=False)

    # The names and parameters are those that DataLoader uses.

    def Queue(self, maxsize: int = 0) -> WorkerQueue:  # type: ignore[override]  # noqa: N802, ARG002
        return WorkerQueue(self)

    def Event(self) -> SharedFlag:  # type: ignore[override]  # noqa: N802
        self._events.append(SharedFlag())
        return self._events[-1]

    def Process(  # type: ignore[override]  # noqa: N802
        self, *, target: Callable[..., object], args: Sequence[Any] = (), kwargs: Mapping[str, Any] | None = None
    ) -> ReplaceableWorker:
        assert not kwargs, "DataLoader passes none"
        self.workers.append(ReplaceableWorker(self, target, tuple(args)))
        return self.workers[-1]

    def wake(self) -> None:
        """End a wait for results."""
        self._wakeup_writer.send(None)

    def end_processes(self) -> None:
        """Ask all processes to end; no death is reported and none is replaced from now on."""
        self.closed.set()
        for event in self._events:
            event.set()
        self.wake()
        for worker in self.workers:
            if (process := worker.process) is not None:
                process.send(None)

    def kill_processes(self) -> None:
        """Kill all processes; no death is reported and none is replaced from now on."""
        self.closed.set()
        self.wake()
        for worker in self.workers:
            if (process := worker.process) is not None:
                process.kill("closing")

    def close(self) -> None:
        """Wait for the end of all processes, and kill those that do not end."""
        for worker in self.workers:
            if worker.process is not None:
                worker.process.close()
        self.wakeup_reader.close()
        self._wakeup_writer.close()


class ReplaceableWorker:
    """Worker of a DataLoader, which takes it for a `multiprocessing.Process`; the process behind it may change.

    Args:
        context: Context that made it.
        target: Function that each process runs.
        args: Its arguments, the queues included.

    Attributes:
        pid: Process id of the latest process; None before the start.
        process: The process; None before the start and while it is replaced.
        fruitless_deaths: Processes that have died one after the other without any result.
        daemon: Set by DataLoader; the processes always end with their parent.
    """

    def __init__(self, context: WorkerContext, target: Callable[..., object], args: tuple[Any, ...]) -> None:
        self._context, self._target, self._args = context, target, args
        self._lock = threading.Lock()
        self._unanswered: deque[object] = deque()
        self.pid: int | None = None
        self.process: LoaderProcess | None = None
        self.fruitless_deaths = 0
        self.daemon = True
        for queue_ in args:
            if isinstance(queue_, WorkerQueue):
                queue_.workers.append(self)

    def start(self) -> None:
        """Start a process and send it all that has not been answered yet."""
        process = LoaderProcess(_run_worker, self._target, self._args)
        with self._lock:
            for item in self._unanswered:
                process.send(item)
            self.pid, self.process = process.pid, process
        if self._context.closed.is_set():
            process.kill("closing")
        self._context.wake()

    def send(self, item: object) -> None:
        """Send an item, now or as soon as the process is replaced."""
        with self._lock:
            self._unanswered.append(item)
            if self.process is not None:
                self.process.send(item)

    def receive(self, process: LoaderProcess) -> list[Any]:
        """Return all results that have arrived from its process."""
        results: list[Any] = []
        while (received := process.receive()) is not None:
            results.extend(received)
            with self._lock:
                self._unanswered.popleft()
            self.fruitless_deaths = 0
        return results

    def remove_dead_process(self) -> None:
        """Keep items back from now on, for the next process."""
        with self._lock:
            self.process = None
            self.fruitless_deaths += 1

    # -- for DataLoader ----------------------------------------------------------------------------------------

    def is_alive(self) -> bool:
        """Return True until the context is closed: a process that has died is replaced."""
        return not self._context.closed.is_set()

    def join(self, timeout: float | None = None) -> None:
        if self.process is not None:
            wait([self.process.sentinel], timeout)

    def terminate(self) -> None:
        if self.process is not None:
            self.process.kill("closing")


class WorkerQueue:
    """Queue between a DataLoader and its processes, without a lock: it uses the connection of each process.

    DataLoader makes one queue of items for each process and one of results for all. A process has one of each, so
    that in the process both stand for its only connection.
    """

    def __init__(self, context: WorkerContext) -> None:
        self._context = context
        self.workers: list[ReplaceableWorker] = []
        self._arrived: deque[Any] = deque()

    def put(self, item: object) -> None:
        """Send an item to the process; after the end, when DataLoader puts its last items, do nothing."""
        if not self._context.closed.is_set():
            for worker in self.workers:
                worker.send(item)

    def get(self, block: bool = True, timeout: float | None = None) -> Any:  # noqa: ARG002 - as in queue.Queue
        """Return the next result of any process; report the processes that have died.

        Raises:
            queue.Empty: There is none within this time, in seconds, or the context is closed.
        """
        deadline = None if timeout is None else time.monotonic() + timeout
        while not self._arrived:
            if self._context.closed.is_set():
                time.sleep(_CLOSED_SECONDS)  # DataLoader's thread for pinning asks again until it is told to end
                raise queue.Empty
            running = [(worker, process) for worker in self.workers if (process := worker.process) is not None]
            sources = [source for _, process in running for source in process.sources]
            wakeup = self._context.wakeup_reader
            ready = wait([*sources, wakeup], None if deadline is None else max(0.0, deadline - time.monotonic()))
            if not ready:
                raise queue.Empty
            if self._context.closed.is_set():
                continue
            if wakeup in ready:
                wakeup.recv()
            for worker, process in running:
                has_ended = process.sentinel in ready
                if has_ended or process.connection in ready:
                    self._arrived.extend(worker.receive(process))
                if has_ended:
                    worker.remove_dead_process()
                    self._context.on_death(worker, process)
        return self._arrived.popleft()

    def cancel_join_thread(self) -> None:
        """Do nothing: there is no thread."""

    def close(self) -> None:
        """Do nothing: the processes are closed with the context."""

    def __reduce__(self) -> tuple[type[_ProcessQueue], tuple[()]]:
        return _ProcessQueue, ()


class SharedFlag:
    """Event without a lock, since a process that is killed while it holds one would halt all others."""

    def __init__(self) -> None:
        self._value: Any = multiprocessing.get_context("forkserver").RawValue(ctypes.c_bool, False)

    def set(self) -> None:
        self._value.value = True

    def is_set(self) -> bool:
        return bool(self._value.value)


# -- in a process of the DataLoader ----------------------------------------------------------------------------------


class _Worker:
    """This process, as a worker of the DataLoader.

    Args:
        connection: Connection to the program.
        progress: Slot that the program reads.
    """

    def __init__(self, connection: Connection, progress: WorkerProgress) -> None:
        self.connection, self.progress = connection, progress
        self.items: queue.SimpleQueue[tuple[Any, ...]] = queue.SimpleQueue()  # an empty tuple: no more items can come
        # A large item does not fit into the pipe, and its sender would wait until this process has loaded a batch.
        threading.Thread(target=self._receive_items, name="items", daemon=True).start()

    def _receive_items(self) -> None:
        try:
            with suppress(EOFError, OSError):
                while True:
                    self.items.put((self.connection.recv(),))
        except MemoryError:
            os._exit(OUT_OF_MEMORY_CODE)
        finally:  # after any error: this process ends when it needs the item, and another one gets it
            self.items.put(())


class _ProcessQueue:
    """Either queue of the DataLoader, in its process."""

    def get(self, block: bool = True, timeout: float | None = None) -> Any:  # noqa: ARG002 - as in queue.Queue
        item = _get_worker().items.get(timeout=timeout)
        if not item:
            os._exit(1)
        return item[0]

    def put(self, result: object) -> None:
        try:
            _get_worker().connection.send(result)
        except ConnectionError:  # the program is gone
            os._exit(1)

    def cancel_join_thread(self) -> None: ...

    def close(self) -> None: ...


_worker: _Worker | None = None


def _get_worker() -> _Worker:
    assert _worker is not None, "only in a process of a DataLoader"
    return _worker


def get_progress() -> WorkerProgress:
    """Return the progress of this process, which a DataLoader has started."""
    return _get_worker().progress


def _run_worker(
    connection: Connection, progress: WorkerProgress, target: Callable[..., object], args: tuple[Any, ...]
) -> None:
    """Run DataLoader's own loop until the program asks for the end or is gone."""
    global _worker  # noqa: PLW0603 - one for the process
    run_beside_parent()
    _worker = _Worker(connection, progress)
    target(*args)
