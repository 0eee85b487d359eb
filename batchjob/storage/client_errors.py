"""Errors of the storage clients (obstore, boto3, fsspec, urllib3), translated into batchjob's own."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from contextlib import contextmanager

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
from batchjob.storage.archives import is_archive_fault

__all__ = ["check_etag", "check_size", "error_code", "error_status", "translate_errors", "treat_416_as_empty"]

# obstore has no status attribute: status and code stand in its message, the latter as XML of the answer's body.
_STATUS = re.compile(r"status code: (\d{3})")
_CODE = re.compile(r"<Code>([^<]*)</Code>")
_MESSAGE = re.compile(r"<Message>([^<]*)</Message>")
_CREDENTIALS = re.compile(
    r"AccessDenied|ExpiredToken|InvalidAccessKeyId|InvalidToken|SignatureDoesNotMatch|RequestTimeTooSkewed"
    r"|TokenRefreshRequired|AuthFailure|AuthenticationFailed|Credential|SSO|TokenRetrieval|RefreshError|ProfileNotFound"
)
_WRONG_REGION = re.compile(r"PermanentRedirect|AuthorizationHeaderMalformed|IllegalLocationConstraint")


@contextmanager
def translate_errors(
    uri: str, *, writing: bool = False, unaddressable_on_400: bool = False, reraise: type[Exception] | None = None
) -> Iterator[None]:
    """Raise each error of a storage client as one of batchjob's own.

    Args:
        uri: URI that messages name.
        writing: True for a PUT: a bucket that does not exist is then an error of the job.
        unaddressable_on_400: True if the store may answer 400 because it cannot name the key; otherwise a bare 400
            means expired credentials.
        reraise: Exception class that passes through unchanged.

    Raises:
        StorageError: The store's definite answer: NotFound, AlreadyExists, PreconditionFailed, UnaddressableKey.
        Unavailable: No definite answer; AccessDenied if credentials are missing, expired or refused.
        InvalidJob: A bucket that does not exist or lies in another region.
    """
    try:
        yield
    except (BatchjobError, ImportError, TypeError, AttributeError, NameError, AssertionError):
        raise
    except Exception as error:
        if reraise is not None and isinstance(error, reraise):
            raise
        raise _translate(error, uri, writing, unaddressable_on_400) from error


def _translate(error: Exception, uri: str, writing: bool, unaddressable_on_400: bool) -> BatchjobError:
    classes = {kind.__name__ for kind in type(error).__mro__}
    status, code, reason = error_status(error), error_code(error), _summarize(error)
    if code == "NoSuchBucket" and (writing or uri.endswith("/")):
        return InvalidJob(f"{uri}: no such bucket; check the name and the endpoint")
    if _WRONG_REGION.search(code) or "redirect without LOCATION" in str(error):
        return InvalidJob(f"{uri}: the bucket lies in another region ({reason}); set AWS_REGION or the storage region")
    # An answer to HEAD has no body: there, expired credentials are a bare 400.
    bare_400 = status == 400 and (code == "400" or not (code or unaddressable_on_400))
    refused = status in (401, 403) or _CREDENTIALS.search(f"{code} {' '.join(classes)}")
    if bare_400 or refused or "PermissionError" in classes:
        return AccessDenied(f"{uri}: access denied ({reason}); renew or correct the credentials, then run again")
    if isinstance(error, OSError) and error.errno is None and "Unable to load lib" in reason:
        # Arrow's HDFS client without Java or Hadoop: no later try finds them.
        return InvalidJob(f"{uri}: this machine lacks a library of its client ({reason}); install it")
    if is_archive_fault(error, uri):
        return UnaddressableKey(f"{uri}: the archive cannot be read ({reason})")
    invalid_key = classes & {"InvalidPathError", "ValueError", "ParamValidationError"}
    if invalid_key or (unaddressable_on_400 and status == 400):
        return UnaddressableKey(f"{uri}: no client can name this key ({reason})")
    if code == "KeyTooLongError" or "NotImplementedError" in classes:
        return UnaddressableKey(f"{uri}: the store cannot do this ({reason})")
    unavailable = Unavailable(
        f"{uri}: the store does not answer ({reason}); check network and endpoint, then run again"
    )
    return _definite_answer(classes, status, uri, reason) or unavailable


def _definite_answer(classes: set[str], status: int, uri: str, reason: str) -> StorageError | None:
    if classes & {"FileNotFoundError", "IsADirectoryError", "NotADirectoryError"} or status in (404, 410):
        return NotFound(f"{uri}: not there ({reason})")
    if "AlreadyExistsError" in classes:
        return AlreadyExists(f"{uri}: already there, or being written ({reason})")
    if "PreconditionError" in classes:
        return PreconditionFailed(f"{uri}: replaced by another writer ({reason})")
    return None


def error_status(error: BaseException) -> int:
    """Return the HTTP status that a client's error carries; 0 if it has none."""
    response = getattr(error, "response", None)
    if isinstance(response, dict):
        return int(response.get("ResponseMetadata", {}).get("HTTPStatusCode", 0))
    for name in ("status", "status_code", "code"):
        if isinstance(found := getattr(error, name, None), int):
            return found
    match = _STATUS.search(str(error))
    return int(match[1]) if match else 0


def error_code(error: BaseException) -> str:
    """Return the S3 error code, such as `SlowDown`, that a client's error carries; empty if it has none."""
    response = getattr(error, "response", None)
    if isinstance(response, dict):
        return str(response.get("Error", {}).get("Code", ""))
    match = _CODE.search(str(error))
    return match[1] if match else ""


def _summarize(error: Exception) -> str:
    # Neither the client's debug text, nor a signature that the server echoes, belongs in a message.
    text = str(error)
    if code := error_code(error):
        message = _MESSAGE.search(text)
        return f"{code}: {message[1]}" if message else code
    first_line = text.strip().partition("\n")[0].rpartition(" - ")[2].removesuffix(": ")
    return f"{type(error).__name__}: {first_line}"[:300] if first_line else type(error).__name__


def treat_416_as_empty(request: Callable[[], bytes]) -> bytes:
    """Send a range request; return no bytes for 416, the answer about an object of size 0."""
    try:
        return request()
    except Exception as error:
        if error_status(error) == 416:
            return b""
        raise


def check_etag(expected: str | None, found: str | None, uri: str) -> None:
    """Raise PreconditionFailed if both tags are known and differ."""
    if expected is not None and found is not None and expected != found:
        raise PreconditionFailed(
            f"{uri}: changed since the plan was made ({expected}, now {found}); "
            "run the job on a new output to plan it anew"
        )


def check_size(limit: int | None, size: int, uri: str) -> None:
    """Raise ObjectTooLarge if an object has more bytes than the limit; None has no limit."""
    if limit is not None and size > limit:
        raise ObjectTooLarge(uri, size, limit)
