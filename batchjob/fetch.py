"""A batch's objects to their bytes, telling the fault of one object from the fault of its store."""

from __future__ import annotations

import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from batchjob.errors import Changed, NotFound, Refused, StorageError, Unaddressable, Unavailable
from batchjob.records import Blob, Fault, ImageRef
from batchjob.settings import is_local

if TYPE_CHECKING:
    from batchjob.storage import Reader

_Answer = Blob | StorageError | Unavailable

__all__ = ["Fetcher", "oversized", "together"]

FETCH_BYTES = 128 * 1024 * 1024  # encoded bytes that one loader process holds at once, where sizes are known


@dataclass(frozen=True)
class Fetcher:
    """Reads images, many at once.

    An object that cannot be read is the image's fault only if a canary, an object of the same store that this process
    has read before, can be read at the same time; else the store or its credentials are to blame. A store that does
    not answer is waited for as long as the reader waits out an outage.

    Attributes:
        reader: of any URI.
        max_bytes: images known to be larger are not fetched.
        retries: how often an object that cannot be read is asked for again while its store answers.
    """

    reader: Reader
    max_bytes: int | None = None
    retries: int = 2
    _canaries: dict[str, str] = field(default_factory=dict)

    def fetch(self, refs: Sequence[ImageRef]) -> list[Blob | Fault]:
        """As many answers as refs, in order. Raises Unavailable when the store cannot be reached."""
        faults = [oversized(ref.size, self.max_bytes) for ref in refs]
        wanted = [ref for ref, fault in zip(refs, faults, strict=True) if fault is None]
        found = self._read([ref.location for ref in wanted])
        answers = iter([_as_planned(ref, answer) for ref, answer in zip(wanted, found, strict=True)])
        return [fault or next(answers) for fault in faults]

    def _read(self, locations: Sequence[str]) -> list[_Answer]:
        asked, waits, retries, waited = time.monotonic(), 0, 0, False
        answers = self._asked(locations, stubborn=False)
        while refused := {at: answer for at, answer in enumerate(answers) if isinstance(answer, Unavailable)}:
            if self._in_reach({locations[at]: error for at, error in refused.items()}, asked):
                if not waited and retries == self.retries:
                    break
                retries += not waited  # what an outage refused says nothing of an image
                wanted, waited = list(refused), False
            else:
                waits, waited = waits + 1, True
                wanted = [list(refused)[waits % len(refused)]]  # one is enough to see that it is over
                self.reader.outage(locations[wanted[0]]).pause(waits)
            again = self._asked([locations[at] for at in wanted], stubborn=not waited)
            for at, answer in zip(wanted, again, strict=True):
                answers[at] = answer
        return answers

    def _asked(self, locations: Sequence[str], stubborn: bool) -> list[_Answer]:
        answers = self.reader.read_many(locations, stubborn)
        for location, answer in zip(locations, answers, strict=True):
            if isinstance(answer, Blob):
                self._canaries[_store(location)] = location
        return answers

    def _in_reach(self, refused: Mapping[str, Unavailable], asked: float) -> bool:
        """Whether all stores of these objects answer now.

        Raises:
            Unavailable: it has not answered for too long.
        """
        for store in dict.fromkeys(map(_store, refused)):
            location, trouble = next((at, error) for at, error in refused.items() if _store(at) == store)
            canary = self._canaries.get(store)
            if canary is not None and canary not in refused:
                (seen,) = self.reader.read_many([canary])
                if not isinstance(seen, Unavailable):
                    continue
                trouble = seen
            if is_local(location):
                raise trouble
            self.reader.outage(location).endured(trouble, asked)
            return False
        return True


def oversized(size: int | None, limit: int | None) -> Fault | None:
    """The fault of an image of more bytes than allowed."""
    if size is None or limit is None or size <= limit:
        return None
    return Fault("fetch", "too_large", f"the file has {size:,} bytes, over decode.max_bytes {limit:,}")


def together(refs: Sequence[ImageRef]) -> Iterator[Sequence[ImageRef]]:
    """Runs of refs that are read at once: as many as `FETCH_BYTES` allow, at least one."""
    start, held = 0, 0
    for index, ref in enumerate(refs):
        held += ref.size or 0
        if held > FETCH_BYTES and index > start:
            yield refs[start:index]
            start, held = index, ref.size or 0
    if start < len(refs):
        yield refs[start:]


def _as_planned(ref: ImageRef, answer: _Answer) -> Blob | Fault:
    """The answer; a fault where the object is no longer the one that was planned, as far as its tags tell."""
    if isinstance(answer, NotFound) and ref.etag is not None:
        return Fault("fetch", "deleted", f"{ref.location}: deleted since the plan was made ({ref.etag}, now absent)")
    if not isinstance(answer, Blob):
        return _fault(answer)
    if ref.etag is None or answer.etag is None or ref.etag == answer.etag:
        return answer
    return Fault("fetch", "changed", f"{ref.location}: changed since the plan was made ({ref.etag}, now {answer.etag})")


def _fault(error: StorageError | Unavailable) -> Fault:
    if isinstance(error, Unavailable):
        said = error.message.partition("; ")[0]
        return Fault("fetch", "unreadable", f"{said}; other objects of the same store can be read")
    words = ((NotFound, "not_found"), (Refused, "refused"), (Unaddressable, "unaddressable"), (Changed, "changed"))
    return Fault("fetch", next((word for kind, word in words if isinstance(error, kind)), "storage"), error.message)


def _store(location: str) -> str:
    """What shares one canary: a bucket or host, and all local disks."""
    return "" if is_local(location) else "/".join(location.split("/", 3)[:3])
