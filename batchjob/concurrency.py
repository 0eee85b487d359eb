"""Calls in daemon threads, which never delay the exit of the process, and child processes that start clean."""

from __future__ import annotations

import atexit
import contextlib
import multiprocessing
import multiprocessing.connection
import multiprocessing.util
import os
import queue
import signal
import sys
import tempfile
import threading
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, wait
from contextlib import suppress
from functools import partial
from multiprocessing.process import BaseProcess
from typing import Any, Generic, TypeVar, cast

from batchjob.errors import InvalidJob

__all__ = [
    "DaemonThreadPool",
    "clean_process_start",
    "exit_past_daemon_threads",
    "exit_with_parent",
    "join_child_process",
    "kill_child_processes",
    "parallel_map",
    "run_in_background",
    "start_forkserver",
    "terminal_signals_blocked",
]

T = TypeVar("T")
R = TypeVar("R")

_POLL_SECONDS = 0.2
# Time for the exit functions of libraries.
_EXIT_SECONDS = 3.0
# Calls running or waiting for each thread: enough to keep all threads busy, and few for any number of items.
_CALLS_PER_THREAD = 4

# Modules that the fork server imports once. Storage clients are not among them: their threads and connections do not
# survive a fork.
_PRELOADED_MODULES = ["torch", "PIL.ImageFile"]
_PROCESS_START_LOCK = threading.RLock()
# A socket's path on Linux has 107 bytes; macOS allows three less.
_MAX_SOCKET_BYTES = 103
_SOCKET_FOLDER, _SOCKET = "/pymp-12345678", "/listener-12345678"
_SHORT_FOLDERS = ("/tmp", "/var/tmp", "/dev/shm")  # noqa: S108 - `multiprocessing` makes a private folder there
# Before all child processes are killed, the start of one is waited for this long.
_PROCESS_START_SECONDS = 3.0


# -- threads ---------------------------------------------------------------------------------------------------


def run_in_background(work: Callable[[], R], on_wait: Callable[[], object] = lambda: None) -> R:
    """Run one call that may block in another thread, and return its result.

    Example: `run_in_background(lambda: store.read(key), lease.heartbeat)` keeps a lease while a store does not answer.

    Args:
        work: Function to call.
        on_wait: Called here every 0.2 s until the result is there; if it raises, the call is abandoned.
    """
    (result,) = parallel_map(lambda _: work(), [None], on_wait, threads=1)
    return result


def parallel_map(
    work: Callable[[T], R],
    items: Iterable[T],
    on_wait: Callable[[], object] = lambda: None,
    *,
    threads: int = 16,
    prefetch: int | None = None,
) -> Iterator[R]:
    """Apply a function to items in threads, and yield the results in the order of the items.

    Raises the first error of a call or of the items, after the results before it.

    Example: `list(parallel_map(store.stat, ["a", "b"]))` has the result for "a" first, even if "b" answers earlier.

    Args:
        work: Function of an item, called in other threads.
        items: Any number of items; only a few are taken ahead of the result that comes next.
        on_wait: Called here before each result, and every 0.2 s while one is waited for. If it raises, no further call
            is started, and those that run are abandoned.
        threads: Most threads to use.
        prefetch: Items that are taken before the first result; None takes four for each thread.
    """
    calls = _OrderedCalls(work, threads, threads * _CALLS_PER_THREAD if prefetch is None else prefetch)
    remaining, failure = iter(items), None
    try:
        while failure is None:
            try:
                calls.start(next(remaining))
            except StopIteration:
                break
            except Exception as error:  # noqa: BLE001 - raised after the results of all items before it
                failure = error
            while calls.is_full or calls.first_is_done:
                yield calls.next_result(on_wait)
        while calls.pending:
            yield calls.next_result(on_wait)
        if failure is not None:
            raise failure
    finally:
        calls.cancel()


class DaemonThreadPool:
    """Daemon threads for calls that may block, started when they are needed.

    The process does not wait for them at its exit, as it does for the threads of `concurrent.futures`.

    Args:
        max_threads: Most threads to start.
        name: Name of the threads, for debuggers.
    """

    def __init__(self, max_threads: int, name: str = "background") -> None:
        self._max_threads, self._name, self._started = max_threads, name, 0
        self._lock = threading.Lock()
        self._calls: queue.SimpleQueue[Callable[[], None] | None] = queue.SimpleQueue()

    def submit(self, call: Callable[[], R]) -> Future[R]:
        """Run a call as soon as a thread is free, and return its future."""
        future: Future[R] = Future()

        def run() -> None:
            if not future.set_running_or_notify_cancel():
                return
            try:
                future.set_result(call())
            except BaseException as error:  # noqa: BLE001 - raised where the result is read
                future.set_exception(error)

        with self._lock:
            if self._started < self._max_threads:
                self._started += 1
                threading.Thread(target=_run_calls, args=(self._calls,), name=self._name, daemon=True).start()
        self._calls.put(run)
        return future

    def shutdown(self) -> None:
        """Let the threads end after the calls that were submitted; does not wait for them."""
        with self._lock:
            for _ in range(self._started):
                self._calls.put(None)
            self._started = 0

    def __del__(self) -> None:
        self.shutdown()


def exit_past_daemon_threads(exit_code: int) -> None:
    """End this process with an exit code if daemon threads are still running, else do nothing.

    If the interpreter is torn down while a thread runs native code, of a model or a storage client for example, the
    process aborts and its exit code is lost. Exit functions of libraries are called first, for at most 3 s.
    """
    if not any(thread.daemon for thread in threading.enumerate()):
        return
    for stream in (sys.stdout, sys.stderr):
        with suppress(OSError, ValueError):  # its reader may be gone
            stream.flush()
    wait([DaemonThreadPool(1).submit(atexit._run_exitfuncs)], _EXIT_SECONDS)
    os._exit(exit_code)


def _run_calls(calls: queue.SimpleQueue[Callable[[], None] | None]) -> None:
    while (call := calls.get()) is not None:
        call()
        # An idle thread must not keep alive what the call references.
        del call


class _OrderedCalls(Generic[T, R]):
    """Calls in threads whose results are taken in the order in which the calls were started."""

    def __init__(self, work: Callable[[T], R], threads: int, limit: int) -> None:
        self._work, self._limit, self._threads = work, limit, DaemonThreadPool(threads)
        self.pending: deque[Future[R]] = deque()

    @property
    def is_full(self) -> bool:
        return len(self.pending) >= self._limit

    @property
    def first_is_done(self) -> bool:
        return bool(self.pending) and self.pending[0].done()

    def start(self, item: T) -> None:
        self.pending.append(self._threads.submit(partial(self._work, item)))

    def next_result(self, on_wait: Callable[[], object]) -> R:
        on_wait()
        while not wait([self.pending[0]], _POLL_SECONDS).done:
            on_wait()
        return self.pending.popleft().result()

    def cancel(self) -> None:
        for future in self.pending:
            future.cancel()
        self._threads.shutdown()


# -- child processes -------------------------------------------------------------------------------------------


def start_forkserver(*modules: str) -> None:
    """Start the fork server from which loader processes are forked; if it runs already, it stays as it is.

    This returns at once, while the fork server imports torch and the named modules.

    Raises:
        InvalidJob: The path of temporary files is too long for a socket, and so is every other one.
    """
    from multiprocessing import forkserver, resource_tracker

    _choose_socket_folder()
    multiprocessing.get_context("forkserver").set_forkserver_preload([*_PRELOADED_MODULES, *modules])
    # Started here, because within the start of the fork server its own start would unblock SIGINT.
    with terminal_signals_blocked():
        resource_tracker.ensure_running()
    with clean_process_start(), terminal_signals_blocked():
        forkserver.ensure_running()


@contextlib.contextmanager
def clean_process_start() -> Iterator[None]:
    """Start processes that do not import the main program of this process.

    It may be a script without `if __name__ == "__main__"`, or Ray's worker. This process may be a daemonic one, of
    `multiprocessing.Pool` or Celery, to which `multiprocessing` allows no children because they would outlive it: ours
    end with it (`exit_with_parent`). One process is started at a time, from any thread.
    """
    with _PROCESS_START_LOCK:
        program, current = vars(sys.modules["__main__"]), multiprocessing.current_process()
        method = cast("str | None", multiprocessing.get_start_method(allow_none=True))
        # As in an interactive session: a program without a file and a spec is nothing that a new process could import.
        origin: dict[str, Any] = {name: program[name] for name in ("__file__", "__spec__") if name in program}
        program.pop("__file__", None)
        program["__spec__"] = None
        is_daemonic = current.daemon
        if is_daemonic:
            current.daemon = False
        try:
            yield
        finally:
            if is_daemonic:
                current.daemon = True
            program.update(origin)
            # The first start of a process fixes the start method of the whole program. The program chooses it, not this
            # package.
            if method is None:
                multiprocessing.set_start_method(cast("str", None), force=True)


@contextlib.contextmanager
def terminal_signals_blocked() -> Iterator[None]:
    """Start processes that ignore the signals of a terminal, which go to all processes at Ctrl-C and at its end.

    The driver ends its processes itself, once what they work on is committed.
    """
    before = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT, signal.SIGHUP})
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


def join_child_process(process: BaseProcess, timeout: float | None = None) -> int | None:
    """Wait for the end of a child process, for so many seconds; return its exit code, None if it still runs.

    The exit code of a child of the fork server can be read only once, and the start of any process reads those of all
    that have ended; so no process is started while it is read here.
    """
    if not multiprocessing.connection.wait([process.sentinel], timeout):
        return None
    with _PROCESS_START_LOCK:
        process.join()
    return process.exitcode


def kill_child_processes() -> None:
    """Kill all child processes and let no further one start, because this program is about to end.

    A child that is killed between its fork and its first message ends in a traceback, so a start under way is waited
    for.
    """
    _PROCESS_START_LOCK.acquire(timeout=_PROCESS_START_SECONDS)
    for child in multiprocessing.active_children():
        child.kill()


def exit_with_parent() -> None:
    """Wait until the program that started this child process is gone, then end at once; to be run in a thread.

    A killed program cannot stop its children, and the fork server, their parent by process id, lives as long as they
    do.
    """
    parent = multiprocessing.parent_process()
    if parent is not None:
        parent.join()
        os._exit(1)


def _choose_socket_folder() -> None:
    """Let `multiprocessing` put its sockets into a folder whose path is short enough.

    It uses the folder for temporary files (TMPDIR), which batch systems name after the task, but the path of a socket
    has about 107 bytes at most. Child processes get the same folder.

    Example: a TMPDIR of 90 characters gives sockets `TMPDIR/pymp-12345678/listener-12345678` of 122, so `/tmp` is used.

    Raises:
        InvalidJob: No folder with a short path can be written.
    """
    own = tempfile.gettempdir()
    with _PROCESS_START_LOCK:
        for folder in (own, *_SHORT_FOLDERS):
            if len(os.fsencode(folder)) + len(_SOCKET_FOLDER) + len(_SOCKET) > _MAX_SOCKET_BYTES:
                continue
            tempfile.tempdir = folder
            try:
                made = multiprocessing.util.get_temp_dir()  # made once, then always the same
            except OSError:
                continue
            finally:
                tempfile.tempdir = own
            if len(os.fsencode(made)) + len(_SOCKET) <= _MAX_SOCKET_BYTES:
                return
    raise InvalidJob(
        f"TMPDIR: {own} is too long a path for the sockets of loader processes; set TMPDIR to a folder with a short "
        "path, or write runtime.loader.processes: 0"
    )
