"""Everything that can go wrong, ordered by how much it takes down with it.

```
BatchjobError                 exit 1   ours, but nobody classified it
├── ImageFault                   –     one image: becomes an error row, the job goes on
├── StorageError                       what a store answered; who asked decides how far it reaches
│   ├── Refused                        an address that this job may not read from
│   ├── NotFound                       the object is not there
│   ├── AlreadyExists                  create-if-absent lost (or its first answer did)
│   ├── Changed                        replace-if-match lost
│   ├── TooLarge                       more bytes than who asked takes
│   └── Unaddressable                  no client can name this key
├── AttemptFailed             exit 4   one attempt at a shard: tried again, a bounded number of times
│   └── Interrupted                    by what befell another shard there: uses up no attempt
└── JobError                           the whole job
    ├── InvalidJob            exit 2   usage, configuration, a plan of another job: never retry
    ├── CheckFailed           exit 3   error budget, foreign or missing parts: look at it
    ├── Incomplete            exit 4   shards gave up: run again, it resumes
    └── Temporary             exit 75  not there yet, another driver, store or cluster lost: retry
        ├── Unavailable                network, throttling: also what storage raises, when retries did not help
        │   └── Denied                 credentials: waiting does not help
        └── WorkerLost                 a worker's process is of no more use; where the pool can, it is replaced
            ├── DeviceFault            a device failed, or what this process has of it is broken
            └── Stalled                nothing moves in it any more
```

Every message is one sentence that says what is wrong, where, and what to type next.
All of them survive pickling: they cross process and machine borders. None of them holds a secret (`redaction.py`).
"""

from __future__ import annotations

import re
import traceback
import warnings

from batchjob.text import sanitize

__all__ = [
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
    "is_out_of_memory",
    "with_traceback",
]


class BatchjobError(Exception):
    """Base of every exception this package raises on purpose.

    Attributes:
        counts: images planned, rows predicted and rows failed when it ended a run.
    """

    exit_code = 1
    status = "crashed"
    counts: tuple[int, int, int] = (0, 0, 0)

    def __init__(self, *args: object) -> None:
        super().__init__(*(sanitize(part) if isinstance(part, str) else part for part in args))

    @property
    def message(self) -> str:
        return str(self.args[0]) if self.args else type(self).__name__


class ImageError(BatchjobError):
    """A fault of one image only: absent, changed, undecodable, unpredictable.

    Args:
        stage: where it showed: `fetch`, `decode`, `transform`, `predict`.
        type: a short stable word to group by, such as `not_found` or `truncated`.
        message: one sentence for a person.
    """

    def __init__(self, stage: str, type: str, message: str) -> None:
        super().__init__(stage, type, message)
        self.stage, self.type = stage, type

    @property
    def message(self) -> str:
        return str(self.args[2])


class StorageError(BatchjobError):
    """A store's definite answer about one object."""


class AddressRefused(StorageError):
    """An address on the web that this job may not read from, or an answer beyond its limits."""


class NotFound(StorageError):
    """The object does not exist."""


class AlreadyExists(StorageError):
    """Create-if-absent met something. Never believed without a look: the answer to our own PUT may have been lost."""


class PreconditionFailed(StorageError):
    """Replace-if-match met another version, or none."""


class ObjectTooLarge(StorageError):
    """An object of more bytes than who asked takes; none of them was read."""

    def __init__(self, uri: str, size: int, limit: int) -> None:
        super().__init__(uri, size, limit)
        self.size, self.limit = size, limit

    @property
    def message(self) -> str:
        uri, size, limit = self.args
        return f"{uri}: has {size:,} bytes, over the limit of {limit:,}"


class UnaddressableKey(StorageError):
    """A key that no client can name (`..` segments, NUL)."""


class AttemptFailed(BatchjobError):
    """One attempt at one shard failed; another may succeed."""

    exit_code = 4
    status = "incomplete"


class AttemptInterrupted(AttemptFailed):
    """An attempt that ended with its worker or its loader, while another shard was the one at work there."""


class JobError(BatchjobError):
    """Ends the job."""


class InvalidJob(JobError):
    """Usage or configuration. Said before the first image is read; trying again cannot help."""

    exit_code = 2
    status = "invalid"


class CheckFailed(JobError):
    """The job ran, or an output was looked at, and a check did not hold."""

    exit_code = 3
    status = "over_budget"


class Incomplete(JobError):
    """Some shards gave up after their attempts; the same command resumes."""

    exit_code = 4
    status = "incomplete"


class Temporary(JobError):
    """Not now: a later try may succeed without any change."""

    exit_code = 75
    status = "temporary"


class Unavailable(Temporary):
    """A store, network or credential fault that outlasted the retries."""


class AccessDenied(Unavailable):
    """A store that answers, and refuses these credentials: asking again with the same ones is of no use."""


class WorkerLost(Temporary):
    """A worker's process can do no more: it is replaced, or the run ends where it is the driver's own.

    Args:
        message: one sentence.
        device: on which it ran.
        images: positions of those that were with the device, if any.
        found: the image that did it is known by now, and will not be met again.
    """

    def __init__(
        self, message: str, device: str, suspect_positions: tuple[range, ...] = (), culprit_known: bool = False
    ) -> None:
        super().__init__(message, device, suspect_positions, culprit_known)
        self.device, self.suspect_positions, self.culprit_known = device, suspect_positions, culprit_known


class DeviceFault(WorkerLost):
    """A device has failed, or its context in this process is broken: whatever is tried on it there fails too."""


class WorkerStalled(WorkerLost):
    """One step of a worker's has taken longer than `runtime.stall_seconds`.

    Args:
        message, device, images, found: as of any worker that is lost.
        storage: a store has kept it waiting, which is the fault of no shard.
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
    """An exception of ours as it is, any other as a failed attempt that names it."""
    if isinstance(error, BatchjobError):
        return error
    text = " ".join(str(error).split())[:500]
    return AttemptFailed(f"{type(error).__name__}: {text}")


_OUT_OF_MEMORY = re.compile(r"out of memory|not enough memory|can't allocate memory|ALLOC_FAILED", re.IGNORECASE)


def is_out_of_memory(error: BaseException) -> bool:
    """Whether an exception says that memory did not suffice, on any device."""
    import torch

    return isinstance(error, torch.OutOfMemoryError | MemoryError) or bool(_OUT_OF_MEMORY.search(str(error)))


def as_crash_error(error: BaseException) -> BatchjobError:
    """What ended a worker, and no attempt at a shard: a bug is exit 1, its traceback a note, which crosses machines."""
    if isinstance(error, BatchjobError) and error.exit_code != BatchjobError.exit_code:
        return error
    trace = "".join(traceback.format_exception(error)).rstrip()
    return with_traceback(
        error if isinstance(error, BatchjobError) else BatchjobError(f"a worker crashed: {describe_error(error)}"),
        trace,
    )


def with_traceback(error: BatchjobError, trace: str) -> BatchjobError:
    """The same, with a traceback as its note, which holds no secret either."""
    error.add_note(sanitize(trace))
    return error


def describe_error(error: BaseException) -> str:
    """Its type and its text in one line."""
    return f"{type(error).__name__}: {' '.join(str(error).split())[:500]}"


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
