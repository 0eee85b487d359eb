"""Fetches the objects of a batch, and tells the fault of one object from the fault of its store."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field

from batchjob.errors import (
    AddressRefused,
    NotFound,
    ObjectTooLarge,
    PreconditionFailed,
    StorageError,
    UnaddressableKey,
    Unavailable,
)
from batchjob.storage.http_access import is_http_uri
from batchjob.storage.objects import ObjectData
from batchjob.storage.reader import Reader, host_name, store_name
from batchjob.types import ErrorRecord, ImageRef
from batchjob.uris import is_local

__all__ = ["Fetcher", "check_file_size", "group_refs"]

MAX_FETCH_BYTES = 128 * 1024 * 1024  # encoded bytes that a loader process holds at the same time, where sizes are known

_MAX_CANARIES = 4  # of the web, each from another host

_Answer = ObjectData | StorageError | Unavailable


@dataclass(frozen=True)
class Fetcher:
    """Concurrent reader of images that finds out whether an image or its store is at fault.

    An unreadable object is the image's fault only if a canary can be read at the same time: an object of the same
    store that this process has read before. Otherwise the store or its credentials are at fault. A store that does
    not answer is waited for, up to the reader's outage timeout. The whole web counts as one store: a host that is gone
    is the fault of its images as long as another host answers.

    Attributes:
        reader: Reader of any URI.
        max_bytes: Images known to be larger, in bytes, are not fetched; None for no limit.
        retries: Further reads of an object that cannot be read while its store answers.
    """

    reader: Reader
    max_bytes: int | None = None
    retries: int = 2
    _canaries: dict[str, tuple[str, ...]] = field(default_factory=dict)  # store → locations, the latest last

    def fetch(
        self, refs: Sequence[ImageRef], on_result: Callable[[], None] = lambda: None
    ) -> list[ObjectData | ErrorRecord]:
        """Read objects concurrently.

        Args:
            refs: Images to read.
            on_result: Called from any thread as each answer arrives.

        Returns:
            Bytes or error of each ref, in order.

        Raises:
            Unavailable: A store cannot be reached.
        """
        errors = [check_file_size(ref.size, self.max_bytes) for ref in refs]
        to_read = [ref for ref, error in zip(refs, errors, strict=True) if error is None]
        answers = self._read_with_retries(to_read, on_result)
        results = iter([_convert_answer(ref, answer) for ref, answer in zip(to_read, answers, strict=True)])
        return [error or next(results) for error in errors]

    def _read_with_retries(self, refs: Sequence[ImageRef], on_result: Callable[[], None]) -> list[_Answer]:
        """Read objects again while some get no answer, as often as `retries` allows beyond outages."""
        started, pauses, retries, after_pause = time.monotonic(), 0, 0, False
        answers = self._read_once(refs, False, on_result)
        while unanswered := {at: answer for at, answer in enumerate(answers) if isinstance(answer, Unavailable)}:
            if self._stores_answer({refs[at].location: error for at, error in unanswered.items()}, started):
                if not after_pause and retries == self.retries:
                    break
                # A read that failed during an outage says nothing about the image, so it uses up no retry.
                retries += not after_pause
                again, after_pause = list(unanswered), False
            else:
                # One object at a time is enough to see that the outage is over.
                pauses, after_pause = pauses + 1, True
                again = [list(unanswered)[pauses % len(unanswered)]]
                self.reader.outage(refs[again[0]].location).back_off(pauses)
            new_answers = self._read_once([refs[at] for at in again], not after_pause, on_result)
            for at, answer in zip(again, new_answers, strict=True):
                answers[at] = answer
        return answers

    def _read_once(self, refs: Sequence[ImageRef], retry_each: bool, on_result: Callable[[], None]) -> list[_Answer]:
        locations = [ref.location for ref in refs]
        answers = self.reader.read_many(locations, retry_each, [ref.etag for ref in refs], self.max_bytes, on_result)
        for location, answer in zip(locations, answers, strict=True):
            if isinstance(answer, ObjectData):
                self._keep_canary(location)
        return answers

    def _keep_canary(self, location: str) -> None:
        """Keep the latest object of each host: one for a bucket, `_MAX_CANARIES` for the web."""
        store, host = store_name(location), host_name(location)
        others = (other for other in self._canaries.get(store, ()) if host_name(other) != host)
        self._canaries[store] = (*others, location)[-_MAX_CANARIES:]

    def _stores_answer(self, unanswered: Mapping[str, Unavailable], started: float) -> bool:
        """Read canaries of all stores of these locations; return True if every store answers now.

        Raises:
            Unavailable: A store has not answered for too long.
        """
        for store in dict.fromkeys(map(store_name, unanswered)):
            location, error = next((at, error) for at, error in unanswered.items() if store_name(at) == store)
            canaries = [canary for canary in self._canaries.get(store, ()) if canary not in unanswered]
            answers = self.reader.read_many(canaries, limit=self.max_bytes)
            failures = [answer for answer in answers if isinstance(answer, Unavailable)]
            if len(failures) < len(answers):
                continue
            error = failures[-1] if failures else error
            if is_local(location):
                raise error
            self.reader.outage(location).record_silence(error, started)
            return False
        return True


def check_file_size(size: int | None, limit: int | None) -> ErrorRecord | None:
    """Return the error of a file with more bytes than allowed; None of all others."""
    if size is None or limit is None or size <= limit:
        return None
    return _too_large_error(size, limit)


def group_refs(refs: Sequence[ImageRef]) -> Iterator[Sequence[ImageRef]]:
    """Group refs that are read together: at most `MAX_FETCH_BYTES` a group, but at least one ref.

    Example: with a limit of 10 bytes, sizes 4, 6, 1, 20, 3 give the groups [4, 6], [1], [20], [3].
    """
    start, group_bytes = 0, 0
    for index, ref in enumerate(refs):
        group_bytes += ref.size or 0
        if group_bytes > MAX_FETCH_BYTES and index > start:
            yield refs[start:index]
            start, group_bytes = index, ref.size or 0
    if start < len(refs):
        yield refs[start:]


def _convert_answer(ref: ImageRef, answer: _Answer) -> ObjectData | ErrorRecord:
    """Convert a store's answer to bytes or error; an object that has changed since the plan is an error."""
    if isinstance(answer, ObjectData):
        return answer
    if isinstance(answer, NotFound) and ref.etag is not None:
        message = f"{ref.location}: deleted since the plan was made ({ref.etag}, now absent)"
        return ErrorRecord("fetch", "deleted", message)
    if isinstance(answer, ObjectTooLarge):
        return _too_large_error(answer.size, answer.limit)
    if isinstance(answer, PreconditionFailed):
        return ErrorRecord("fetch", "changed", answer.message.rpartition("; ")[0])
    if isinstance(answer, Unavailable):
        problem = answer.message.partition("; ")[0]
        others = "others on the web" if is_http_uri(ref.location) else "other objects of the same store"
        return ErrorRecord("fetch", "unreadable", f"{problem}; {others} can be read")
    types = ((NotFound, "not_found"), (AddressRefused, "refused"), (UnaddressableKey, "unaddressable"))
    error_type = next((name for kind, name in types if isinstance(answer, kind)), "storage")
    # A space around a value of a table is seen by nobody.
    is_padded = error_type == "not_found" and ref.uri != ref.uri.strip()
    return ErrorRecord("fetch", error_type, answer.message + ("; a space begins or ends its name" if is_padded else ""))


def _too_large_error(size: int, limit: int) -> ErrorRecord:
    return ErrorRecord("fetch", "too_large", f"the file has {size:,} bytes, over decode.max_bytes {limit:,}")
