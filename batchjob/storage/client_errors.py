"""What storage clients raise, in our words; and how long they are asked again."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TypeVar

from batchjob.errors import (
    AccessDenied,
    AlreadyExists,
    BatchjobError,
    InvalidJob,
    NotFound,
    ObjectTooLarge,
    PreconditionFailed,
    StorageError,
    UnaddressableKey,
    Unavailable,
)

__all__ = ["check_etag", "check_size", "read_timeout", "retry_transient", "translate_errors", "treat_416_as_empty"]

T = TypeVar("T")
_STATUS = re.compile(r"status code: (\d{3})")
_CODE = re.compile(r"<Code>([^<]*)</Code>")
_MESSAGE = re.compile(r"<Message>([^<]*)</Message>")
_CREDENTIALS = re.compile(
    r"AccessDenied|ExpiredToken|InvalidAccessKeyId|InvalidToken|SignatureDoesNotMatch|RequestTimeTooSkewed"
    r"|TokenRefreshRequired|AuthFailure|AuthenticationFailed|Credential|SSO|TokenRetrieval|RefreshError|ProfileNotFound"
)
_THROTTLED = re.compile(r"SlowDown|Throttl|RequestTimeout|InternalError|ServiceUnavailable")
_WRONG_REGION = re.compile(r"PermanentRedirect|AuthorizationHeaderMalformed|IllegalLocationConstraint")
_LOST = {"HTTPClientError", "ClientConnectionError", "ClientPayloadError", "ServiceRequestError", "TimeoutError"}


def retry_transient(retry_timeout: float, request: Callable[[], T]) -> T:
    from tenacity import Retrying, retry_if_exception, stop_after_delay, wait_random_exponential

    attempts = Retrying(
        retry=retry_if_exception(_is_transient),
        stop=stop_after_delay(retry_timeout),
        wait=wait_random_exponential(multiplier=0.1, max=5),
        reraise=True,
    )
    return attempts(request)


def _is_transient(error: BaseException) -> bool:
    status, code = _status(error), _code(error)
    if status or code:
        return status >= 500 or status in (408, 429) or bool(_THROTTLED.search(code))
    if isinstance(error, FileNotFoundError | PermissionError | IsADirectoryError | NotADirectoryError):
        return False
    return isinstance(error, OSError) or any(kind.__name__ in _LOST for kind in type(error).__mro__)


@contextmanager
def translate_errors(
    uri: str, *, writing: bool = False, unaddressable_on_400: bool = False, reraise: type[Exception] | None = None
) -> Iterator[None]:
    """Turns what any client raises into ours."""
    try:
        yield
    except (BatchjobError, ImportError, TypeError, AttributeError, NameError, AssertionError):
        raise
    except Exception as error:
        if reraise is not None and isinstance(error, reraise):
            raise
        raise _fault(error, uri, writing, unaddressable_on_400) from error


def _fault(error: Exception, uri: str, writing: bool, odd_key: bool) -> BatchjobError:
    kinds = {kind.__name__ for kind in type(error).__mro__}
    status, code, reason = _status(error), _code(error), _reason(error)
    if code == "NoSuchBucket" and (writing or uri.endswith("/")):
        return InvalidJob(f"{uri}: no such bucket; check the name and the endpoint")
    if _WRONG_REGION.search(code) or "redirect without LOCATION" in str(error):
        return InvalidJob(f"{uri}: the bucket lies in another region ({reason}); set AWS_REGION or the storage region")
    # An answer to HEAD has no body: expired credentials are a bare 400 there.
    bare = status == 400 and (code == "400" or not (code or odd_key))
    if bare or status in (401, 403) or _CREDENTIALS.search(f"{code} {' '.join(kinds)}") or "PermissionError" in kinds:
        return AccessDenied(f"{uri}: access denied ({reason}); renew or correct the credentials, then run again")
    if kinds & {"InvalidPathError", "ValueError", "ParamValidationError"} or (odd_key and status == 400):
        return UnaddressableKey(f"{uri}: no client can name this key ({reason})")
    if code == "KeyTooLongError" or "NotImplementedError" in kinds:
        return UnaddressableKey(f"{uri}: the store cannot do this ({reason})")
    lost = Unavailable(f"{uri}: the store does not answer ({reason}); check network and endpoint, then run again")
    return _definite(kinds, status, uri, reason) or lost


def _definite(kinds: set[str], status: int, uri: str, reason: str) -> StorageError | None:
    if kinds & {"FileNotFoundError", "IsADirectoryError", "NotADirectoryError"} or status in (404, 410):
        return NotFound(f"{uri}: not there ({reason})")
    if "AlreadyExistsError" in kinds:
        return AlreadyExists(f"{uri}: already there, or being written ({reason})")
    if "PreconditionError" in kinds:
        return PreconditionFailed(f"{uri}: replaced by another writer ({reason})")
    return None


def _status(error: BaseException) -> int:
    response = getattr(error, "response", None)
    if isinstance(response, dict):
        return int(response.get("ResponseMetadata", {}).get("HTTPStatusCode", 0))
    for name in ("status", "status_code", "code"):
        if isinstance(found := getattr(error, name, None), int):
            return found
    match = _STATUS.search(str(error))
    return int(match[1]) if match else 0


def _code(error: BaseException) -> str:
    response = getattr(error, "response", None)
    if isinstance(response, dict):
        return str(response.get("Error", {}).get("Code", ""))
    match = _CODE.search(str(error))
    return match[1] if match else ""


def _reason(error: Exception) -> str:
    """What a person wants of a client's message: neither its debug text, nor a signature that the server echoes."""
    text = str(error)
    if code := _code(error):
        message = _MESSAGE.search(text)
        return f"{code}: {message[1]}" if message else code
    first = text.strip().partition("\n")[0].rpartition(" - ")[2].removesuffix(": ")
    return f"{type(error).__name__}: {first}"[:300] if first else type(error).__name__


def treat_416_as_empty(request: Callable[[], bytes]) -> bytes:
    """An object of no bytes has no range."""
    try:
        return request()
    except Exception as error:
        if _status(error) == 416:
            return b""
        raise


def check_etag(expected: str | None, found: str | None, uri: str) -> None:
    if expected is not None and found is not None and expected != found:
        said = f"{uri}: changed since the plan was made ({expected}, now {found})"
        raise PreconditionFailed(f"{said}; run the job on a new output to plan it anew")


def check_size(limit: int | None, size: int, uri: str) -> None:
    if limit is not None and size > limit:
        raise ObjectTooLarge(uri, size, limit)


def read_timeout(retry_timeout: float) -> float:
    """Seconds without a byte after which a connection is given up."""
    return max(5.0, min(20.0, retry_timeout))
