"""A suspect tried alone, in a process that is thrown away: only an image that kills twice is to blame."""

from __future__ import annotations

from dataclasses import dataclass, replace
from multiprocessing.connection import wait

from batchjob.errors import AttemptFailed
from batchjob.loader.dataset import Request
from batchjob.loader.worker_process import Death, LoaderProcess
from batchjob.types import Batch, Fault, ImageFacts

__all__ = ["Verdict", "tried"]


@dataclass(frozen=True)
class Verdict:
    """What became of an image on its own.

    Attributes:
        facts: its fault, None where it can be decoded like any other.
        death: of the process, where it came to that.
    """

    facts: ImageFacts | None
    death: Death | None = None


def tried(process: LoaderProcess, request: Request, seconds: float) -> Verdict:
    """Load a request of one image, in a process that serves nothing else. The clock is kept by who watches it.

    Args:
        process: fresh.
        request: of one image.
        seconds: what the clock allows, for the words.

    Raises:
        AttemptFailed: the process ended before it came to load anything.
    """
    process.send(0, replace(request, on_host=True))
    while True:
        ready = wait([process.pipe, process.sentinel])
        if (arrived := process.receive()) is not None:
            return Verdict(_faulty(arrived[1]))
        if process.sentinel in ready:
            break
    death = process.death()
    if not process.mark.started:
        raise AttemptFailed(f"a loader process {death.words} as it started")
    if death.place is None or death.place.row is None:  # not over the image
        return Verdict(None, death)
    return Verdict(ImageFacts(death.place.etag, fault=_fault(death, seconds)), death)


def _faulty(item: object) -> ImageFacts | None:
    """The facts of an image that has an ordinary fault of its own."""
    if isinstance(item, Batch) and item.facts and item.facts[0].fault is not None:
        return item.facts[0]
    return None


def _fault(death: Death, seconds: float) -> Fault:
    match death.kind:
        case "hang":
            words = f"it was not decoded within {seconds:g} s (runtime.loader.image_seconds), alone neither"
        case "memory":
            words = "the process that decoded it was killed (SIGKILL), as for want of memory, alone too"
        case _:
            words = f"the process that decoded it {death.words.partition(' (')[0]}, alone too"
    return Fault("decode", death.kind, words)
