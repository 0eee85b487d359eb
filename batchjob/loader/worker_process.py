"""One loader process: the handle that the worker has of it, and what runs in it, within limits of its own."""

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

from batchjob.concurrency import clean_process_start, exit_with_parent
from batchjob.errors import AttemptFailed, BatchjobError
from batchjob.loader.dataset import BatchRequest, ImageDataset
from batchjob.loader.worker_limits import WorkerCallback, apply_process_limits
from batchjob.loader.worker_progress import ProgressSnapshot, WorkerProgress
from batchjob.types import Batch

__all__ = ["LoadResult", "LoaderProcess", "WorkerExit"]

LoadResult = Batch | BatchjobError
_OUT_OF_MEMORY = 128 + errno.ENOMEM  # exit code of a process that found no memory between images
_CLOSE_SECONDS = 5.0


@dataclass(frozen=True)
class WorkerExit:
    """How a process ended.

    Attributes:
        kind: `crash`, `hang` or `memory`.
        words: for people, after "loader process 7".
        place: what it was at; None where it was idle.
    """

    kind: str
    description: str
    snapshot: ProgressSnapshot | None


class LoaderProcess:
    """A running loader process, as the worker sees it.

    Args:
        images: what it loads with.
        memory: bytes that it may use; None without a limit.
        seconds: of CPU that one image may take.

    Attributes:
        pipe: brings `(number of the task, Item)`; see `receive`.
        mark: what it is at.
    """

    def __init__(self, dataset: ImageDataset, memory: int | None, seconds: float) -> None:
        context = multiprocessing.get_context("forkserver")
        self.progress = WorkerProgress(context)
        self.pipe, theirs = context.Pipe()
        self._process = context.Process(
            target=_serve, args=(dataset, self.progress, theirs, memory, seconds), name="batchjob-loader", daemon=True
        )
        self._killed_for: str | None = None
        self._halted: float | None = None
        try:
            with clean_process_start():
                self._process.start()
        finally:
            theirs.close()

    @property
    def pid(self) -> int | None:
        return self._process.pid

    @property
    def sentinel(self) -> int:
        """Ready to be read once the process has ended."""
        return self._process.sentinel

    @property
    def alive(self) -> bool:
        return self._process.is_alive()

    def send(self, number: int, request: BatchRequest) -> None:
        """One more batch to load, after those that were sent before. A dead process takes no notice."""
        with suppress(OSError):
            self.pipe.send((number, request))

    def receive(self) -> tuple[int, LoadResult] | None:
        """The next batch that has arrived whole, None if there is none (any more)."""
        try:
            if self.pipe.poll():
                arrived: tuple[int, LoadResult] = self.pipe.recv()
                return arrived
        except (EOFError, ConnectionError, FileNotFoundError):  # it died, maybe with what it had only announced
            self._process.kill()
        return None

    def stopped_longer_than(self, seconds: float) -> bool:
        """Whether somebody stopped it (SIGSTOP) so long ago and it has not gone on since, as seen at each call."""
        if not _is_halted(self.pid):
            self._halted = None
            return False
        self._halted = time.monotonic() if self._halted is None else self._halted
        return time.monotonic() - self._halted > seconds

    def kill(self, reason: Literal["hang", "halt", "done", "closing"]) -> None:
        """End it at once; what for is remembered as what it died of."""
        self._killed_for = self._killed_for or reason
        self._process.kill()

    def wait_for_exit(self) -> WorkerExit:
        """What it has died of; waits for the last of it."""
        self._process.join()
        code = self._process.exitcode
        if self._killed_for == "hang" or code == -signal.SIGXCPU:
            return WorkerExit("hang", "took too long over one image or batch and was killed", self.progress.snapshot)
        if self._killed_for == "halt":
            return WorkerExit("crash", "was stopped by a signal, did not go on and was killed", self.progress.snapshot)
        kind = "memory" if code in {-signal.SIGKILL, _OUT_OF_MEMORY} else "crash"
        return WorkerExit(kind, _cause(code), self.progress.snapshot)

    def request_exit(self) -> None:
        """Ask it to end once it is through with what it has."""
        with suppress(OSError):
            self.pipe.send(None)

    def close(self, seconds: float = _CLOSE_SECONDS) -> None:
        """Wait for its end so long, then enforce it: it may be stuck in a decoder or a slow read."""
        self._process.join(seconds)
        if self._process.is_alive():
            self._process.kill()
            self._process.join()
        self.pipe.close()


def _is_halted(pid: int | None) -> bool:
    try:
        status = Path(f"/proc/{pid}/stat").read_bytes()
    except OSError:  # another system, or it is gone
        return False
    return status.rpartition(b") ")[2][:1] == b"T"


def _cause(code: int | None) -> str:
    if code == _OUT_OF_MEMORY:
        return "found no more memory (raise runtime.loader.memory_mib, or lower runtime.batch_size)"
    if code is None or code >= 0:
        return f"ended with exit code {code}"
    try:
        name = signal.Signals(-code).name
    except ValueError:
        name = f"signal {-code}"
    hints = {
        "SIGKILL": " (out of memory? lower runtime.batch_size or runtime.loader.processes)",
        "SIGBUS": " (shared memory is full: enlarge /dev/shm, or lower runtime.batch_size or runtime.loader.prefetch)",
        "SIGSEGV": " (a decoder crashed)",
    }
    return f"was ended by {name}{hints.get(name, '')}"


def _serve(images: ImageDataset, mark: WorkerProgress, pipe: Connection, memory: int | None, seconds: float) -> None:
    """Requests in, batches out, until it is told to end."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is for the driver; it ends us in order
    threading.Thread(target=exit_with_parent, name="parent-watch", daemon=True).start()
    apply_process_limits(memory)
    watched = WorkerCallback(mark, seconds)
    requests: queue.SimpleQueue[tuple[int, BatchRequest] | None] = queue.SimpleQueue()
    threading.Thread(target=_take_in, args=(pipe, requests), name="requests", daemon=True).start()
    import torch

    torch.set_num_threads(1)
    mark.set_idle()
    with suppress(EOFError, ConnectionError):  # the worker is gone
        while (sent := requests.get()) is not None:
            task, request = sent
            mark.start_request(task)
            answer = _loaded(images, request, watched)
            pipe.send((task, answer))
            mark.set_idle()


def _take_in(pipe: Connection, requests: queue.SimpleQueue[tuple[int, BatchRequest] | None]) -> None:
    """As they come, for a large one does not fit into the pipe: whoever sends it would wait for the batch at work."""
    try:
        with suppress(EOFError, OSError):
            while (sent := pipe.recv()) is not None:
                requests.put(sent)
    except MemoryError:
        os._exit(_OUT_OF_MEMORY)
    finally:  # whatever it was: a process that lost a request ends, and what it had in hand is loaded by another
        requests.put(None)


def _loaded(images: ImageDataset, request: BatchRequest, watched: WorkerCallback) -> LoadResult:
    try:
        return images.load_batch(request, watched, shared=True)
    except MemoryError:  # no image's own: a process anew, and smaller batches, get further than this one
        os._exit(_OUT_OF_MEMORY)
    except Exception as error:  # noqa: BLE001 - fails the attempt, where the batch would have been
        text = " ".join(str(error).split())[:500]
        return AttemptFailed(f"the loader failed: {type(error).__name__}: {text}")
