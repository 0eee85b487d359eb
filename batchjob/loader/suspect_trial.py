"""A suspect tried alone, in a process that is thrown away: only an image that kills twice is to blame."""

from __future__ import annotations

from dataclasses import dataclass, replace
from multiprocessing.connection import wait

from batchjob.errors import AttemptFailed
from batchjob.loader.dataset import BatchRequest
from batchjob.loader.worker_process import LoaderProcess, WorkerExit
from batchjob.types import Batch, ErrorRecord, ImageInfo

__all__ = ["TrialResult", "try_image_alone"]


@dataclass(frozen=True)
class TrialResult:
    """What became of an image on its own.

    Attributes:
        facts: its fault, None where it can be decoded like any other.
        death: of the process, where it came to that.
    """

    info: ImageInfo | None
    exit: WorkerExit | None = None


def try_image_alone(process: LoaderProcess, request: BatchRequest, seconds: float) -> TrialResult:
    """Load a request of one image, in a process that serves nothing else. The clock is kept by who watches it.

    Args:
        process: fresh.
        request: of one image.
        seconds: what the clock allows, for the words.

    Raises:
        AttemptFailed: the process ended before it came to load anything.
    """
    process.send(0, replace(request, decode_on_cpu=True))
    while True:
        ready = wait([process.pipe, process.sentinel])
        if (arrived := process.receive()) is not None:
            return TrialResult(_faulty(arrived[1]))
        if process.sentinel in ready:
            break
    death = process.wait_for_exit()
    if not process.progress.started:
        raise AttemptFailed(f"a loader process {death.description} as it started")
    if death.snapshot is None or death.snapshot.row is None:  # not over the image
        return TrialResult(None, death)
    return TrialResult(ImageInfo(death.snapshot.etag, error=_fault(death, seconds)), death)


def _faulty(item: object) -> ImageInfo | None:
    """The facts of an image that has an ordinary fault of its own."""
    if isinstance(item, Batch) and item.image_infos and item.image_infos[0].error is not None:
        return item.image_infos[0]
    return None


def _fault(death: WorkerExit, seconds: float) -> ErrorRecord:
    match death.kind:
        case "hang":
            words = f"it was not decoded within {seconds:g} s (runtime.loader.image_seconds), alone neither"
        case "memory":
            words = "the process that decoded it was killed (SIGKILL), as for want of memory, alone too"
        case _:
            words = f"the process that decoded it {death.description.partition(' (')[0]}, alone too"
    return ErrorRecord("decode", death.kind, words)
