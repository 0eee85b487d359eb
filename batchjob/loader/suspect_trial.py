"""Trial of a suspect image alone in a disposable process: an image that kills a second time becomes an error row."""

from __future__ import annotations

from dataclasses import dataclass
from multiprocessing.connection import Connection, wait

import torch

from batchjob.errors import AttemptFailed
from batchjob.loader.dataset import BatchRequest, ImageDataset, LoadResult, load_or_fail
from batchjob.loader.settings import LoaderConfig
from batchjob.loader.worker_limits import WorkerProgress, limit_process
from batchjob.loader.worker_process import LoaderProcess, WorkerExit, run_beside_parent
from batchjob.types import Batch, ErrorRecord, ImageInfo

__all__ = ["TrialResult", "start_trial", "wait_for_trial"]


@dataclass(frozen=True)
class TrialResult:
    """Outcome of a trial.

    Attributes:
        info: Info with the image's error; None if it can be decoded like any other.
        exit: End of the process, if it died.
    """

    info: ImageInfo | None
    exit: WorkerExit | None = None


def start_trial(dataset: ImageDataset, request: BatchRequest, config: LoaderConfig) -> LoaderProcess:
    """Start a process that loads a request for one image and does nothing else."""
    return LoaderProcess(_run_trial, dataset, request, config.memory_bytes, config.image_seconds)


def wait_for_trial(process: LoaderProcess, seconds: float) -> TrialResult:
    """Wait for the result of a trial. The caller's clock kills the process if it takes too long.

    Args:
        process: Process of the trial.
        seconds: Limit of the caller's clock, for the error message.

    Raises:
        AttemptFailed: The process ended before it was ready.
    """
    while True:
        ready = wait(process.sources)
        if (received := process.receive()) is not None:
            return TrialResult(received[0])
        if process.sentinel in ready:
            break
    process_exit = process.wait_for_exit()
    if not process.progress.started:
        raise AttemptFailed(f"a loader process {process_exit.description} as it started")
    snapshot = process_exit.snapshot
    if snapshot is None or snapshot.row is None:  # it did not die over the image
        return TrialResult(None, process_exit)
    return TrialResult(ImageInfo(snapshot.etag, error=_make_error(process_exit, seconds)), process_exit)


def _run_trial(
    connection: Connection,
    progress: WorkerProgress,
    dataset: ImageDataset,
    request: BatchRequest,
    memory_bytes: int | None,
    seconds: float,
) -> None:
    run_beside_parent()
    torch.set_num_threads(1)
    callback = limit_process(progress, memory_bytes, seconds)
    progress.start_request(0)
    connection.send(_find_image_error(load_or_fail(dataset, request, callback)))
    progress.set_idle()


def _find_image_error(result: LoadResult) -> ImageInfo | None:
    """Return the image's info if it has an ordinary error of its own."""
    if isinstance(result, Batch) and result.image_infos and result.image_infos[0].error is not None:
        return result.image_infos[0]
    return None


def _make_error(process_exit: WorkerExit, seconds: float) -> ErrorRecord:
    match process_exit.kind:
        case "hang":
            message = f"it was not decoded within {seconds:g} s (runtime.loader.image_seconds), alone neither"
        case "memory":
            message = "the process that decoded it was killed (SIGKILL), as for want of memory, alone too"
        case _:
            message = f"the process that decoded it {process_exit.description.partition(' (')[0]}, alone too"
    return ErrorRecord("decode", process_exit.kind, message)
