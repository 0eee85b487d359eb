"""Request for a GPU on a cluster that scales from zero, and the wait until a node with one is there."""

from __future__ import annotations

import time
from collections.abc import Callable
from contextlib import suppress
from typing import Any

from batchjob.job.job import Job
from batchjob.pool.autoscaler import NO_AUTOSCALER, Autoscaler
from batchjob.pool.ray_cluster import describe_machine, list_nodes, read_autoscaler
from batchjob.pool.worker_sizing import GpuDemand, choose_gpus, describe_nodes

__all__ = ["check_machine_gpus", "find_gpus"]

_POLL_SECONDS = 2.0
_NOTICE_SECONDS = 30.0
# Ray's monitor reports every 5 s, but not in a cluster's first seconds. A run must not take that for "no autoscaler".
_REPORT_SECONDS = 30.0


def check_machine_gpus(job: Job) -> None:
    """Check that this machine has the GPUs that the job asks for.

    Raises:
        InvalidJob: It does not.
    """
    choose_gpus(job, [describe_machine()], NO_AUTOSCALER, "this machine")


def find_gpus(job: Job, cluster: str, note: Callable[[str], object], is_stopped: Callable[[], bool]) -> GpuDemand:
    """Choose the GPUs of each worker; where the cluster may bring them, ask for one and wait until it is there.

    The wait has no end of its own: the pool ends it with the run. One GPU is asked for, because the size of the workers
    follows from the node that comes.

    Args:
        job: The job.
        cluster: The cluster in words.
        note: Gets lines for the user.
        is_stopped: Returns True once nobody waits for the answer any more.

    Raises:
        InvalidJob: See `choose_gpus`.
    """
    nodes = list_nodes()
    if not choose_gpus(job, nodes, Autoscaler(is_active=True), cluster).is_awaited:
        return choose_gpus(job, nodes, NO_AUTOSCALER, cluster)
    autoscaler = _wait_for_report()
    demand = choose_gpus(job, nodes, autoscaler, cluster)
    if not demand.is_awaited:
        return demand
    note(f"{cluster} has {describe_nodes(nodes)}: asking for a node with a GPU; {autoscaler.describe()}")
    noted = time.monotonic()
    request = _request_gpu(demand.gpus)
    try:
        while not is_stopped():
            request = _renew(request, demand.gpus)
            nodes, autoscaler = list_nodes(), read_autoscaler() or autoscaler
            demand = choose_gpus(job, nodes, autoscaler, cluster)
            if not demand.is_awaited:
                break
            if time.monotonic() - noted > _NOTICE_SECONDS:
                noted = time.monotonic()
                note(f"waiting for a node with a GPU: {cluster} has {describe_nodes(nodes)}, {autoscaler.describe()}")
    finally:
        _cancel(request)
    return demand


def _wait_for_report() -> Autoscaler:
    deadline = time.monotonic() + _REPORT_SECONDS
    while (autoscaler := read_autoscaler()) is None and time.monotonic() < deadline:
        time.sleep(0.5)
    return autoscaler or NO_AUTOSCALER


def _request_gpu(gpus: float) -> Any:
    """Submit a task that needs GPUs and does nothing: an autoscaler brings nodes for tasks that fit nowhere.

    Unlike `ray.autoscaler.sdk.request_resources`, it ends with this driver, even if it is killed.
    """
    import ray

    return ray.remote(num_cpus=0, num_gpus=gpus, max_retries=0)(_do_nothing).remote()


def _renew(request: Any, gpus: float) -> Any:
    """Wait a while for the request; return it, or another one if it was granted."""
    import ray

    granted, _ = ray.wait([request], timeout=_POLL_SECONDS)
    if not granted:
        return request
    ray.get(granted)
    return _request_gpu(gpus)


def _cancel(request: Any) -> None:
    import ray

    with suppress(Exception):  # without a cluster there is nothing to cancel
        ray.cancel(request, force=True)


def _do_nothing() -> None:
    pass
