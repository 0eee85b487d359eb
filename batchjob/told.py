"""What workers tell, as the pools take it: into the placement, and, of one that came to an end, as its error."""

from __future__ import annotations

import traceback

from batchjob.errors import BatchjobError, Unavailable
from batchjob.placement import Placement
from batchjob.pool import Done, Event, Failed, Ready
from batchjob.redaction import presentable

__all__ = ["account", "as_crash", "crash", "named"]


def account(placement: Placement, worker: str, event: Event) -> None:
    """Enter into the placement what a worker told."""
    match event:
        case Ready(_, loaded):
            placement.enter(worker, loaded.ahead)
        case Done(result):
            placement.finish(worker, result.key)
        case Failed(key, error):
            placement.fail(worker, key, suspect=not isinstance(error, Unavailable))


def as_crash(error: BaseException) -> BatchjobError:
    """What ended a worker, and no attempt at a shard: a bug is exit 1, its traceback a note, which crosses machines."""
    if isinstance(error, BatchjobError) and error.exit_code != BatchjobError.exit_code:
        return error
    trace = "".join(traceback.format_exception(error)).rstrip()
    return crash(
        error if isinstance(error, BatchjobError) else BatchjobError(f"a worker crashed: {named(error)}"), trace
    )


def crash(error: BatchjobError, trace: str) -> BatchjobError:
    """The same, with a traceback as its note, which holds no secret either."""
    error.add_note(presentable(trace))
    return error


def named(error: BaseException) -> str:
    """Its type and its text in one line."""
    return f"{type(error).__name__}: {' '.join(str(error).split())[:500]}"
