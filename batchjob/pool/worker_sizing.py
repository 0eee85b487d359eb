"""Number and size of the workers that a cluster is asked for. Pure: the nodes are given."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from batchjob.errors import InvalidJob
from batchjob.job.job import Job
from batchjob.job.runtime import Workers

__all__ = ["Node", "WorkerSizing", "size_workers"]

_RAY_UNITS = 10_000  # Ray counts resources in parts of this size of a CPU or GPU


@dataclass(frozen=True)
class Node:
    """A live node of a cluster.

    Attributes:
        name: First digits of Ray's id of the node.
        cpus: CPUs that Ray may use there.
        gpus: GPUs that Ray may use there.
    """

    name: str
    cpus: float
    gpus: float


@dataclass(frozen=True)
class WorkerSizing:
    """The workers that a cluster is asked for.

    Attributes:
        workers: Number of workers to start.
        min_workers: Number of workers that must be ready before work begins.
        cpus: CPUs of each worker.
        gpus: GPUs of each worker; 0 for workers on the CPU.
    """

    workers: int
    min_workers: int
    cpus: float
    gpus: float

    def count_devices(self, nodes: Sequence[Node]) -> int:
        """Count the devices that workers may run on: GPUs if they ask for any, else the nodes themselves."""
        if self.gpus:
            return sum(int(node.gpus) for node in nodes)
        return sum(node.cpus >= self.cpus for node in nodes)

    def describe_shortage(self, nodes: Sequence[Node]) -> str:
        """Say what each worker asks for, what the cluster has, and what to do about it."""
        resources = f"{sum(node.cpus for node in nodes):g} CPUs, {sum(node.gpus for node in nodes):g} GPUs"
        return (
            f"each asks for {self.cpus:g} CPUs and {self.gpus:g} GPUs, the cluster has {resources} on "
            f"{len(nodes)} node{'' if len(nodes) == 1 else 's'}; run again when it is larger, or ask for less "
            "(runtime.workers, cpus_per_worker, gpus_per_worker)"
        )


def size_workers(job: Job, nodes: Sequence[Node]) -> WorkerSizing:
    """Choose one worker per GPU if there are GPUs, else one per node with all its cores, unless the job says otherwise.

    Example:
        Two nodes of 32 CPUs and 4 GPUs, all settings at `auto`: 8 workers of 8 CPUs and 1 GPU.

    Args:
        job: The job; `runtime` limits the choice.
        nodes: The live nodes.

    Raises:
        InvalidJob: `runtime` contradicts itself.
    """
    runtime = job.runtime
    gpus = _gpus_per_worker(job, nodes)
    hosts = [node for node in nodes if (node.gpus >= gpus if gpus else node.cpus >= 1)]
    if runtime.cpus_per_worker == "auto":
        shares = [node.cpus * gpus / node.gpus if gpus else node.cpus for node in hosts]
        cpus = max(1.0, float(int(min(shares, default=1.0))))
    else:
        cpus = runtime.cpus_per_worker
    fitting = sum(_count_gpu_workers(node, gpus) if gpus else _count_shares(node.cpus, cpus) for node in hosts)
    match runtime.workers:
        case "auto":
            return WorkerSizing(max(1, fitting), 1, cpus, gpus)
        case Workers(min=min_workers, max=max_workers):
            return WorkerSizing(max_workers, min_workers, cpus, gpus)
        case count:
            return WorkerSizing(count, 1, cpus, gpus)


def _count_gpu_workers(node: Node, gpus: float) -> int:
    """Count the workers for which a node has GPUs. Workers may share a GPU, but no worker gets parts of two GPUs.

    Example: with 0.4 GPUs each, 4 GPUs hold 2 workers each, 8 in all, though 4 / 0.4 is 10.
    """
    return _count_shares(node.gpus, gpus) if gpus >= 1 else int(node.gpus) * _count_shares(1.0, gpus)


def _count_shares(available: float, share: float) -> int:
    """Count the shares in a resource, in whole units as Ray does: 1 GPU holds 5 shares of 0.2, but `1 // 0.2` is 4."""
    return round(available * _RAY_UNITS) // max(1, round(share * _RAY_UNITS))


def _gpus_per_worker(job: Job, nodes: Sequence[Node]) -> float:
    """Return 1 if the device is a GPU, or by `auto` may be one; unless the job says otherwise."""
    runtime = job.runtime
    if runtime.gpus_per_worker == "auto":
        has_gpu = any(node.gpus for node in nodes)
        return 1.0 if runtime.device.startswith("cuda") or (runtime.device == "auto" and has_gpu) else 0.0
    if runtime.device.startswith("cuda") and not runtime.gpus_per_worker:
        raise InvalidJob("runtime.gpus_per_worker is 0 but runtime.device asks for cuda; give gpus_per_worker: 1")
    return runtime.gpus_per_worker
