"""A store that does not answer at all: how long it is waited for, by all who ask it in this process together."""

from __future__ import annotations

import logging
import random
import time
from collections.abc import Callable
from itertools import count
from typing import TypeVar

from batchjob.errors import AccessDenied, StorageError, Unavailable

__all__ = ["Outage", "upload_timeout"]

T = TypeVar("T")
_log = logging.getLogger(__name__)
_PAUSE_SECONDS = 5.0  # at most, between two questions, most of which the client itself retries for a while
_SILENT_SECONDS = 10.0  # after which people are told


def upload_timeout(size: int) -> int:
    """What an upload of so many bytes is given: a minute, and a second for each MiB, in steps that double."""
    return 60 * (1 << (size // (60 << 20)).bit_length())


class Outage:
    """The silence of one store, as it is met from here. Threads may share one; it may be pickled.

    Args:
        seconds: that it may last; with 0 everything is asked once.
        clock: for tests, as is `sleep`.
    """

    def __init__(
        self,
        max_seconds: float,
        clock: Callable[[], float] = time.monotonic,
        sleep: Callable[[float], None] = time.sleep,
    ) -> None:
        self._seconds, self.clock, self._sleep = max_seconds, clock, sleep
        self._since: float | None = None
        self._told = False

    @property
    def max_seconds(self) -> float:
        """That it may last."""
        return self._seconds

    @property
    def timed_out(self) -> bool:
        """Whether the store has been silent for as long as it may: one more question should not take long."""
        since = self._since
        return since is not None and self.clock() - since >= self._seconds

    @property
    def is_ongoing(self) -> bool:
        """Whether the last that was heard of the store is that it does not answer."""
        return self._since is not None

    def record_answer(self) -> None:
        """The store has answered, be it that something is not there."""
        self._since, self._told = None, False

    def record_silence(self, error: Unavailable, waiting_since: float) -> None:
        """The store has not answered somebody who asks since `asked`.

        Raises:
            Unavailable: this has lasted too long, for the store or for this question alone; Denied at once.
        """
        if isinstance(error, AccessDenied):
            raise error
        since = self._since  # once: another thread may hear an answer meanwhile
        self._since = since = waiting_since if since is None else since
        lasted = self.clock() - min(since, waiting_since)
        if lasted >= self._seconds:
            raise _lasting(error, lasted) if lasted >= _SILENT_SECONDS else error
        if lasted >= _SILENT_SECONDS and not self._told:
            self._told = True
            _log.warning("%s; it is asked again for up to %.0f s", error.message.partition("; ")[0], self._seconds)

    def back_off(self, attempts: int) -> None:
        """Wait a little after so many questions in vain, nobody as long as the other."""
        self._sleep(random.uniform(0.0, min(_PAUSE_SECONDS, 0.1 * 2 ** min(attempts, 10))))

    def retry_until_answered(self, request: Callable[[], T]) -> T:
        """What the store answers at last. Raises what it answers, and as `endured`."""
        asked = self.clock()
        for tries in count(1):
            try:
                answer = request()
            except StorageError:
                self.record_answer()
                raise
            except Unavailable as error:
                self.record_silence(error, asked)
                self.back_off(tries)
            else:
                self.record_answer()
                return answer
        raise AssertionError("it is asked for ever, or until it raises")


def _lasting(error: Unavailable, seconds: float) -> Unavailable:
    """The same fault, with how long it has lasted."""
    what, _, advice = error.message.partition("; ")
    return Unavailable(f"{what}, for {seconds:.0f} s now; {advice}")
