"""How many workers of what size a cluster is asked for. Pure: the nodes are given."""

from __future__ import annotations

import os
import threading
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Generic, TypeVar

from batchjob.errors import InvalidJob
from batchjob.job.job import Job
from batchjob.job.runtime import Workers

__all__ = ["NODE_DIGITS", "ClusterHealth", "Node", "WorkerSizing", "remote_job_dir", "runtime_env", "size_workers"]


NODE_DIGITS = 12  # of a node's id: enough to tell nodes apart


@dataclass(frozen=True)
class Node:
    """A live node and what it has."""

    name: str
    cpus: float
    gpus: float


@dataclass(frozen=True)
class WorkerSizing:
    """What is asked for.

    Attributes:
        workers: as many as there is room for.
        least: that must be there before work begins.
        cpus: for each; `gpus` likewise.
    """

    workers: int
    min_workers: int
    cpus: float
    gpus: float

    def count_devices(self, nodes: Sequence[Node]) -> int:
        """Devices that workers may run on: GPUs where they ask for any, else the nodes themselves."""
        if self.gpus:
            return sum(int(node.gpus) for node in nodes)
        return sum(node.cpus >= self.cpus for node in nodes)

    def describe_shortage(self, nodes: Sequence[Node]) -> str:
        """What is asked for, what is there, and what to do about it."""
        there = f"{sum(node.cpus for node in nodes):g} CPUs, {sum(node.gpus for node in nodes):g} GPUs"
        return (
            f"each asks for {self.cpus:g} CPUs and {self.gpus:g} GPUs, the cluster has {there} on "
            f"{len(nodes)} node{'' if len(nodes) == 1 else 's'}; run again when it is larger, or ask for less "
            "(runtime.workers, cpus_per_worker, gpus_per_worker)"
        )


def size_workers(job: Job, nodes: Sequence[Node]) -> WorkerSizing:
    """One worker a GPU where there are any, else one a node with all its cores.

    Raises:
        InvalidJob: `runtime` contradicts itself.
    """
    runtime = job.runtime
    gpus = _gpus_each(job, nodes)
    hosts = [node for node in nodes if (node.gpus >= gpus if gpus else node.cpus >= 1)]
    if runtime.cpus_per_worker == "auto":
        shares = [node.cpus * gpus / node.gpus if gpus else node.cpus for node in hosts]
        cpus = max(1.0, float(int(min(shares, default=1.0))))
    else:
        cpus = runtime.cpus_per_worker
    fit = sum(int(node.gpus // gpus if gpus else node.cpus // cpus) for node in hosts)
    match runtime.workers:
        case "auto":
            return WorkerSizing(max(1, fit), 1, cpus, gpus)
        case Workers(min=least, max=most):
            return WorkerSizing(most, least, cpus, gpus)
        case count:
            return WorkerSizing(count, 1, cpus, gpus)


def _gpus_each(job: Job, nodes: Sequence[Node]) -> float:
    """GPUs a worker asks for: one where the device is, or by `auto` may be, a GPU."""
    runtime = job.runtime
    if runtime.gpus_per_worker == "auto":
        has_gpu = any(node.gpus for node in nodes)
        return 1.0 if runtime.device.startswith("cuda") or (runtime.device == "auto" and has_gpu) else 0.0
    if runtime.device.startswith("cuda") and not runtime.gpus_per_worker:
        raise InvalidJob("runtime.gpus_per_worker is 0 but runtime.device asks for cuda; give gpus_per_worker: 1")
    return runtime.gpus_per_worker


NodeT = TypeVar("NodeT")
_PULSE_SECONDS = 5.0
_SILENT_SECONDS = 30.0  # without a head, Ray ends the driver's process after 60, with an exit code of its own


class ClusterHealth(Generic[NodeT]):
    """Asks every few seconds.

    Args:
        ask: for the nodes that live; may hang, or raise.
        nodes: the first answer.

    Attributes:
        nodes: the last answer.
    """

    def __init__(self, list_nodes: Callable[[], Sequence[NodeT]], nodes: Sequence[NodeT]) -> None:
        self._ask, self.nodes = list_nodes, nodes
        self._answered = time.monotonic()
        self._stopped = threading.Event()
        threading.Thread(target=self._beat, name="pulse", daemon=True).start()

    def find_failure(self) -> str | None:
        """What befell the cluster, if something did."""
        if not self.nodes:
            return "has lost all its nodes"
        silent = time.monotonic() - self._answered
        return f"has not answered for {silent:.0f} s" if silent > _SILENT_SECONDS else None

    def stop(self) -> None:
        self._stopped.set()

    def _beat(self) -> None:
        while not self._stopped.wait(_PULSE_SECONDS):
            with suppress(Exception):  # no answer, whatever it raises
                self.nodes = self._ask()
                self._answered = time.monotonic()


_UNSHIPPED = (".git", ".venv", "__pycache__", "*.pyc")


def runtime_env(job: Job) -> dict[str, Any] | None:
    """Ray's `runtime_env` with the job's folder; None where Ray has it already (`ray job submit --working-dir`)."""
    if _submitted():
        return None
    data = (Path(uri) for uri in (job.input.uri, job.output.uri))
    inside = [f"/{path.relative_to(job.folder)}" for path in data if path.is_relative_to(job.folder)]
    return {"working_dir": str(job.folder), "excludes": [*_UNSHIPPED, *inside]}


def remote_job_dir(job: Job) -> str:
    """The job's folder on the cluster, relative to a worker's working directory."""
    return os.path.relpath(job.folder, Path.cwd()) if _submitted() else "."


def _submitted() -> bool:
    """Whether this driver is the entrypoint of a submitted Ray job."""
    return "RAY_JOB_CONFIG_JSON_ENV_VAR" in os.environ
