"""Results of remote calls, and what an error in one of them means."""

from __future__ import annotations

from contextlib import suppress
from typing import Any

from batchjob.errors import AttemptInterrupted, BatchjobError, with_traceback
from batchjob.types import ShardKey
from batchjob.worker.messages import ShardFailed, WorkerEvent, WorkerFailed

__all__ = ["as_crash", "first_line", "interrupt_shards", "is_bug", "kill_actors", "take_results"]


def take_results(pending: list[Any]) -> list[Any]:
    """Return the calls that have not ended yet; raise the error of one that failed."""
    import ray

    if not pending:
        return []
    done, pending = ray.wait(pending, num_returns=len(pending), timeout=0)
    ray.get(done)
    return pending


def kill_actors(*actors: Any) -> None:
    import ray

    for actor in actors:
        with suppress(Exception):  # an actor that cannot be reached ends with its last handle
            ray.kill(actor)


def is_bug(error: Exception) -> bool:
    """Return True if the actor's own code raised; False if the actor died."""
    import ray

    return isinstance(error, ray.exceptions.RayTaskError) or bool(getattr(error, "actor_init_failed", False))


def as_crash(worker: str, error: Exception) -> WorkerFailed:
    """Convert the error of an actor with a bug into the event that ends the run.

    Ray's text holds the traceback, and the message on its last line.
    """
    text = str(error).strip()
    message = text.splitlines()[-1] if text else type(error).__name__
    return WorkerFailed(with_traceback(BatchjobError(f"worker {worker} crashed: {message}"), text))


def first_line(error: Exception) -> str:
    text = str(error).strip()
    return f"{type(error).__name__}: {text.splitlines()[0] if text else 'no message'}"


def interrupt_shards(shards: list[ShardKey], reason: str) -> list[WorkerEvent]:
    """Fail attempts that do not count.

    The driver puts each such shard first in its line, so the latest one goes first here, to keep their order.
    """
    return [ShardFailed(key, AttemptInterrupted(reason)) for key in reversed(shards)]
