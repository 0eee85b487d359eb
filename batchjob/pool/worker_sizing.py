"""Number and size of the workers that a cluster is asked for. Pure: the nodes are given."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from batchjob.errors import InvalidJob
from batchjob.job.job import Job
from batchjob.job.runtime import Workers
from batchjob.pool.autoscaler import NO_AUTOSCALER, Autoscaler
from batchjob.text import format_count

__all__ = [
    "GpuDemand",
    "Node",
    "WorkerSizing",
    "choose_gpus",
    "describe_cpu_run",
    "describe_gpu_shortage",
    "describe_nodes",
    "size_workers",
]

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

    def describe_demand(self, nodes: Sequence[Node], autoscaler: Autoscaler = NO_AUTOSCALER) -> str:
        """Say what each worker asks for, what the cluster has, and what may come."""
        there = f"each asks for {self.cpus:g} CPUs and {self.gpus:g} GPUs, the cluster has {describe_nodes(nodes)}"
        return f"{there}, {autoscaler.describe()}" if autoscaler.is_active else there

    def describe_shortage(self, nodes: Sequence[Node], autoscaler: Autoscaler = NO_AUTOSCALER) -> str:
        """Say what each worker asks for, what the cluster has, what may come, and what to do about it."""
        return (
            f"{self.describe_demand(nodes, autoscaler)}; run again when it is larger, or ask for less "
            "(runtime.workers, cpus_per_worker, gpus_per_worker)"
        )

    def check_machine(self, nodes: Sequence[Node]) -> None:
        """Check that a worker fits on a Ray of this machine alone, which nothing makes larger.

        Raises:
            InvalidJob: A worker asks for more CPUs than there are.
        """
        if not any(node.cpus >= self.cpus and node.gpus >= self.gpus for node in nodes):
            raise InvalidJob(
                f"runtime.cpus_per_worker: each worker asks for {self.cpus:g} CPUs, this machine has "
                f"{describe_nodes(nodes)}; ask for less, or leave it at auto"
            )


@dataclass(frozen=True)
class GpuDemand:
    """GPUs that each worker is to have.

    Attributes:
        gpus: GPUs of each worker; 0 for workers on the CPU.
        is_awaited: No live node has them, and the autoscaler is to bring one.
        missing: The job leaves the choice, and there are no GPUs; None where it does not, or there are.
    """

    gpus: float
    is_awaited: bool = False
    missing: str | None = None


def choose_gpus(job: Job, nodes: Sequence[Node], autoscaler: Autoscaler, cluster: str) -> GpuDemand:
    """Choose the GPUs of each worker: those that the job asks for, or by `auto` one wherever a GPU is or may come.

    A cluster that may bring a GPU is asked for it, never served by a CPU instead.

    Args:
        job: The job; `runtime` limits the choice.
        nodes: The live nodes.
        autoscaler: The cluster's autoscaler.
        cluster: The cluster in words.

    Raises:
        InvalidJob: `runtime` contradicts itself, or asks for a GPU that is not there and that nothing can bring.
    """
    runtime = job.runtime
    needs_cuda = runtime.device.startswith("cuda")
    if needs_cuda and runtime.gpus_per_worker == 0:
        raise InvalidJob("runtime.gpus_per_worker is 0 but runtime.device asks for cuda; give gpus_per_worker: 1")
    if runtime.gpus_per_worker == "auto":
        gpus = 1.0 if needs_cuda or runtime.device == "auto" else 0.0
    else:
        gpus = runtime.gpus_per_worker
    if not gpus or any(node.gpus >= gpus for node in nodes):
        return GpuDemand(gpus)
    if autoscaler.may_bring(gpus):
        return GpuDemand(gpus, is_awaited=True)
    why = (
        "its autoscaler has no node with a GPU"
        if autoscaler.is_active
        else "it has no autoscaler that could bring one"
        if len(nodes) != 1
        else "nothing brings one"
    )
    found = f"{cluster} has {describe_nodes(nodes)}, and {why}"
    if not needs_cuda and runtime.gpus_per_worker == "auto":
        return GpuDemand(0.0, missing=found)
    setting = f"device: {runtime.device}" if needs_cuda else f"gpus_per_worker: {gpus:g}"
    raise InvalidJob(
        f"runtime.{setting} asks for {gpus:g} GPU{'' if gpus <= 1 else 's'} on a node for each worker, but {found}; "
        "add such a node, ask for less, or write runtime.device=cpu"
    )


def describe_cpu_run(job: Job, demand: GpuDemand, cluster: str) -> str | None:
    """Return a line that says that the run computes on the CPUs of a cluster, and why; None if it does not."""
    if demand.gpus or job.runtime.device not in {"auto", "cpu"}:
        return None
    reason = demand.missing or f"on {cluster}, as runtime.device and runtime.gpus_per_worker say"
    return f"computing on CPUs: {reason}"


def describe_gpu_shortage(nodes: Sequence[Node], autoscaler: Autoscaler) -> str:
    """Say what a cluster has that was asked for a GPU, what may come, and what to do about it."""
    return (
        f"a node with a GPU was asked for, the cluster has {describe_nodes(nodes)}, {autoscaler.describe()}; "
        "run again later, or write runtime.device=cpu"
    )


def describe_nodes(nodes: Sequence[Node]) -> str:
    """Return the CPUs and GPUs of nodes in words."""
    resources = f"{sum(node.cpus for node in nodes):g} CPUs, {sum(node.gpus for node in nodes):g} GPUs"
    return f"{resources} on {format_count(len(nodes), 'node')}"


def size_workers(job: Job, nodes: Sequence[Node], gpus: float) -> WorkerSizing:
    """Choose one worker per GPU if they are to have GPUs, else one per node, unless the job says otherwise.

    Workers get all cores of their node, or the share of them that goes with their GPUs.

    Example:
        Two nodes of 32 CPUs and 4 GPUs, all settings at `auto`: 8 workers of 8 CPUs and 1 GPU.

    Args:
        job: The job; `runtime` limits the choice.
        nodes: The live nodes.
        gpus: GPUs of each worker, from `choose_gpus`.
    """
    runtime = job.runtime
    hosts = [node for node in nodes if (node.gpus >= gpus if gpus else node.cpus >= 1)]
    if runtime.cpus_per_worker == "auto":
        shares = [node.cpus * gpus / node.gpus if gpus else node.cpus for node in hosts]
        cpus = max(1.0, float(int(min(shares, default=1.0))))
    else:
        cpus = runtime.cpus_per_worker
    fitting = sum(_count_workers(node, cpus, gpus) for node in hosts)
    match runtime.workers:
        case "auto":
            return WorkerSizing(max(1, fitting), 1, cpus, gpus)
        case Workers(min=min_workers, max=max_workers):
            return WorkerSizing(max_workers, min_workers, cpus, gpus)
        case count:
            return WorkerSizing(count, 1, cpus, gpus)


def _count_workers(node: Node, cpus: float, gpus: float) -> int:
    """Count the workers for which a node has both CPUs and GPUs.

    Example: 32 CPUs and 4 GPUs hold 4 workers of 8 CPUs and 1 GPU, but only 2 of 16 CPUs and 1 GPU.
    """
    by_cpus = _count_shares(node.cpus, cpus)
    return min(by_cpus, _count_gpu_workers(node, gpus)) if gpus else by_cpus


def _count_gpu_workers(node: Node, gpus: float) -> int:
    """Count the workers for which a node has GPUs. Workers may share a GPU, but no worker gets parts of two GPUs.

    Example: with 0.4 GPUs each, 4 GPUs hold 2 workers each, 8 in all, though 4 / 0.4 is 10.
    """
    return _count_shares(node.gpus, gpus) if gpus >= 1 else int(node.gpus) * _count_shares(1.0, gpus)


def _count_shares(available: float, share: float) -> int:
    """Count the shares in a resource, in whole units as Ray does: 1 GPU holds 5 shares of 0.2, but `1 // 0.2` is 4."""
    return round(available * _RAY_UNITS) // max(1, round(share * _RAY_UNITS))
