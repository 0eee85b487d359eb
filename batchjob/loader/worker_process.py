"""One process of the loader: the worker's handle of it, and the cause of its end."""

from __future__ import annotations

import errno
import multiprocessing
import signal
import threading
import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from multiprocessing.connection import Connection
from typing import Any, Literal

import psutil

from batchjob.concurrency import clean_process_start, exit_with_parent, join_child_process
from batchjob.loader.worker_limits import ProgressSnapshot, WorkerProgress

__all__ = ["OUT_OF_MEMORY_CODE", "LoaderProcess", "WorkerExit", "run_beside_parent"]

OUT_OF_MEMORY_CODE = 128 + errno.ENOMEM
"""Exit code of a process that found no memory between images."""

_CLOSE_SECONDS = 5.0
_SIGNAL_HINTS = {
    "SIGKILL": " (out of memory? lower runtime.batch_size or runtime.loader.processes)",
    "SIGBUS": " (shared memory is full: enlarge /dev/shm, or lower runtime.batch_size or runtime.loader.prefetch)",
    "SIGSEGV": " (a decoder crashed)",
}


@dataclass(frozen=True)
class WorkerExit:
    """End of a loader process.

    Attributes:
        kind: `crash`, `hang` or `memory`.
        description: Cause in words, which follow "loader process 7".
        snapshot: Request and image that it worked on; None if it was idle.
    """

    kind: str
    description: str
    snapshot: ProgressSnapshot | None


class LoaderProcess:
    """Running process of the loader, with a connection to it and its progress in shared memory.

    Args:
        target: Function that the process runs; its first two arguments are the other end of the connection and the
            progress.
        args: Further arguments.

    Attributes:
        progress: Slot in shared memory that says what the process works on.
        connection: Connection to the process.
    """

    def __init__(self, target: Callable[..., None], *args: Any) -> None:
        context = multiprocessing.get_context("forkserver")
        self.progress = WorkerProgress(context)
        self.connection, other_end = context.Pipe()
        self._process = context.Process(
            target=target, args=(other_end, self.progress, *args), name="batchjob-loader", daemon=True
        )
        self._kill_reason: str | None = None
        self._stopped_since: float | None = None
        self._lost_since: float | None = None
        try:
            with clean_process_start():
                self._process.start()
        finally:
            other_end.close()

    @property
    def pid(self) -> int | None:
        return self._process.pid

    @property
    def sentinel(self) -> int:
        """File descriptor that becomes readable once the process has ended."""
        return self._process.sentinel

    @property
    def sources(self) -> list[Connection | int]:
        """All that becomes readable with a result or at the end; for `multiprocessing.connection.wait`."""
        return [self.sentinel] if self._lost_since is not None else [self.connection, self.sentinel]

    def send(self, item: object) -> None:
        """Send one more item. A process that has died ignores it."""
        with suppress(OSError):
            self.connection.send(item)

    def receive(self) -> tuple[Any] | None:
        """Return the next result that has arrived completely, in a tuple; None if there is none."""
        try:
            if self._lost_since is None and self.connection.poll():
                return (self.connection.recv(),)
        except (EOFError, ConnectionError, FileNotFoundError):  # it dies, maybe after it had announced a result
            self._lost_since = time.monotonic()
        return None

    def lost_longer_than(self, seconds: float) -> bool:
        """Return True if nothing can come from the process any more, for so long, although it may still run."""
        return self._lost_since is not None and time.monotonic() - self._lost_since > seconds

    def stopped_longer_than(self, seconds: float) -> bool:
        """Return True if SIGSTOP has held the process for so long, counted from the first call that saw it."""
        if not _is_stopped(self.pid):
            self._stopped_since = None
            return False
        self._stopped_since = time.monotonic() if self._stopped_since is None else self._stopped_since
        return time.monotonic() - self._stopped_since > seconds

    def kill(self, reason: Literal["hang", "halt", "lost", "done", "closing"]) -> None:
        """Kill the process at once; the first reason decides what `wait_for_exit` reports."""
        self._kill_reason = self._kill_reason or reason
        self._process.kill()

    def wait_for_exit(self) -> WorkerExit:
        """Wait for the end of the process and return its cause."""
        code, snapshot = join_child_process(self._process), self.progress.snapshot
        if self._kill_reason == "hang" or code == -signal.SIGXCPU:
            return WorkerExit("hang", "took too long over one image or batch and was killed", snapshot)
        if self._kill_reason == "halt":
            return WorkerExit("crash", "was stopped by a signal, did not go on and was killed", snapshot)
        if self._kill_reason == "lost":
            return WorkerExit("crash", "closed its connection, did not end and was killed", snapshot)
        kind = "memory" if code in {-signal.SIGKILL, OUT_OF_MEMORY_CODE} else "crash"
        return WorkerExit(kind, _describe_exit_code(code), snapshot)

    def close(self, seconds: float = _CLOSE_SECONDS) -> None:
        """Wait for the end so long, then kill the process: it may be stuck in a decoder or a slow read."""
        if join_child_process(self._process, seconds) is None:
            self._process.kill()
            join_child_process(self._process)
        self.connection.close()


def run_beside_parent() -> None:
    """Ignore Ctrl-C, which is for the driver, and end with the program that started this process."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    threading.Thread(target=exit_with_parent, name="parent-watch", daemon=True).start()


def _is_stopped(pid: int | None) -> bool:
    """Return True if SIGSTOP holds the process; False if it is gone."""
    try:
        return psutil.Process(pid).status() == psutil.STATUS_STOPPED
    except psutil.Error:
        return False


def _describe_exit_code(code: int | None) -> str:
    if code == OUT_OF_MEMORY_CODE:
        return "found no more memory (raise runtime.loader.memory_mib, or lower runtime.batch_size)"
    if code is None or code >= 0:
        return f"ended with exit code {code}"
    try:
        name = signal.Signals(-code).name
    except ValueError:
        name = f"signal {-code}"
    return f"was ended by {name}{_SIGNAL_HINTS.get(name, '')}"
