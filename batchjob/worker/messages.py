"""Messages between a pool and its workers: the setup and the assignments a worker gets, the events it reports."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from batchjob.errors import BatchjobError
from batchjob.output.provenance import ShardResult
from batchjob.settings import Decision
from batchjob.types import ShardKey

__all__ = [
    "Assignment",
    "PoolNotice",
    "ShardCommitted",
    "ShardFailed",
    "WorkerEvent",
    "WorkerFailed",
    "WorkerInfo",
    "WorkerReady",
    "WorkerSetup",
]


@dataclass(frozen=True)
class WorkerSetup:
    """Everything a worker needs to load.

    Attributes:
        job: The job, serialized (`Job.serialize`).
        job_folder: The job's folder as the driver sees it; relative paths of input and output start there.
        visibility_check: Key of an object that the driver wrote, and its content: the worker reads it to make sure that
            both reach the same output. None if driver and worker share a machine.
        sample: Locations of the first images, from which the worker learns the image size if no setting fixes it.
        small_input_bytes: Encoded size of all images, as far as it is known, in bytes, if the input is so small that a
            worker may take longer to start than to work; None for any larger input.
        reserved_gpus: GPUs that the pool has reserved for the worker; 0 for none.
        known_images: Images of the whole input, if that is known before it is listed; 0 if it is not.
        pool_size: Workers that share the images; 0 if the pool does not know it.
        files_id: Id of the driver's record of the files that the job names; the plan's contract keeps it.
        decisions: Decisions of the plan that is resumed, by dotted name; empty for a new one.
    """

    job: Mapping[str, Any]
    job_folder: str
    visibility_check: tuple[str, str] | None = None
    sample: tuple[str, ...] = ()
    small_input_bytes: int | None = None
    reserved_gpus: float = 0.0
    known_images: int = 0
    pool_size: int = 0
    files_id: str = ""
    decisions: Mapping[str, str] = field(default_factory=dict)


@dataclass(frozen=True)
class WorkerInfo:
    """Facts about a worker that has loaded. Its fields are keys of the run's report.

    Attributes:
        device: The device in words, for example `cuda:0 (NVIDIA H200, GPU-…)`.
        precision: Precision that the job asks for.
        model: Name and digest of the model.
        columns: Names of the task's columns.
        batch_size: Images per batch.
        seconds: Time to load and warm up, in seconds.
        ahead: Images that the loader keeps in flight; 0 if unknown.
        decisions: Decisions on settings that the job leaves at `auto`, by dotted name (`task.activation`).
        notes: Sentences about how the model was loaded, and about what limits the loader.
    """

    device: str
    precision: str
    model: str
    columns: tuple[str, ...]
    batch_size: int
    seconds: float
    ahead: int = 0
    decisions: Mapping[str, Decision] = field(default_factory=dict)
    notes: tuple[str, ...] = ()

    @property
    def decision_lines(self) -> list[str]:
        """Decisions in words, such as `task.activation: none, since the model itself ends in a softmax`."""
        return [f"{name}: {found.value}, since {found.reason}" for name, found in self.decisions.items()]


@dataclass(frozen=True)
class Assignment:
    """A shard for one worker.

    Attributes:
        worker: Name of the worker.
        key: The shard.
        plan_number: Number of the plan that the shard belongs to.
        reattempt: The shard has been tried before, or another worker is trying it now.
    """

    worker: str
    key: ShardKey
    plan_number: int
    reattempt: bool = False


@dataclass(frozen=True)
class WorkerReady:
    """The worker of this name has loaded and warmed up."""

    worker: str
    info: WorkerInfo


@dataclass(frozen=True)
class ShardCommitted:
    """A shard is committed."""

    result: ShardResult


@dataclass(frozen=True)
class ShardFailed:
    """An attempt at a shard ended without a commit. The class of its error tells what else is affected."""

    key: ShardKey
    error: BatchjobError


@dataclass(frozen=True)
class WorkerFailed:
    """A worker cannot load or continue, or the pool cannot start or replace one. No shard is the cause."""

    error: BatchjobError


@dataclass(frozen=True)
class PoolNotice:
    """News of the pool for the user, such as what it waits for."""

    text: str


WorkerEvent = WorkerReady | ShardCommitted | ShardFailed | WorkerFailed | PoolNotice
