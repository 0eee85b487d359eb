"""A worker on the CPU, loaded in this process from `harmful_job`, and the shards of a plan for it."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import closing, contextmanager
from pathlib import Path
from typing import Any

import batchjob
from batchjob.job.job import Job
from batchjob.plan.chunks import read_chunks
from batchjob.plan.head import PlanHead, read_current_head
from batchjob.storage.store import open_store
from batchjob.types import ShardKey
from batchjob.worker.messages import WorkerSetup
from batchjob.worker.setup import LoadedWorker, load
from tests.support.harmful_job import write_harmful_job

__all__ = ["load_worker", "plan_shards", "read_head", "write_job"]


def write_job(folder: Path, *overrides: str, images: int = 20) -> Job:
    """Write a job over white images of 8x8 pixels, in shards of 8 and batches of 4, with changed settings."""
    return Job.from_file(Path(write_harmful_job(folder, images, black_positions=[])), overrides=list(overrides))


def plan_shards(job: Job) -> list[ShardKey]:
    """Write the plan of a job; return its shards."""
    batchjob.make_plan(job)
    return [key for chunk in read_chunks(open_store(job.output.uri), read_head(job)) for key in chunk.shards]


def read_head(job: Job) -> PlanHead:
    """Read the head of the plan that is not discarded."""
    _, head = read_current_head(open_store(job.output.uri))
    assert head is not None, "no plan is written"
    return head


@contextmanager
def load_worker(job: Job, cores: int = 1, small_input_bytes: int | None = 0, **setup: Any) -> Iterator[LoadedWorker]:
    """Load a worker, by default for an input that is too small to measure anything; close it at the end.

    Args:
        job: The job.
        cores: Cores that the worker may use.
        small_input_bytes: See `WorkerSetup`.
        setup: Other fields of `WorkerSetup`.
    """
    message = WorkerSetup(job.serialize(), str(job.folder), small_input_bytes=small_input_bytes, **setup)
    with closing(load(job, message, cores)) as loaded:
        yield loaded
