"""A batch's objects to their bytes, telling the fault of one object from the fault of its store."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from batchjob.errors import Changed, NotFound, StorageError, Unaddressable, Unavailable
from batchjob.records import Blob, Fault, ImageRef
from batchjob.settings import is_local

if TYPE_CHECKING:
    from batchjob.storage import Reader

__all__ = ["Fetcher", "oversized", "together"]

FETCH_BYTES = 128 * 1024 * 1024  # encoded bytes that one loader process holds at once, where sizes are known


@dataclass(frozen=True)
class Fetcher:
    """Reads images, many at once.

    An object that cannot be read is the image's fault only if a canary, an object of the same store that this process
    has read before, can be read at the same time; else the store or its credentials are to blame.

    Attributes:
        reader: of any URI.
        max_bytes: images known to be larger are not fetched.
    """

    reader: Reader
    max_bytes: int | None = None
    _canaries: dict[str, str] = field(default_factory=dict)

    def fetch(self, refs: Sequence[ImageRef]) -> list[Blob | Fault]:
        """As many answers as refs, in order. Raises Unavailable when the store cannot be reached."""
        faults = [oversized(ref.size, self.max_bytes) for ref in refs]
        wanted = [ref for ref, fault in zip(refs, faults, strict=True) if fault is None]
        found = self._read([ref.location for ref in wanted])
        answers = iter([_as_planned(ref, answer) for ref, answer in zip(wanted, found, strict=True)])
        return [fault or next(answers) for fault in faults]

    def _read(self, locations: Sequence[str]) -> list[Blob | Fault]:
        answers = self.reader.read_many(locations)
        for location, answer in zip(locations, answers, strict=True):
            if isinstance(answer, Blob):
                self._canaries[_store(location)] = location
        refused = [index for index, answer in enumerate(answers) if isinstance(answer, Unavailable)]
        for index, answer in zip(refused, self._again([locations[index] for index in refused], answers), strict=True):
            answers[index] = answer
        return [_fault(answer) if isinstance(answer, StorageError | Unavailable) else answer for answer in answers]

    def _again(
        self, locations: Sequence[str], first: Sequence[Blob | StorageError | Unavailable]
    ) -> list[Blob | StorageError | Unavailable]:
        """The last try, for each as long as it takes. Raises Unavailable when it fails and no canary can be read."""
        if not locations:
            return []
        trouble = next(answer for answer in first if isinstance(answer, Unavailable))
        self._see_canaries(locations, trouble)
        answers = self.reader.read_many(locations, stubborn=True)
        refused = [location for location, answer in zip(locations, answers, strict=True) if _is_refused(answer)]
        self._see_canaries(refused, trouble)
        return answers

    def _see_canaries(self, locations: Sequence[str], trouble: Unavailable) -> None:
        for store in dict.fromkeys(_store(location) for location in locations):
            canary = self._canaries.get(store)
            if canary is None or canary in locations:
                raise trouble
            self.reader.read(canary)


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


def _as_planned(ref: ImageRef, answer: Blob | Fault) -> Blob | Fault:
    """The answer; a fault where the object is no longer the one that was planned, as far as its tags tell."""
    if isinstance(answer, Fault) or ref.etag is None or answer.etag is None or ref.etag == answer.etag:
        return answer
    return Fault("fetch", "changed", f"{ref.location}: changed since the plan was made ({ref.etag}, now {answer.etag})")


def _is_refused(answer: object) -> bool:
    return isinstance(answer, Unavailable)


def _fault(error: StorageError | Unavailable) -> Fault:
    if isinstance(error, Unavailable):
        said = error.message.partition("; ")[0]
        return Fault("fetch", "unreadable", f"{said}; other objects of the same store can be read")
    words = ((NotFound, "not_found"), (Unaddressable, "unaddressable"), (Changed, "changed"))
    return Fault("fetch", next((word for kind, word in words if isinstance(error, kind)), "storage"), error.message)


def _store(location: str) -> str:
    """What shares one canary: a bucket or host, and all local disks."""
    return "" if is_local(location) else "/".join(location.split("/", 3)[:3])
