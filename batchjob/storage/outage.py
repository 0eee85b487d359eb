"""Outages: how long to wait for a store that does not answer, for all requests of this process together."""

from __future__ import annotations

import logging
import random
import time
from collections.abc import Callable
from itertools import count
from typing import TypeVar

from batchjob.errors import AccessDenied, StorageError, Unavailable

__all__ = ["Outage"]

T = TypeVar("T")
_log = logging.getLogger(__name__)
_MAX_BACKOFF = 5.0  # seconds; short, because most requests have already been retried for a while
_WARN_AFTER = 10.0  # seconds of silence before the user is told


class Outage:
    """State of one store: answering, or silent since some time. Threads may share one; it may be pickled.

    For example, with `max_seconds=60`, thread A gets no answer at t=0 and B none at t=50: both retry until t=60, when
    each raises Unavailable. Any answer, also NotFound, ends the outage.

    Args:
        max_seconds: Seconds that an outage may last; 0 sends every request once.
        clock: Clock in seconds; replaced in tests, like `sleep`.
        sleep: Waits for a number of seconds.

    Attributes:
        max_seconds: Seconds that an outage may last.
        clock: Clock in seconds.
    """

    def __init__(
        self,
        max_seconds: float,
        clock: Callable[[], float] = time.monotonic,
        sleep: Callable[[float], None] = time.sleep,
    ) -> None:
        self.max_seconds, self.clock, self._sleep = max_seconds, clock, sleep
        self._since: float | None = None
        self._warned = False

    @property
    def timed_out(self) -> bool:
        """True if the store has been silent for `max_seconds`: another request should not take long."""
        since = self._since
        return since is not None and self.clock() - since >= self.max_seconds

    @property
    def is_ongoing(self) -> bool:
        """True if the last request was not answered."""
        return self._since is not None

    def record_answer(self) -> None:
        """End the outage: the store has answered, possibly with an error of its own."""
        self._since, self._warned = None, False

    def record_silence(self, error: Unavailable, waiting_since: float) -> None:
        """Begin or continue the outage: a request was not answered.

        Args:
            error: Error of the request.
            waiting_since: Time by `clock` when the request was sent for the first time.

        Raises:
            Unavailable: The store has been silent, or this request has waited, for `max_seconds`. AccessDenied is
                raised at once.
        """
        if isinstance(error, AccessDenied):
            raise error
        # Read once: another thread may record an answer meanwhile.
        since = self._since
        self._since = since = waiting_since if since is None else since
        seconds = self.clock() - min(since, waiting_since)
        if seconds >= self.max_seconds:
            raise _with_duration(error, seconds) if seconds >= _WARN_AFTER else error
        if seconds >= _WARN_AFTER and not self._warned:
            self._warned = True
            _log.warning("%s; it is asked again for up to %.0f s", error.message.partition("; ")[0], self.max_seconds)

    def back_off(self, attempts: int) -> None:
        """Sleep for a random time, up to 5 s, that grows with the number of attempts."""
        self._sleep(random.uniform(0.0, min(_MAX_BACKOFF, 0.1 * 2 ** min(attempts, 10))))

    def retry_until_answered(self, request: Callable[[], T]) -> T:
        """Send a request until the store answers. Raises its StorageError, or Unavailable as `record_silence` does."""
        waiting_since = self.clock()
        for attempts in count(1):
            try:
                answer = request()
            except StorageError:
                self.record_answer()
                raise
            except Unavailable as error:
                self.record_silence(error, waiting_since)
                self.back_off(attempts)
            else:
                self.record_answer()
                return answer
        raise AssertionError("the loop ends with an answer or an error")


def _with_duration(error: Unavailable, seconds: float) -> Unavailable:
    """Return the same error with the duration of the outage in its message."""
    problem, _, advice = error.message.partition("; ")
    return Unavailable(f"{problem}, for {seconds:.0f} s now; {advice}")
