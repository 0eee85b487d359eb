"""Request for a GPU and the wait for it, on a scripted cluster without Ray."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest

from batchjob.errors import InvalidJob
from batchjob.job.job import Job
from batchjob.pool import ray_gpu_request
from batchjob.pool.autoscaler import Autoscaler
from batchjob.pool.ray_gpu_request import check_machine_gpus, find_gpus
from batchjob.pool.worker_sizing import GpuDemand, Node
from tests.support.scripted_pool import make_job

HEAD = Node("head", 0.0, 0.0)
GPU_NODE = Node("gpu", 8.0, 1.0)
FROM_ZERO = Autoscaler(True)


class ScriptedCluster:
    """Cluster whose nodes and autoscaler are those of the script; the last entry stays.

    Attributes:
        requested: GPUs of the requests that were made.
        cancelled: Number of requests that were taken back.
    """

    def __init__(self, *script: tuple[Sequence[Node], Autoscaler | None]) -> None:
        self._script = list(script)
        self.requested: list[float] = []
        self.cancelled = 0

    def list_nodes(self) -> Sequence[Node]:
        return self._script[0][0]

    def read_autoscaler(self) -> Autoscaler | None:
        return self._script[0][1]

    def request(self, gpus: float) -> str:
        self.requested.append(gpus)
        return "request"

    def renew(self, request: str, gpus: float) -> str:
        if len(self._script) > 1:
            del self._script[0]
        return request

    def cancel(self, request: str) -> None:
        self.cancelled += 1


@pytest.fixture
def install(monkeypatch: pytest.MonkeyPatch) -> Any:
    def install_cluster(*script: tuple[Sequence[Node], Autoscaler | None]) -> ScriptedCluster:
        cluster = ScriptedCluster(*script)
        for name, method in {
            "list_nodes": cluster.list_nodes,
            "read_autoscaler": cluster.read_autoscaler,
            "_request_gpu": cluster.request,
            "_renew": cluster.renew,
            "_cancel": cluster.cancel,
        }.items():
            monkeypatch.setattr(ray_gpu_request, name, method)
        return cluster

    monkeypatch.setattr(ray_gpu_request, "_REPORT_SECONDS", 0.0)
    return install_cluster


@pytest.fixture
def job(tmp_path: Path) -> Job:
    return make_job(tmp_path, [])


def with_runtime(job: Job, **runtime: Any) -> Job:
    return job.model_copy(update={"runtime": job.runtime.model_copy(update={"device": "auto", **runtime})})


def test_gpu_is_asked_for_until_a_node_has_one(install: Any, job: Job) -> None:
    waiting = ([HEAD], Autoscaler(True, None, (("gpu", 1),)))
    cluster = install(([HEAD], FROM_ZERO), waiting, ([HEAD, GPU_NODE], FROM_ZERO))
    notes: list[str] = []
    assert find_gpus(with_runtime(job), "the cluster", notes.append, lambda: False) == GpuDemand(1.0)
    assert (cluster.requested, cluster.cancelled) == ([1.0], 1)
    assert notes[0].startswith("the cluster has 0 CPUs, 0 GPUs on 1 node: asking for a node with a GPU; its autoscaler")


def test_wait_is_told_again_with_what_is_being_started(install: Any, job: Job, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ray_gpu_request, "_NOTICE_SECONDS", -1.0)
    install(([HEAD], FROM_ZERO), ([HEAD], Autoscaler(True, None, (("gpu", 1),))), ([GPU_NODE], FROM_ZERO))
    notes: list[str] = []
    find_gpus(with_runtime(job), "the cluster", notes.append, lambda: False)
    assert "its autoscaler is starting 1 node of type gpu" in notes[1]


def test_cluster_with_gpus_is_asked_for_nothing(install: Any, job: Job) -> None:
    cluster = install(([HEAD, GPU_NODE], FROM_ZERO))
    assert find_gpus(with_runtime(job), "the cluster", pytest.fail, lambda: False) == GpuDemand(1.0)
    assert cluster.requested == []


@pytest.mark.parametrize("autoscaler", [None, Autoscaler(is_active=False)])
def test_auto_on_a_cluster_without_an_autoscaler_computes_on_cpus(
    install: Any, job: Job, autoscaler: Autoscaler | None
) -> None:
    cluster = install(([Node("a", 8.0, 0.0)], autoscaler))
    demand = find_gpus(with_runtime(job), "the cluster", pytest.fail, lambda: False)
    assert demand.missing is not None
    assert (demand.gpus, cluster.requested) == (0.0, [])


def test_request_that_the_autoscaler_refuses_is_taken_back(install: Any, job: Job) -> None:
    script = ([HEAD], FROM_ZERO), ([HEAD], Autoscaler(True, refused=({"GPU": 1.0},)))
    cluster = install(*script)
    demand = find_gpus(with_runtime(job), "the cluster", lambda _: None, lambda: False)
    assert demand.missing is not None
    assert cluster.cancelled == 1
    cluster = install(*script)
    with pytest.raises(InvalidJob, match=r"runtime\.device: cuda asks for 1 GPU"):
        find_gpus(with_runtime(job, device="cuda"), "the cluster", lambda _: None, lambda: False)
    assert cluster.cancelled == 1


def test_wait_ends_with_the_run(install: Any, job: Job) -> None:
    cluster = install(([HEAD], FROM_ZERO))
    assert find_gpus(with_runtime(job), "the cluster", lambda _: None, lambda: True).is_awaited
    assert cluster.cancelled == 1


@pytest.mark.parametrize("runtime", [{"device": "cuda:0"}, {"gpus_per_worker": 1}], ids=str)
def test_machine_without_a_gpu_is_refused_before_ray_starts(
    job: Job, runtime: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(ray_gpu_request, "describe_machine", lambda: Node("this machine", 8.0, 0.0))
    with pytest.raises(InvalidJob, match="this machine has 8 CPUs, 0 GPUs on 1 node, and nothing brings one"):
        check_machine_gpus(with_runtime(job, **runtime))
    check_machine_gpus(with_runtime(job))
