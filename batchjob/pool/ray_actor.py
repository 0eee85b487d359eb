"""Ray actor that holds one worker thread; assignments go in, events come out."""

from __future__ import annotations

import os
import platform
from pathlib import Path

from batchjob.pool.ray_cluster import NODE_ID_DIGITS
from batchjob.worker.messages import Assignment, WorkerEvent, WorkerSetup
from batchjob.worker.worker_thread import WorkerThread

__all__ = ["RayWorker"]


class RayWorker:
    """Actor that holds one worker thread. Ray carries assignments, events and nothing else.

    Args:
        name: Name of the worker.
        setup: The driver's message.
        job_folder: Folder of the job, relative to the actor's working directory; None if the actor is on the driver's
            machine.
        cores: Cores that the worker may use, loader processes included.
    """

    def __init__(self, name: str, setup: WorkerSetup, job_folder: str | None, cores: int) -> None:
        folder = Path(setup.job_folder) if job_folder is None else _working_directory() / job_folder
        self._thread = WorkerThread(name, setup, folder, cores)

    def submit(self, assignment: Assignment) -> None:
        """Run a shard after those that were submitted before."""
        self._thread.submit(assignment)

    def wait(self, timeout: float) -> tuple[str, list[WorkerEvent]]:
        """Return the actor's node and the events since the last call; wait at most `timeout` seconds."""
        events = self._thread.wait(timeout)
        _working_directory()
        return _node_name(), events

    def close(self) -> None:
        """Begin no further batch, and clear away temporary files and processes."""
        self._thread.close()


def _node_name() -> str:
    """Return the node's host name and Ray's id of it."""
    import ray

    return f"{platform.node()} (node {ray.get_runtime_context().get_node_id()[:NODE_ID_DIGITS]})"


def _working_directory() -> Path:
    """Return the working directory; end the actor if Ray has deleted it, as a node does that is about to go.

    Whatever fails without the directory would look like a bug. An actor that has died is replaced.
    """
    try:
        return Path.cwd()
    except FileNotFoundError:
        os._exit(1)
