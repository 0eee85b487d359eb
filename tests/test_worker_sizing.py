"""Worker sizing: one worker per GPU, else one per node, unless the job says otherwise."""

from __future__ import annotations

from typing import Any

import pytest

import batchjob
from batchjob.errors import InvalidJob
from batchjob.pool.worker_sizing import Node, WorkerSizing, size_workers

GPU_NODES = [Node("a", 32.0, 4.0), Node("b", 32.0, 4.0)]
CPU_NODES = [Node("a", 8.0, 0.0), Node("b", 4.0, 0.0)]


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
