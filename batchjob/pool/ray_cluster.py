"""Ray cluster as a run uses it: connect, ship the job's folder, list the live nodes, notice that the cluster is lost.

`ray` is imported inside functions: only the pool's own thread waits for it, and a missing package gets its own message.
"""

from __future__ import annotations

import os
import threading
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

from batchjob.concurrency import terminal_signals_blocked
from batchjob.job.job import Job
from batchjob.pool.worker_sizing import Node

__all__ = ["NODE_ID_DIGITS", "ClusterHealth", "actor_runtime_env", "connect", "list_nodes", "remote_job_dir"]

NODE_ID_DIGITS = 12  # enough to tell nodes apart

# Only events go through Ray's object store. What it takes of /dev/shm is missing for the batches of the loaders.
_OBJECT_STORE_BYTES = 128 << 20
_NOT_SHIPPED = (".git", ".venv", "__pycache__", "*.pyc")
_POLL_SECONDS = 5.0
# Without a head node, Ray ends the driver's process after 60 s, with an exit code of its own.
_MAX_SILENCE_SECONDS = 30.0
# Without it, a worker that asks for no GPU sees all of them.
_HIDE_GPUS = "RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO"


def connect(job: Job, address: str | None) -> None:
    """Connect to a cluster and ship the job's folder there, or start a Ray on this machine.

    Args:
        job: The job.
        address: Address of the cluster; None starts a Ray that ends with this process.
    """
    import ray

    os.environ.setdefault(_HIDE_GPUS, "1")
    quiet: dict[str, Any] = {"log_to_driver": False, "logging_level": "error", "configure_logging": True}
    if address:
        ray.init(address=address, runtime_env=_runtime_env(job), **quiet)
    else:
        # Ray blocks only SIGINT in its processes: without this they would end with the terminal, before the run does.
        with terminal_signals_blocked():
            ray.init(address="local", include_dashboard=False, object_store_memory=_OBJECT_STORE_BYTES, **quiet)


def list_nodes() -> list[Node]:
    """Return the live nodes."""
    import ray

    return [
        Node(node["NodeID"][:NODE_ID_DIGITS], node["Resources"].get("CPU", 0.0), node["Resources"].get("GPU", 0.0))
        for node in ray.nodes()
        if node["Alive"]
    ]


def remote_job_dir(job: Job) -> str:
    """Return the job's folder on the cluster, relative to the working directory of a worker."""
    return os.path.relpath(job.folder, Path.cwd()) if _is_submitted() else "."


def actor_runtime_env(address: str | None) -> dict[str, Any] | None:
    """Return Ray's `runtime_env` of an actor; None for a Ray on this machine, which has our environment.

    A Ray on this machine starts the processes of workers together with itself, unless they ask for an environment.
    """
    return {"env_vars": {_HIDE_GPUS: "1"}} if address else None


def _runtime_env(job: Job) -> dict[str, Any] | None:
    """Return Ray's `runtime_env` with the job's folder; None if Ray has it (`ray job submit --working-dir`)."""
    if _is_submitted():
        return None
    data = (Path(uri) for uri in (job.input.uri, job.output.uri))
    data_inside = [f"/{path.relative_to(job.folder)}" for path in data if path.is_relative_to(job.folder)]
    return {"working_dir": str(job.folder), "excludes": [*_NOT_SHIPPED, *data_inside]}


def _is_submitted() -> bool:
    """Return True if this driver is the entrypoint of a submitted Ray job."""
    return "RAY_JOB_CONFIG_JSON_ENV_VAR" in os.environ


class ClusterHealth:
    """Polls the live nodes of a cluster, in a thread of its own: Ray's calls may hang without an error.

    Args:
        list_nodes: Returns the live nodes. It may hang or raise.
        nodes: The first answer.

    Attributes:
        nodes: The latest answer.
    """

    def __init__(self, list_nodes: Callable[[], Sequence[Node]], nodes: Sequence[Node]) -> None:
        self._list_nodes, self.nodes = list_nodes, nodes
        self._last_answer = time.monotonic()
        self._stopped = threading.Event()
        threading.Thread(target=self._poll, name="cluster health", daemon=True).start()

    def find_failure(self) -> str | None:
        """Return the fault of the cluster as the rest of a sentence, None if there is none."""
        if not self.nodes:
            return "has lost all its nodes"
        silence = time.monotonic() - self._last_answer
        return f"has not answered for {silence:.0f} s" if silence > _MAX_SILENCE_SECONDS else None

    def stop(self) -> None:
        """End the thread."""
        self._stopped.set()

    def _poll(self) -> None:
        while not self._stopped.wait(_POLL_SECONDS):
            with suppress(Exception):  # any exception means that there is no answer
                self.nodes = self._list_nodes()
                self._last_answer = time.monotonic()
