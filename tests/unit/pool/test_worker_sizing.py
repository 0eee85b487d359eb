"""Worker sizing: one worker per GPU, else one per node, unless the job says otherwise."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import pytest

import batchjob
from batchjob.errors import InvalidJob
from batchjob.pool import worker_sizing
from batchjob.pool.autoscaler import NO_AUTOSCALER, Autoscaler, NodeGroup
from batchjob.pool.worker_sizing import GpuDemand, Node, WorkerSizing, choose_gpus, describe_cpu_run

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


def size_workers(job: batchjob.Job, nodes: Sequence[Node]) -> WorkerSizing:
    """Size workers on a cluster without an autoscaler."""
    return worker_sizing.size_workers(job, nodes, choose_gpus(job, nodes, NO_AUTOSCALER, "the cluster").gpus)


@pytest.mark.parametrize(
    ("runtime", "nodes", "sizing"),
    [
        ({}, GPU_NODES, WorkerSizing(8, 1, 8.0, 1.0)),
        ({}, CPU_NODES, WorkerSizing(3, 1, 4.0, 0.0)),
        ({"workers": 2}, CPU_NODES, WorkerSizing(2, 1, 4.0, 0.0)),
        ({"workers": {"min": 2, "max": 5}}, GPU_NODES, WorkerSizing(5, 2, 8.0, 1.0)),
        ({"cpus_per_worker": 2}, CPU_NODES, WorkerSizing(6, 1, 2.0, 0.0)),
        ({"device": "cpu"}, GPU_NODES, WorkerSizing(2, 1, 32.0, 0.0)),
        ({"cpus_per_worker": 16}, GPU_NODES, WorkerSizing(4, 1, 16.0, 1.0)),  # 2 per node, though it has 4 GPUs
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
        (0.1, Node("a", 16.0, 1.0), 10, 1.0),  # in floating point, 1 // 0.1 is 9; 16 * 0.1 / 1 = 1.6
        (0.1, Node("a", 8.0, 2.0), 8, 1.0),  # 10 per GPU, but one CPU each at least
        (0.05, Node("a", 16.0, 1.0), 16, 1.0),  # 20 per GPU, but there are 16 CPUs
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


# -- GPUs that are there, may come, or cannot come -------------------------------------------------------------------

FROM_ZERO = Autoscaler(True)  # it does not tell which nodes may come
WITH_GPUS = Autoscaler(True, (NodeGroup(0.0, 4), NodeGroup(1.0, 8)))
CPUS_ONLY = Autoscaler(True, (NodeGroup(0.0, 4),))


def choose(nodes: Sequence[Node], autoscaler: Autoscaler = NO_AUTOSCALER, **runtime: Any) -> GpuDemand:
    return choose_gpus(make_job(**runtime), nodes, autoscaler, "the cluster")


@pytest.mark.parametrize("autoscaler", [FROM_ZERO, WITH_GPUS])
@pytest.mark.parametrize("runtime", [{}, {"device": "cuda"}, {"gpus_per_worker": 1}, {"gpus_per_worker": 0.5}], ids=str)
def test_gpu_that_may_come_is_awaited(autoscaler: Autoscaler, runtime: dict[str, Any]) -> None:
    assert choose([HEAD_NODE], autoscaler, **runtime) == GpuDemand(runtime.get("gpus_per_worker", 1.0), is_awaited=True)


@pytest.mark.parametrize("autoscaler", [NO_AUTOSCALER, FROM_ZERO])
def test_gpu_that_is_there_is_not_awaited(autoscaler: Autoscaler) -> None:
    assert choose([HEAD_NODE, *GPU_NODES], autoscaler) == GpuDemand(1.0)


@pytest.mark.parametrize("runtime", [{"device": "cpu"}, {"gpus_per_worker": 0}, {"device": "mps"}], ids=str)
def test_job_that_asks_for_no_gpu_waits_for_none(runtime: dict[str, Any]) -> None:
    assert choose([HEAD_NODE], FROM_ZERO, **runtime) == GpuDemand(0.0)


@pytest.mark.parametrize(
    ("autoscaler", "why"),
    [
        (NO_AUTOSCALER, "it has no autoscaler that could bring one"),
        (CPUS_ONLY, "its autoscaler has no node with a GPU"),
        (Autoscaler(True, refused=({"GPU": 1.0},)), "its autoscaler has no node with a GPU"),
        (Autoscaler(True, (NodeGroup(1.0, 0),)), "its autoscaler has no node with a GPU"),
    ],
)
def test_auto_computes_on_cpus_and_says_why_where_no_gpu_can_come(autoscaler: Autoscaler, why: str) -> None:
    demand = choose(CPU_NODES, autoscaler)
    assert demand == GpuDemand(0.0, missing=f"the cluster has 12 CPUs, 0 GPUs on 2 nodes, and {why}")
    assert describe_cpu_run(make_job(), demand, "the cluster") == f"computing on CPUs: {demand.missing}"


@pytest.mark.parametrize(
    ("runtime", "setting"),
    [
        ({"device": "cuda"}, r"runtime\.device: cuda asks for 1 GPU on a node"),
        ({"gpus_per_worker": 1}, r"runtime\.gpus_per_worker: 1 asks for 1 GPU on a node"),
        ({"gpus_per_worker": 8}, r"runtime\.gpus_per_worker: 8 asks for 8 GPUs on a node"),
    ],
)
@pytest.mark.parametrize("autoscaler", [NO_AUTOSCALER, CPUS_ONLY])
def test_gpu_that_is_asked_for_and_cannot_come_is_refused(
    runtime: dict[str, Any], setting: str, autoscaler: Autoscaler
) -> None:
    with pytest.raises(InvalidJob, match=f"{setting} .* but the cluster has 12 CPUs, 0 GPUs on 2 nodes, and "):
        choose(CPU_NODES, autoscaler, **runtime)


def test_worker_for_more_gpus_than_any_node_has_is_refused() -> None:
    with pytest.raises(InvalidJob, match="asks for 8 GPUs on a node for each worker, but the cluster has 64 CPUs, 8"):
        choose(GPU_NODES, gpus_per_worker=8)


def test_request_that_is_refused_for_other_resources_tells_nothing_about_gpus() -> None:
    autoscaler = Autoscaler(True, refused=({"GPU": 1.0, "CPU": 1000.0},))
    assert choose([HEAD_NODE], autoscaler).is_awaited


def test_cpu_run_that_the_job_asks_for_is_said() -> None:
    assert describe_cpu_run(make_job(device="cpu"), GpuDemand(0.0), "the cluster") == (
        "computing on CPUs: on the cluster, as runtime.device and runtime.gpus_per_worker say"
    )
    assert describe_cpu_run(make_job(), GpuDemand(1.0), "the cluster") is None


def test_worker_larger_than_this_machine_is_refused() -> None:
    sizing = size_workers(make_job(cpus_per_worker=16), [Node("a", 8.0, 0.0)])
    with pytest.raises(InvalidJob, match=r"runtime\.cpus_per_worker: each worker asks for 16 CPUs, this machine has 8"):
        sizing.check_machine([Node("a", 8.0, 0.0)])


def test_shortage_names_what_may_come() -> None:
    autoscaler = Autoscaler(True, (NodeGroup(4.0, 2),), (("gpu", 1),))
    text = WorkerSizing(1, 1, 8.0, 1.0).describe_shortage([HEAD_NODE], autoscaler)
    assert "its autoscaler is starting 1 node of type gpu, at most 8 GPUs may come; run again when" in text
