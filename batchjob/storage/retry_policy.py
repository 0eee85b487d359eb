"""Retries, back-off and timeouts of storage requests, and the list of layers above that retry.

| layer | policy | retries | gives up after |
|---|---|---|---|
| request | `RetryPolicy`, this file | 408, 429, 5xx, broken connections | `retry_timeout`, 30 s (`BATCHJOB_PATIENCE`) |
| store | `Outage`, outage.py | a store that does not answer, for all requests together | `errors.outage_seconds` |
| image | `Fetcher`, loader/fetch.py | an unreadable image while a canary is readable | two retries |
| shard | `Scheduler`, driver/scheduler.py | failed attempts | `errors.attempts` |
"""

from __future__ import annotations

import os
from collections.abc import Callable
from dataclasses import dataclass
from typing import TypeVar

from batchjob.errors import BatchjobError
from batchjob.storage.client_errors import error_code, error_status, translate_errors
from batchjob.storage.outage import Outage

__all__ = ["CONNECT_TIMEOUT", "FIRST_BACKOFF", "MAX_BACKOFF", "RetryPolicy", "resolve_retry_timeout", "upload_timeout"]

T = TypeVar("T")

CONNECT_TIMEOUT = 5.0  # seconds
FIRST_BACKOFF = 0.1  # seconds between the first two tries of a request; doubled after each try
MAX_BACKOFF = 5.0  # seconds between two tries of a request, at most
_MIN_READ_TIMEOUT, _MAX_READ_TIMEOUT = 5.0, 20.0  # seconds
_RETRIED_STATUS = {408, 429}
_RETRIED_CODES = ("SlowDown", "Throttl", "RequestTimeout", "InternalError", "ServiceUnavailable")
# Names of exception classes, because the clients that raise them may not be installed.
_CONNECTION_ERRORS = {
    *("HTTPClientError", "ClientConnectionError", "ClientPayloadError", "ServiceRequestError", "TimeoutError"),
}


@dataclass(frozen=True)
class RetryPolicy:
    """Retries of one request, then of one store.

    Attributes:
        retry_timeout: Seconds during which the transient errors of one request are retried; 0 sends it once.
        outage: State of the store's outage, shared by all requests to this store.
    """

    retry_timeout: float
    outage: Outage

    @property
    def read_timeout(self) -> float:
        """Seconds without a byte after which a connection is given up: 5 to 20."""
        return max(_MIN_READ_TIMEOUT, min(_MAX_READ_TIMEOUT, self.retry_timeout))

    def send(
        self,
        uri: str,
        request: Callable[[], T],
        *,
        client_retries: bool = False,
        writing: bool = False,
        unaddressable_on_400: bool = False,
        reraise: type[Exception] | None = None,
    ) -> T:
        """Send a request under both layers and return its answer.

        Args:
            uri: URI that error messages name.
            request: Sends the request once.
            client_retries: True if the client retries transient errors by itself, as obstore does with the same limits.
            writing, unaddressable_on_400, reraise: See `translate_errors`.

        Raises:
            StorageError: The store's definite answer.
            Unavailable: The store did not answer in time; AccessDenied at once.
            InvalidJob: See `translate_errors`.
        """

        def send_until_definite() -> T:
            with translate_errors(uri, writing=writing, unaddressable_on_400=unaddressable_on_400, reraise=reraise):
                return request() if client_retries else self._retry_transient(request)

        return self.outage.retry_until_answered(send_until_definite)

    def _retry_transient(self, request: Callable[[], T]) -> T:
        from tenacity import Retrying, retry_if_exception, stop_after_delay, wait_random_exponential

        attempts = Retrying(
            retry=retry_if_exception(_is_transient),
            stop=stop_after_delay(self.retry_timeout),
            wait=wait_random_exponential(multiplier=FIRST_BACKOFF, max=MAX_BACKOFF),
            reraise=True,
        )
        return attempts(request)


def _is_transient(error: BaseException) -> bool:
    if isinstance(error, BatchjobError):
        return False
    status, code = error_status(error), error_code(error)
    if status or code:
        return status >= 500 or status in _RETRIED_STATUS or any(word in code for word in _RETRIED_CODES)
    if isinstance(error, FileNotFoundError | PermissionError | IsADirectoryError | NotADirectoryError):
        return False
    return isinstance(error, OSError) or any(kind.__name__ in _CONNECTION_ERRORS for kind in type(error).__mro__)


def resolve_retry_timeout(retry_timeout: float | None, outage_timeout: float) -> float:
    """Return the seconds for which one request is retried.

    Args:
        retry_timeout: Seconds as the caller wants them; None takes `BATCHJOB_PATIENCE`, or 30.
        outage_timeout: Seconds for which an outage is waited out; if not 0, one request never takes longer.
    """
    seconds = float(os.environ.get("BATCHJOB_PATIENCE", "30")) if retry_timeout is None else retry_timeout
    return min(seconds, outage_timeout) if outage_timeout else seconds


def upload_timeout(size: int) -> int:
    """Return the seconds that an upload may take: 60, doubled until they allow a second per MiB.

    For example, 10 MiB get 60 s, 60 MiB get 120 s and 500 MiB get 960 s. The steps keep the number of clients small,
    because a client has one timeout.
    """
    return 60 * (1 << (size // (60 << 20)).bit_length())
