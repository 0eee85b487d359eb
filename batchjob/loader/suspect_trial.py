"""Trial of a suspect image alone in a disposable process: an image that kills a second time becomes an error row."""

from __future__ import annotations

from dataclasses import dataclass
from multiprocessing.connection import wait

from batchjob.errors import AttemptFailed
from batchjob.loader.dataset import BatchRequest
from batchjob.loader.worker_process import LoaderProcess, LoadResult, WorkerExit
from batchjob.types import Batch, ErrorRecord, ImageInfo

__all__ = ["TrialResult", "try_image_alone"]


@dataclass(frozen=True)
class TrialResult:
    """Outcome of a trial.

    Attributes:
        info: Info with the image's error; None if it can be decoded like any other.
        exit: End of the process, if it died.
    """

    info: ImageInfo | None
    exit: WorkerExit | None = None


def try_image_alone(process: LoaderProcess, request: BatchRequest, seconds: float) -> TrialResult:
    """Load one image in a process that does nothing else. The caller's clock kills the process if it takes too long.

    Args:
        process: New process.
        request: Request for one image.
        seconds: Limit of the caller's clock, for the error message.

    Raises:
        AttemptFailed: The process ended before it was ready.
    """
    process.send(0, request)
    while True:
        ready = wait([process.pipe, process.sentinel])
        if (received := process.receive()) is not None:
            return TrialResult(_find_image_error(received[1]))
        if process.sentinel in ready:
            break
    process_exit = process.wait_for_exit()
    if not process.progress.started:
        raise AttemptFailed(f"a loader process {process_exit.description} as it started")
    snapshot = process_exit.snapshot
    if snapshot is None or snapshot.row is None:  # it did not die over the image
        return TrialResult(None, process_exit)
    return TrialResult(ImageInfo(snapshot.etag, error=_make_error(process_exit, seconds)), process_exit)


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
