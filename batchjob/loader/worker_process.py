"""One loader process: the worker's handle of it, and the loop that runs inside it under limits of its own."""

from __future__ import annotations

import errno
import multiprocessing
import os
import queue
import signal
import threading
import time
from contextlib import suppress
from dataclasses import dataclass
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Literal

import torch

from batchjob.concurrency import clean_process_start, exit_with_parent
from batchjob.errors import AttemptFailed, BatchjobError
from batchjob.loader.dataset import BatchRequest, ImageDataset
from batchjob.loader.worker_limits import WorkerCallback, apply_process_limits
from batchjob.loader.worker_progress import ProgressSnapshot, WorkerProgress
from batchjob.types import Batch

__all__ = ["LoadResult", "LoaderProcess", "WorkerExit"]

LoadResult = Batch | BatchjobError

_OUT_OF_MEMORY_CODE = 128 + errno.ENOMEM  # exit code of a process that found no memory between images
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
    """Running loader process, seen from the worker.

    Args:
        dataset: Dataset that it loads batches with.
        memory: Memory that it may use, in bytes; None without a limit.
        seconds: CPU seconds that one image may take.

    Attributes:
        progress: Slot in shared memory that says what the process works on.
        pipe: Connection that brings `(request number, result)`; see `receive`.
    """

    def __init__(self, dataset: ImageDataset, memory: int | None, seconds: float) -> None:
        context = multiprocessing.get_context("forkserver")
        self.progress = WorkerProgress(context)
        self.pipe, child_pipe = context.Pipe()
        self._process = context.Process(
            target=_run_loader_process,
            args=(dataset, self.progress, child_pipe, memory, seconds),
            name="batchjob-loader",
            daemon=True,
        )
        self._kill_reason: str | None = None
        self._stopped_since: float | None = None
        try:
            with clean_process_start():
                self._process.start()
        finally:
            child_pipe.close()

    @property
    def pid(self) -> int | None:
        return self._process.pid

    @property
    def sentinel(self) -> int:
        """File descriptor that becomes readable once the process has ended."""
        return self._process.sentinel

    def send(self, number: int, request: BatchRequest) -> None:
        """Queue one more request. A process that has died ignores it."""
        with suppress(OSError):
            self.pipe.send((number, request))

    def receive(self) -> tuple[int, LoadResult] | None:
        """Return the next result that has arrived completely, with the number of its request; None if there is none."""
        try:
            if self.pipe.poll():
                received: tuple[int, LoadResult] = self.pipe.recv()
                return received
        except (EOFError, ConnectionError, FileNotFoundError):  # it died, maybe after it had announced a result
            self._process.kill()
        return None

    def stopped_longer_than(self, seconds: float) -> bool:
        """Return True if SIGSTOP has held the process for so long, counted from the first call that saw it."""
        if not _is_stopped(self.pid):
            self._stopped_since = None
            return False
        self._stopped_since = time.monotonic() if self._stopped_since is None else self._stopped_since
        return time.monotonic() - self._stopped_since > seconds

    def kill(self, reason: Literal["hang", "halt", "done", "closing"]) -> None:
        """Kill the process at once; the first reason decides what `wait_for_exit` reports."""
        self._kill_reason = self._kill_reason or reason
        self._process.kill()

    def wait_for_exit(self) -> WorkerExit:
        """Wait for the end of the process and return its cause."""
        self._process.join()
        code, snapshot = self._process.exitcode, self.progress.snapshot
        if self._kill_reason == "hang" or code == -signal.SIGXCPU:
            return WorkerExit("hang", "took too long over one image or batch and was killed", snapshot)
        if self._kill_reason == "halt":
            return WorkerExit("crash", "was stopped by a signal, did not go on and was killed", snapshot)
        kind = "memory" if code in {-signal.SIGKILL, _OUT_OF_MEMORY_CODE} else "crash"
        return WorkerExit(kind, _describe_exit_code(code), snapshot)

    def request_exit(self) -> None:
        """Ask the process to end after the requests that it has."""
        with suppress(OSError):
            self.pipe.send(None)

    def close(self, seconds: float = _CLOSE_SECONDS) -> None:
        """Wait for the end so long, then kill the process: it may be stuck in a decoder or a slow read."""
        self._process.join(seconds)
        if self._process.is_alive():
            self._process.kill()
            self._process.join()
        self.pipe.close()


def _is_stopped(pid: int | None) -> bool:
    """Read the state of a process from `/proc/PID/stat`: the letter after the command, T if it is stopped."""
    try:
        stat = Path(f"/proc/{pid}/stat").read_bytes()
    except OSError:  # the process is gone, or this system has no /proc
        return False
    return stat.rpartition(b") ")[2][:1] == b"T"


def _describe_exit_code(code: int | None) -> str:
    if code == _OUT_OF_MEMORY_CODE:
        return "found no more memory (raise runtime.loader.memory_mib, or lower runtime.batch_size)"
    if code is None or code >= 0:
        return f"ended with exit code {code}"
    try:
        name = signal.Signals(-code).name
    except ValueError:
        name = f"signal {-code}"
    return f"was ended by {name}{_SIGNAL_HINTS.get(name, '')}"


# -- in the loader process -------------------------------------------------------------------------------------------


def _run_loader_process(
    dataset: ImageDataset, progress: WorkerProgress, pipe: Connection, memory: int | None, seconds: float
) -> None:
    """Take requests and send results until the worker asks for the end or is gone."""
    # Ctrl-C is for the driver, which then ends this process in order.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    threading.Thread(target=exit_with_parent, name="parent-watch", daemon=True).start()
    apply_process_limits(memory)
    callback = WorkerCallback(progress, seconds)
    requests: queue.SimpleQueue[tuple[int, BatchRequest] | None] = queue.SimpleQueue()
    threading.Thread(target=_receive_requests, args=(pipe, requests), name="requests", daemon=True).start()
    torch.set_num_threads(1)
    progress.set_idle()
    with suppress(EOFError, ConnectionError):  # the worker is gone
        while (received := requests.get()) is not None:
            number, request = received
            progress.start_request(number)
            result = _load_batch(dataset, request, callback)
            pipe.send((number, result))
            progress.set_idle()


def _receive_requests(pipe: Connection, requests: queue.SimpleQueue[tuple[int, BatchRequest] | None]) -> None:
    """Receive requests in a thread: a large one does not fit into the pipe, and its sender would wait for a batch."""
    try:
        with suppress(EOFError, OSError):
            while (received := pipe.recv()) is not None:
                requests.put(received)
    except MemoryError:
        os._exit(_OUT_OF_MEMORY_CODE)
    finally:  # after any error: a process that lost a request ends, and another one loads what it had in hand
        requests.put(None)


def _load_batch(dataset: ImageDataset, request: BatchRequest, callback: WorkerCallback) -> LoadResult:
    try:
        return dataset.load_batch(request, callback, shared=True)
    except MemoryError:  # not one image's fault: a new process, and smaller batches, get further than this one
        os._exit(_OUT_OF_MEMORY_CODE)
    except Exception as error:  # noqa: BLE001 - fails the attempt, at the place of the batch
        text = " ".join(str(error).split())[:500]
        return AttemptFailed(f"the loader failed: {type(error).__name__}: {text}")
