"""The seam between the driver and whoever runs workers: submit shard keys, wait for what became of them."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from batchjob.errors import BatchjobError
from batchjob.output.provenance import ShardResult
from batchjob.types import ShardKey

__all__ = ["ShardCommitted", "ShardFailed", "WorkerEvent", "WorkerFailed", "WorkerInfo", "WorkerReady", "WorkerSetup"]


@dataclass(frozen=True)
class WorkerSetup:
    """What a worker is told before it loads.

    Attributes:
        job: the job in portable form (`Job.portable`).
        folder: the job's folder as the driver sees it; input and output paths mean this one.
        witness: key of an object the driver wrote and a word in it, to see that the worker reaches the same output.
        sample: locations of the first images, to learn the image size where no setting fixes it.
        few_bytes: of all images, encoded and as far as they are known, where the whole input is so short that a worker
            can take longer to get ready for it than to do it; else None.
    """

    job: Mapping[str, Any]
    job_folder: str
    visibility_check: tuple[str, str] | None = None
    sample: tuple[str, ...] = ()
    small_input_bytes: int | None = None


@dataclass(frozen=True)
class WorkerInfo:
    """What a worker knows once its model stands on its device.

    Attributes:
        device, precision, model: for people; `columns`: the task's.
        batch_size: images in a call of the model.
        seconds: that loading took.
        ahead: images that its loader keeps under way, 0 where it does not say.
        row_bytes: a bound on the bytes of the task's columns in a row, 0 where it knows no better than the settings.
    """

    device: str
    precision: str
    model: str
    columns: tuple[str, ...]
    batch_size: int
    seconds: float
    ahead: int = 0
    row_bytes: int = 0


@dataclass(frozen=True)
class WorkerReady:
    """A worker has loaded and warmed up."""

    worker: str
    info: WorkerInfo


@dataclass(frozen=True)
class ShardCommitted:
    """A shard is committed."""

    result: ShardResult


@dataclass(frozen=True)
class ShardFailed:
    """An attempt at a shard ended without a commit. Its error says how far that reaches."""

    key: ShardKey
    error: BatchjobError


@dataclass(frozen=True)
class WorkerFailed:
    """A worker could not load, or the pool could not start or replace one: no shard is to blame."""

    error: BatchjobError


WorkerEvent = WorkerReady | ShardCommitted | ShardFailed | WorkerFailed
