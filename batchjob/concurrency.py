"""Calls in daemon threads, which never hold up the end of the process, while the caller goes on showing life."""

from __future__ import annotations

import atexit
import contextlib
import multiprocessing
import os
import queue
import signal
import sys
import threading
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, wait
from contextlib import suppress
from functools import partial
from types import ModuleType
from typing import Any, Generic, TypeVar, cast

__all__ = [
    "DaemonThreadPool",
    "clean_process_start",
    "exit_past_daemon_threads",
    "exit_with_parent",
    "kill_child_processes",
    "parallel_map",
    "run_in_background",
    "start_forkserver",
]

T = TypeVar("T")
R = TypeVar("R")
_LOOK_SECONDS = 0.2
_EXIT_SECONDS = 3.0
_AHEAD = 4  # calls begun or waiting for each thread: enough to keep all busy, few enough for any number of items


def run_in_background(work: Callable[[], R], on_wait: Callable[[], object] = lambda: None) -> R:
    """Does one thing that may block. `meanwhile` is called every 0.2 s; what it raises leaves the call to itself."""
    (found,) = parallel_map(lambda _: work(), [None], on_wait, threads=1)
    return found


def parallel_map(
    work: Callable[[T], R],
    items: Iterable[T],
    on_wait: Callable[[], object] = lambda: None,
    *,
    threads: int = 16,
    prefetch: int | None = None,
) -> Iterator[R]:
    """What `work` makes of each item, in their order; raises what the first failed call raised, or the items.

    Args:
        work: called in other threads.
        items: any number of them; only a few are taken ahead of the result that is due.
        meanwhile: called here, before each result and every 0.2 s while one is awaited. What it raises ends the
            iteration: no further call is begun, those that run are left to themselves.
        threads: at most.
        ahead: items that are taken before the first result is; four for each thread where not given.
    """
    crew = _OrderedCalls(work, threads, threads * _AHEAD if prefetch is None else prefetch)
    left, failure = iter(items), None
    try:
        while failure is None:
            try:
                crew.put(next(left))
            except StopIteration:
                break
            except Exception as error:  # noqa: BLE001 - raised once all that came before it is through
                failure = error
            while crew.full or crew.first_done:
                yield crew.next(on_wait)
        while crew.pending:
            yield crew.next(on_wait)
        if failure is not None:
            raise failure
    finally:
        crew.leave()


def exit_past_daemon_threads(exit_code: int) -> None:
    """End this process soon, with this exit code, where daemon threads are still there; else do nothing.

    An interpreter that is torn down beside a thread in native code, be it a model's or a storage client's, ends in an
    abort instead of the exit code. What libraries do at the exit is done as usual, if it does not take long.
    """
    if not any(thread.daemon for thread in threading.enumerate()):
        return
    for stream in (sys.stdout, sys.stderr):
        with suppress(OSError, ValueError):  # nobody reads it any more
            stream.flush()
    wait([DaemonThreadPool(1).submit(atexit._run_exitfuncs)], _EXIT_SECONDS)
    os._exit(exit_code)


class DaemonThreadPool:
    """Daemon threads for calls that may block; begun as they are needed.

    Unlike those of an executor, which are waited for at the end of the process, they are left to themselves there.

    Args:
        most: of them.
        name: for whoever looks at the process.
    """

    def __init__(self, max_threads: int, name: str = "aside") -> None:
        self._most, self._name, self._begun = max_threads, name, 0
        self._lock = threading.Lock()
        self._todo: queue.SimpleQueue[Callable[[], None] | None] = queue.SimpleQueue()

    def submit(self, call: Callable[[], R]) -> Future[R]:
        """Have it called as soon as a thread is free."""
        future: Future[R] = Future()

        def answer() -> None:
            if not future.set_running_or_notify_cancel():
                return
            try:
                future.set_result(call())
            except BaseException as error:  # noqa: BLE001 - raised where the result is taken
                future.set_exception(error)

        with self._lock:
            if self._begun < self._most:
                self._begun += 1
                threading.Thread(target=_serve, args=(self._todo,), name=self._name, daemon=True).start()
        self._todo.put(answer)
        return future

    def shutdown(self) -> None:
        """Let the threads end after what they were given."""
        with self._lock:
            for _ in range(self._begun):
                self._todo.put(None)
            self._begun = 0

    def __del__(self) -> None:
        self.shutdown()


def _serve(todo: queue.SimpleQueue[Callable[[], None] | None]) -> None:
    while (call := todo.get()) is not None:
        call()
        del call  # and what it holds


class _OrderedCalls(Generic[T, R]):
    """Threads that serve one queue, and the calls whose results are still due."""

    def __init__(self, work: Callable[[T], R], threads: int, ahead: int) -> None:
        self._work, self._ahead, self._threads = work, ahead, DaemonThreadPool(threads)
        self.pending: deque[Future[R]] = deque()

    @property
    def full(self) -> bool:
        return len(self.pending) >= self._ahead

    @property
    def first_done(self) -> bool:
        return bool(self.pending) and self.pending[0].done()

    def put(self, item: T) -> None:
        self.pending.append(self._threads.submit(partial(self._work, item)))

    def next(self, meanwhile: Callable[[], object]) -> R:
        meanwhile()
        while not wait([self.pending[0]], _LOOK_SECONDS).done:
            meanwhile()
        return self.pending.popleft().result()

    def leave(self) -> None:
        for future in self.pending:
            future.cancel()
        self._threads.shutdown()


# Imported once, before the first fork. No storage clients: their threads and connections do not survive one.
_MODULES = ["torch", "PIL.ImageFile"]
_ONE_AT_A_TIME = threading.RLock()
_START_SECONDS = 3.0  # that one start may take


def start_forkserver(*modules: str) -> None:
    """Start the fork server that loader processes come from; one that is running stays as it is.

    It imports torch and the named modules while this program goes on; this returns at once.
    """
    from multiprocessing import forkserver, resource_tracker

    multiprocessing.get_context("forkserver").set_forkserver_preload([*_MODULES, *modules])
    resource_tracker.ensure_running()  # whose start, within the other's, would let SIGINT through again
    with clean_process_start(), _unmoved_by_ctrl_c():
        forkserver.ensure_running()


@contextlib.contextmanager
def _unmoved_by_ctrl_c() -> Iterator[None]:
    """What is started meanwhile never hears SIGINT: a terminal sends it to all, but it is the driver that ends them."""
    before = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


class _MainWithoutFile(ModuleType):
    """`__main__` for everybody but `multiprocessing`, which finds no file in it that a new process should run."""

    def __init__(self, main: ModuleType) -> None:
        super().__init__("__main__")
        self.__dict__["_main"] = main

    def __getattr__(self, name: str) -> Any:
        if name in {"__file__", "__path__"}:
            raise AttributeError(name)
        return getattr(self.__dict__["_main"], name)


@contextlib.contextmanager
def clean_process_start() -> Iterator[None]:
    """Around the start of processes: they do not import again the program that runs us.

    That may be a script without a guard, or Ray's worker. One start at a time, from any thread.
    """
    with _ONE_AT_A_TIME:
        main = sys.modules["__main__"]
        method = cast("str | None", multiprocessing.get_start_method(allow_none=True))
        sys.modules["__main__"] = _MainWithoutFile(main)
        try:
            yield
        finally:
            sys.modules["__main__"] = main
            if method is None:  # starting a process settles it for the whole program, which is not for us to do
                multiprocessing.set_start_method(cast("str", None), force=True)


def kill_child_processes() -> None:
    """Kill all child processes; none is started any more, for this program is about to end.

    One that its starter does not live to tell what to do ends in a traceback.
    """
    _ONE_AT_A_TIME.acquire(timeout=_START_SECONDS)
    for child in multiprocessing.active_children():
        child.kill()


def exit_with_parent() -> None:
    """Wait, in a thread of a child process, for the program that started it to be gone; then end it at once.

    A killed program cannot say goodbye, and the fork server, the parent by process id, lives as long as its children.
    """
    parent = multiprocessing.parent_process()
    if parent is not None:
        parent.join()
        os._exit(1)
