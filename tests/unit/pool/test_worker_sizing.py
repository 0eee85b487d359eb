"""Worker sizing: one worker per GPU, else one per node, unless the job says otherwise."""

from __future__ import annotations

from typing import Any

import pytest

import batchjob
from batchjob.errors import InvalidJob
from batchjob.pool.worker_sizing import Node, WorkerSizing, size_workers

GPU_NODES = [Node("a", 32.0, 4.0), Node("b", 32.0, 4.0)]
CPU_NODES = [Node("a", 8.0, 0.0), Node("b", 4.0, 0.0)]
HEAD_NODE = Node("head", 0.0, 0.0)  # as of a cluster whose head node takes no work


def make_job(**runtime: Any) -> batchjob.Job:
    return batchjob.Job.model_validate(
        {
            "input": {"type": "prefix", "uri": "images/"},
            "model": {"type": "torchvision", "name": "resnet18", "seed": 0},
            "task": {"type": "embedding"},
            "runtime": runtime,
            "output": {"uri": "out"},
        }
    )


@pytest.mark.parametrize(
    ("runtime", "nodes", "sizing"),
    [
        ({}, GPU_NODES, WorkerSizing(8, 1, 8.0, 1.0)),
        ({}, CPU_NODES, WorkerSizing(3, 1, 4.0, 0.0)),
        ({"workers": 2}, CPU_NODES, WorkerSizing(2, 1, 4.0, 0.0)),
        ({"workers": {"min": 2, "max": 5}}, GPU_NODES, WorkerSizing(5, 2, 8.0, 1.0)),
        ({"cpus_per_worker": 2}, CPU_NODES, WorkerSizing(6, 1, 2.0, 0.0)),
        ({"device": "cpu"}, GPU_NODES, WorkerSizing(2, 1, 32.0, 0.0)),
        ({"device": "cuda"}, [], WorkerSizing(1, 1, 1.0, 1.0)),
    ],
    ids=str,
)
def test_workers_fit_the_nodes(runtime: dict[str, Any], nodes: list[Node], sizing: WorkerSizing) -> None:
    assert size_workers(make_job(**runtime), nodes) == sizing


def test_job_that_asks_for_cuda_without_gpus_is_refused() -> None:
    with pytest.raises(InvalidJob, match=r"runtime\.gpus_per_worker is 0 but runtime\.device asks for cuda"):
        size_workers(make_job(device="cuda", gpus_per_worker=0), GPU_NODES)


def test_devices_are_gpus_or_nodes() -> None:
    assert WorkerSizing(8, 1, 8.0, 1.0).count_devices(GPU_NODES) == 8
    assert WorkerSizing(2, 1, 8.0, 0.0).count_devices(CPU_NODES) == 1


@pytest.mark.parametrize(
    ("gpus_per_worker", "node", "workers", "cpus"),
    [
        (0.5, Node("a", 32.0, 4.0), 8, 4.0),  # 2 per GPU; 32 CPUs * 0.5 / 4 GPUs
        (0.2, Node("a", 32.0, 1.0), 5, 6.0),  # in floating point, 1 // 0.2 is 4; 32 * 0.2 / 1 = 6.4
        (0.1, Node("a", 8.0, 2.0), 20, 1.0),  # 10 per GPU; 8 * 0.1 / 2 = 0.4, but one CPU at least
        (0.4, Node("a", 32.0, 4.0), 8, 3.0),  # 2 per GPU, 0.2 of each GPU stay unused; 32 * 0.4 / 4 = 3.2
        (2, Node("a", 32.0, 4.0), 2, 16.0),
        (3, Node("a", 32.0, 4.0), 1, 24.0),  # one GPU stays unused
    ],
)
def test_fractions_and_multiples_of_gpus_divide_a_node(
    gpus_per_worker: float, node: Node, workers: int, cpus: float
) -> None:
    sizing = size_workers(make_job(gpus_per_worker=gpus_per_worker), [node])
    assert sizing == WorkerSizing(workers, 1, cpus, gpus_per_worker)


@pytest.mark.parametrize(
    ("cpus_per_worker", "cpus", "workers"),
    [
        (3, 8.0, 2),
        (0.5, 8.0, 16),
        (0.1, 1.0, 10),  # in floating point, 1 // 0.1 is 9
        # Request a worker although it does not fit: the cluster may grow, and until then the run says why it waits.
        (16, 8.0, 1),
    ],
)
def test_cpu_workers_divide_a_node(cpus_per_worker: float, cpus: float, workers: int) -> None:
    sizing = size_workers(make_job(cpus_per_worker=cpus_per_worker), [Node("a", cpus, 0.0)])
    assert sizing == WorkerSizing(workers, 1, cpus_per_worker, 0.0)


def test_head_node_without_cpus_does_not_shrink_the_workers() -> None:
    assert size_workers(make_job(), [HEAD_NODE, *CPU_NODES]) == size_workers(make_job(), CPU_NODES)


def test_nodes_without_gpus_do_not_shrink_gpu_workers() -> None:
    assert size_workers(make_job(), [*CPU_NODES, *GPU_NODES]) == WorkerSizing(8, 1, 8.0, 1.0)


def test_node_with_fewer_gpus_than_a_worker_needs_is_not_used() -> None:
    # A worker with 4 GPUs does not fit on the node with 2 GPUs, so the 64 CPUs of that node do not count either.
    nodes = [Node("small", 64.0, 2.0), Node("large", 96.0, 8.0)]
    assert size_workers(make_job(gpus_per_worker=4), nodes) == WorkerSizing(2, 1, 48.0, 4.0)


def test_worker_gets_the_cpu_share_of_the_node_that_has_the_fewest_cpus_per_gpu() -> None:
    nodes = [Node("a", 64.0, 4.0), Node("b", 20.0, 4.0)]  # 16 CPUs per GPU, and 5
    assert size_workers(make_job(), nodes).cpus == 5.0


@pytest.mark.parametrize("device", ["auto", "cpu", "mps"])
def test_job_without_gpus_runs_one_worker_per_gpu_node(device: str) -> None:
    assert size_workers(make_job(device=device, gpus_per_worker=0), GPU_NODES) == WorkerSizing(2, 1, 32.0, 0.0)


def test_device_with_an_index_takes_a_gpu() -> None:
    assert size_workers(make_job(device="cuda:1"), GPU_NODES).gpus == 1.0


@pytest.mark.parametrize(
    ("sizing", "nodes", "text"),
    [
        (
            WorkerSizing(1, 1, 8.0, 1.0),
            [Node("a", 4.0, 0.0)],
            "each asks for 8 CPUs and 1 GPUs, the cluster has 4 CPUs, 0 GPUs on 1 node; ",
        ),
        (
            WorkerSizing(2, 2, 1.5, 0.25),
            GPU_NODES,
            "each asks for 1.5 CPUs and 0.25 GPUs, the cluster has 64 CPUs, 8 GPUs on 2 nodes; ",
        ),
    ],
)
def test_shortage_names_demand_supply_and_settings(sizing: WorkerSizing, nodes: list[Node], text: str) -> None:
    advice = "run again when it is larger, or ask for less (runtime.workers, cpus_per_worker, gpus_per_worker)"
    assert sizing.describe_shortage(nodes) == text + advice
