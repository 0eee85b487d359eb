"""The pool on Ray: one actor a worker, each holding a `LocalPool`; the only file that imports ray.

Ray carries shard keys, events and nothing else. Lost actors are replaced here; the shards they held come back to the
driver as failed attempts, of which only the one at work counts.
"""

from __future__ import annotations

import os
import platform
from pathlib import Path

from batchjob.pool.local_pool import LocalPool
from batchjob.pool.ray_cluster import NODE_DIGITS
from batchjob.types import ShardKey
from batchjob.worker.messages import WorkerEvent, WorkerSetup


class RayWorker:
    """The actor: a `LocalPool` at the other end of a wire."""

    def __init__(self, cores: int, job_folder: str | None, setup: WorkerSetup) -> None:
        self._pool = LocalPool(cores, job_folder=None if job_folder is None else _home() / job_folder)
        self._pool.start(setup)

    def submit(self, key: ShardKey, plan_number: int, reattempt: bool) -> None:
        self._pool.submit(key, plan_number, reattempt)

    def wait(self, timeout: float) -> tuple[str, list[WorkerEvent]]:
        """Where it is, and what happened."""
        told = self._pool.wait(timeout)
        _home()
        return _here(), told

    def close(self) -> None:
        self._pool.close()


def _here() -> str:
    """The node that this process is on, as people and Ray know it."""
    import ray

    return f"{platform.node()} (node {ray.get_runtime_context().get_node_id()[:NODE_DIGITS]})"


def _home() -> Path:
    """The working directory. A node about to go may have taken it away: what fails then is lost, and not a bug."""
    try:
        return Path.cwd()
    except FileNotFoundError:
        os._exit(1)
