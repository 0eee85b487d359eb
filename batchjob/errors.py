"""Exceptions and their exit codes, ordered by scope: one image, one attempt, one worker, the whole job.

```
BatchjobError                  exit 1   not classified further
├── ImageError                    –     one image: it becomes an error row, the job goes on
├── StorageError                        answer of a store; the caller decides what it ends
│   ├── AddressRefused                  an address that this job may not read from
│   ├── NotFound                        the object does not exist
│   ├── AlreadyExists                   create-if-absent found an object
│   ├── PreconditionFailed              replace-if-match found another version
│   ├── ObjectTooLarge                  more bytes than the caller accepts
│   └── UnaddressableKey                no client can name this key
├── AttemptFailed              exit 4   one attempt at a shard: tried again, a bounded number of times
│   └── AttemptInterrupted              ended by the fault of another shard: uses up no attempt
└── JobError                            the whole job
    ├── InvalidJob             exit 2   usage, configuration, or the plan of another job: never retry
    ├── CheckFailed            exit 3   error budget, foreign or missing parts: needs a look
    ├── Incomplete             exit 4   shards gave up: run again, it resumes
    └── Temporary              exit 75  input not there yet, another driver, store or cluster lost: retry
        ├── Unavailable                 network or throttling, after all retries of the storage layer
        │   └── AccessDenied            credentials: waiting does not help
        └── WorkerLost                  the process of a worker is unusable; the pool replaces it if it can
            ├── DeviceFault             a device failed, or the context of this process on it is broken
            └── WorkerStalled           a step of the worker makes no progress
```

Each message is one sentence: what is wrong, where, and what to type next. Exceptions can be pickled, because they cross
processes and machines, and hold no secrets (`text.sanitize`).
"""

from __future__ import annotations

import os
import re
import traceback
import warnings

from batchjob.text import sanitize

__all__ = [
    "DEBUG_VARIABLE",
    "AccessDenied",
    "AddressRefused",
    "AlreadyExists",
    "AttemptFailed",
    "AttemptInterrupted",
    "BatchjobError",
    "CheckFailed",
    "DeviceFault",
    "ImageError",
    "Incomplete",
    "InvalidJob",
    "JobError",
    "NotFound",
    "ObjectTooLarge",
    "PreconditionFailed",
    "StorageError",
    "Temporary",
    "UnaddressableKey",
    "Unavailable",
    "WorkerLost",
    "WorkerStalled",
    "as_batchjob_error",
    "as_crash_error",
    "describe_error",
    "extract_cause",
    "is_out_of_memory",
    "with_traceback",
]

# Environment variable that `batchjob --debug` sets: tracebacks are shown where one sentence would do.
DEBUG_VARIABLE = "BATCHJOB_DEBUG"
_OUT_OF_MEMORY = re.compile(r"out of memory|not enough memory|can't allocate memory|ALLOC_FAILED", re.IGNORECASE)
# Start of an exception's text that holds the traceback of TorchScript's interpreter.
_TORCHSCRIPT = "in the TorchScript interpreter"
_MAX_TEXT = 500


class BatchjobError(Exception):
    """Base of all exceptions that this package raises on purpose.

    Attributes:
        exit_code: Exit code of the command line, if it ends the job.
        status: Status in the report, if it ends the job.
        counts: Images planned, rows predicted and rows failed at that time, if it ends a run.
    """

    exit_code = 1
    status = "crashed"
    counts: tuple[int, int, int] = (0, 0, 0)

    def __init__(self, *args: object) -> None:
        super().__init__(*(sanitize(part) if isinstance(part, str) else part for part in args))

    @property
    def message(self) -> str:
        """Sentence for people."""
        return str(self.args[0]) if self.args else type(self).__name__


class ImageError(BatchjobError):
    """Fault of one image only: absent, changed, undecodable or unpredictable.

    Args:
        stage: Stage that failed: `fetch`, `decode`, `transform` or `predict`.
        type: Short, stable word to group by, such as `not_found` or `truncated`.
        message: One sentence for people.
    """

    def __init__(self, stage: str, type: str, message: str) -> None:
        super().__init__(stage, type, message)
        self.stage, self.type = stage, type

    @property
    def message(self) -> str:
        """Sentence for people."""
        return str(self.args[2])


class StorageError(BatchjobError):
    """Definite answer of a store about one object."""


class AddressRefused(StorageError):
    """Address on the web that this job may not read from, or an answer beyond its limits."""


class NotFound(StorageError):
    """The object does not exist."""


class AlreadyExists(StorageError):
    """Create-if-absent found an object.

    It must be read before it is believed: an earlier answer to the same PUT may have been lost.
    """


class PreconditionFailed(StorageError):
    """Replace-if-match found another version, or no object."""


class ObjectTooLarge(StorageError):
    """Object with more bytes than the caller accepts; it was not read.

    Args:
        uri: URI of the object.
        size: Size of the object in bytes.
        limit: Largest size that the caller accepts, in bytes.
    """

    def __init__(self, uri: str, size: int, limit: int) -> None:
        super().__init__(uri, size, limit)
        self.size, self.limit = size, limit

    @property
    def message(self) -> str:
        """Sentence for people."""
        uri, size, limit = self.args
        return f"{uri}: has {size:,} bytes, over the limit of {limit:,}"


class UnaddressableKey(StorageError):
    """Key that no client can name, for example with `..` segments or NUL."""


class AttemptFailed(BatchjobError):
    """One attempt at a shard failed; another one may succeed."""

    exit_code = 4
    status = "incomplete"


class AttemptInterrupted(AttemptFailed):
    """Attempt that ended with its worker or its loader, while another shard was being processed there."""


class JobError(BatchjobError):
    """Exception that ends the job."""


class InvalidJob(JobError):
    """Wrong usage or configuration, reported before the first image is read; a retry cannot help."""

    exit_code = 2
    status = "invalid"


class CheckFailed(JobError):
    """Failed check of a job that ran, or of its output."""

    exit_code = 3
    status = "over_budget"


class Incomplete(JobError):
    """Shards gave up after all their attempts; the same command resumes."""

    exit_code = 4
    status = "incomplete"


class Temporary(JobError):
    """Obstacle that may be gone at the next try, without any change."""

    exit_code = 75
    status = "temporary"


class Unavailable(Temporary):
    """Fault of a store, the network or credentials that outlasted all retries."""


class AccessDenied(Unavailable):
    """Store that answers but refuses these credentials: it makes no sense to ask again with the same ones."""


class WorkerLost(Temporary):
    """Process of a worker that is unusable: the pool replaces it; in the driver's own process the run ends.

    Args:
        message: One sentence for people.
        device: Device of the worker, from `identify_device`.
        suspect_positions: Positions of the images that the model had at that time.
        culprit_known: The image that caused it is known, and no worker will predict it again.
    """

    def __init__(
        self, message: str, device: str, suspect_positions: tuple[range, ...] = (), culprit_known: bool = False
    ) -> None:
        super().__init__(message, device, suspect_positions, culprit_known)
        self.device, self.suspect_positions, self.culprit_known = device, suspect_positions, culprit_known


class DeviceFault(WorkerLost):
    """Device that failed, or whose context in this process is broken: everything else on it fails too."""


class WorkerStalled(WorkerLost):
    """Step of a worker that took longer than `runtime.stall_seconds`.

    Args:
        message: See `WorkerLost`.
        device: See `WorkerLost`.
        suspect_positions: See `WorkerLost`.
        culprit_known: See `WorkerLost`.
        storage: The step waited for a store, which is no fault of the shard.
    """

    def __init__(
        self,
        message: str,
        device: str,
        suspect_positions: tuple[range, ...] = (),
        culprit_known: bool = False,
        storage: bool = False,
    ) -> None:
        super().__init__(message, device, suspect_positions, culprit_known)
        self.storage = storage


def as_batchjob_error(error: Exception) -> BatchjobError:
    """Return an exception of this package unchanged; any other becomes an AttemptFailed that names it."""
    return error if isinstance(error, BatchjobError) else AttemptFailed(describe_error(error))


def as_crash_error(error: BaseException) -> BatchjobError:
    """Return the exception that ends a worker, as opposed to one attempt.

    A bug has exit code 1, with its traceback as a note: notes are pickled with the exception. With `--debug` all
    others have one too.
    """
    is_expected = isinstance(error, BatchjobError) and error.exit_code != BatchjobError.exit_code
    if isinstance(error, BatchjobError) and is_expected and not os.environ.get(DEBUG_VARIABLE):
        return error
    trace = "".join(traceback.format_exception(error)).rstrip()
    crash = error if isinstance(error, BatchjobError) else BatchjobError(f"a worker crashed: {describe_error(error)}")
    return with_traceback(crash, trace)


def with_traceback(error: BatchjobError, trace: str) -> BatchjobError:
    """Add a traceback to an exception as a note, without secrets, and return the exception."""
    error.add_note(sanitize(trace))
    return error


def describe_error(error: BaseException) -> str:
    """Return the type of an exception and the first 500 characters of its text, in one line."""
    return f"{type(error).__name__}: {' '.join(extract_cause(error).split())[:_MAX_TEXT]}"


def extract_cause(error: BaseException) -> str:
    """Return the text of an exception; of one in the TorchScript interpreter, whose text is a traceback, the cause.

    The cause is the last line, or the operation that failed where torch says no more.
    """
    text = str(error).strip()
    if _TORCHSCRIPT not in text:
        return text
    name = type(error).__name__
    cause = text.rpartition("\n")[2].removeprefix(f"{name}:").strip()
    # The operation stands above a line of tildes that ends in an arrow: `~~~~~~ <--- HERE`.
    failed = re.findall(r"^ *(.+)\n *~+ *<--- HERE", text, re.MULTILINE)
    return cause or (
        f"it fails at {failed[-1]}; perhaps its weights have not the dtype of the input" if failed else name
    )


def is_out_of_memory(error: BaseException) -> bool:
    """Return True if an exception means that memory did not suffice, on any device."""
    import torch

    return isinstance(error, torch.OutOfMemoryError | MemoryError) or bool(_OUT_OF_MEMORY.search(str(error)))


# -- names of earlier versions ---------------------------------------------------------------------------------

# Name of an earlier version -> name of today.
_RENAMED = {
    "Changed": "PreconditionFailed",
    "Denied": "AccessDenied",
    "ImageFault": "ImageError",
    "Interrupted": "AttemptInterrupted",
    "Refused": "AddressRefused",
    "Stalled": "WorkerStalled",
    "TooLarge": "ObjectTooLarge",
    "Unaddressable": "UnaddressableKey",
}


def __getattr__(name: str) -> type[BatchjobError]:
    """Return a class under the name that it had in an earlier version, with a warning."""
    if name not in _RENAMED:
        raise AttributeError(f"module 'batchjob.errors' has no attribute {name!r}")
    message = f"batchjob.errors.{name} is now batchjob.errors.{_RENAMED[name]}"
    warnings.warn(message, DeprecationWarning, stacklevel=2)
    renamed: type[BatchjobError] = globals()[_RENAMED[name]]
    return renamed
