"""A batch's objects to their bytes, telling the fault of one object from the fault of its store."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from batchjob.errors import (
    AddressRefused,
    NotFound,
    ObjectTooLarge,
    PreconditionFailed,
    StorageError,
    UnaddressableKey,
    Unavailable,
)
from batchjob.settings import is_local
from batchjob.storage.objects import ObjectData
from batchjob.types import ErrorRecord, ImageRef

if TYPE_CHECKING:
    from batchjob.storage.reader import Reader

__all__ = ["Fetcher", "check_file_size", "group_refs"]

_Answer = ObjectData | StorageError | Unavailable
MAX_FETCH_BYTES = 128 * 1024 * 1024  # encoded bytes that one loader process holds at once, where sizes are known
_CANARIES = 4  # of the web, from as many hosts


@dataclass(frozen=True)
class Fetcher:
    """Reads images, many at once.

    An object that cannot be read is the image's fault only if a canary, an object of the same store that this process
    has read before, can be read at the same time; else the store or its credentials are to blame. A store that does
    not answer is waited for as long as the reader waits out an outage. All of the web is one store: a host that is gone
    is the fault of its images as long as another answers.

    Attributes:
        reader: of any URI.
        max_bytes: larger images are not fetched, where the plan or their store tells the size.
        retries: how often an object that cannot be read is asked for again while its store answers.
    """

    reader: Reader
    max_bytes: int | None = None
    retries: int = 2
    _canaries: dict[str, tuple[str, ...]] = field(default_factory=dict)

    def fetch(
        self, refs: Sequence[ImageRef], on_result: Callable[[], None] = lambda: None
    ) -> list[ObjectData | ErrorRecord]:
        """As many answers as refs, in order; `came` is called, from any thread, as each of them arrives.

        Raises:
            Unavailable: the store cannot be reached.
        """
        faults = [check_file_size(ref.size, self.max_bytes) for ref in refs]
        wanted = [ref for ref, fault in zip(refs, faults, strict=True) if fault is None]
        found = self._read(wanted, on_result)
        answers = iter([_as_planned(ref, answer) for ref, answer in zip(wanted, found, strict=True)])
        return [fault or next(answers) for fault in faults]

    def _read(self, refs: Sequence[ImageRef], came: Callable[[], None]) -> list[_Answer]:
        asked, waits, retries, waited = time.monotonic(), 0, 0, False
        answers = self._asked(refs, False, came)
        while refused := {at: answer for at, answer in enumerate(answers) if isinstance(answer, Unavailable)}:
            if self._in_reach({refs[at].location: error for at, error in refused.items()}, asked):
                if not waited and retries == self.retries:
                    break
                retries += not waited  # what an outage refused says nothing of an image
                wanted, waited = list(refused), False
            else:
                waits, waited = waits + 1, True
                wanted = [list(refused)[waits % len(refused)]]  # one is enough to see that it is over
                self.reader.outage(refs[wanted[0]].location).back_off(waits)
            again = self._asked([refs[at] for at in wanted], not waited, came)
            for at, answer in zip(wanted, again, strict=True):
                answers[at] = answer
        return answers

    def _asked(self, refs: Sequence[ImageRef], stubborn: bool, came: Callable[[], None]) -> list[_Answer]:
        locations = [ref.location for ref in refs]
        answers = self.reader.read_many(locations, stubborn, [ref.etag for ref in refs], self.max_bytes, came)
        for location, answer in zip(locations, answers, strict=True):
            if isinstance(answer, ObjectData):
                self._keep(location)
        return answers

    def _keep(self, location: str) -> None:
        """As a canary: the latest of its host, and on the web beside those of a few others."""
        store, host = _store(location), _host(location)
        others = (at for at in self._canaries.get(store, ()) if _host(at) != host)
        self._canaries[store] = (*others, location)[-_CANARIES:]

    def _in_reach(self, refused: Mapping[str, Unavailable], asked: float) -> bool:
        """Whether all stores of these objects answer now.

        Raises:
            Unavailable: it has not answered for too long.
        """
        for store in dict.fromkeys(map(_store, refused)):
            location, trouble = next((at, error) for at, error in refused.items() if _store(at) == store)
            canaries = [at for at in self._canaries.get(store, ()) if at not in refused]
            seen = self.reader.read_many(canaries, limit=self.max_bytes)
            silent = [answer for answer in seen if isinstance(answer, Unavailable)]
            if len(silent) < len(seen):
                continue
            trouble = silent[-1] if silent else trouble
            if is_local(location):
                raise trouble
            self.reader.outage(location).record_silence(trouble, asked)
            return False
        return True


def check_file_size(size: int | None, limit: int | None) -> ErrorRecord | None:
    """The fault of an image of more bytes than allowed."""
    if size is None or limit is None or size <= limit:
        return None
    return _too_large(size, limit)


def _too_large(size: int, limit: int) -> ErrorRecord:
    return ErrorRecord("fetch", "too_large", f"the file has {size:,} bytes, over decode.max_bytes {limit:,}")


def group_refs(refs: Sequence[ImageRef]) -> Iterator[Sequence[ImageRef]]:
    """Runs of refs that are read at once: as many as `FETCH_BYTES` allow, at least one."""
    start, held = 0, 0
    for index, ref in enumerate(refs):
        held += ref.size or 0
        if held > MAX_FETCH_BYTES and index > start:
            yield refs[start:index]
            start, held = index, ref.size or 0
    if start < len(refs):
        yield refs[start:]


def _as_planned(ref: ImageRef, answer: _Answer) -> ObjectData | ErrorRecord:
    """The answer; a fault where the object is no longer the one that was planned, as far as its tags tell."""
    if isinstance(answer, NotFound) and ref.etag is not None:
        return ErrorRecord(
            "fetch", "deleted", f"{ref.location}: deleted since the plan was made ({ref.etag}, now absent)"
        )
    if isinstance(answer, ObjectData):
        return answer
    if isinstance(answer, ObjectTooLarge):
        return _too_large(answer.size, answer.limit)
    if isinstance(answer, PreconditionFailed):
        return ErrorRecord("fetch", "changed", answer.message.rpartition("; ")[0])
    return _fault(answer, ref.location)


def _fault(error: StorageError | Unavailable, location: str) -> ErrorRecord:
    if isinstance(error, Unavailable):
        said = error.message.partition("; ")[0]
        others = "others on the web" if _is_web(location) else "other objects of the same store"
        return ErrorRecord("fetch", "unreadable", f"{said}; {others} can be read")
    words = ((NotFound, "not_found"), (AddressRefused, "refused"), (UnaddressableKey, "unaddressable"))
    return ErrorRecord(
        "fetch", next((word for kind, word in words if isinstance(error, kind)), "storage"), error.message
    )


def _store(location: str) -> str:
    """What shares its canaries: a bucket, all of the web, and all local disks."""
    return "web" if _is_web(location) else _host(location)


def _host(location: str) -> str:
    """A bucket or host; empty for all local disks."""
    return "" if is_local(location) else "/".join(location.split("/", 3)[:3])


def _is_web(location: str) -> bool:
    return location[:8].lower().startswith(("http://", "https://"))
