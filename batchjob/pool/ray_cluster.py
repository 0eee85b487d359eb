"""Ray cluster as a run uses it: connect, list the live nodes, read its autoscaler, notice that the cluster is lost.

`ray` is imported inside functions: only the pool's own thread waits for it, and a missing package gets its own message.
"""

from __future__ import annotations

import json
import os
import threading
import time
from collections import Counter
from collections.abc import Callable, Sequence
from contextlib import suppress
from typing import Any

from batchjob.concurrency import terminal_signals_blocked
from batchjob.job.job import Job
from batchjob.pool.autoscaler import NO_AUTOSCALER, Autoscaler, NodeGroup, read_autoscaling_status
from batchjob.pool.ray_address import check_cluster, token_error
from batchjob.pool.ray_job_folder import build_runtime_env, folder_too_large_error
from batchjob.pool.worker_sizing import Node
from batchjob.system import available_cores

__all__ = [
    "NODE_ID_DIGITS",
    "ClusterHealth",
    "actor_runtime_env",
    "connect",
    "describe_machine",
    "list_nodes",
    "read_autoscaler",
]

NODE_ID_DIGITS = 12  # enough to tell nodes apart

# Only events go through Ray's object store. What it takes of /dev/shm is missing for the batches of the loaders.
_OBJECT_STORE_BYTES = 128 << 20
_POLL_SECONDS = 5.0
# Without a head node, Ray ends the driver's process after 60 s, with an exit code of its own.
_MAX_SILENCE_SECONDS = 30.0
# Without it, a worker that asks for no GPU sees all of them.
_HIDE_GPUS = "RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO"
_ANSWER_SECONDS = 5.0
_TOO_LARGE = "exceeds the maximum size"  # in Ray's error about the job's folder


def connect(job: Job, address: str | None) -> None:
    """Connect to a cluster and ship the job's folder there, or start a Ray on this machine.

    Args:
        job: The job.
        address: Address of the cluster; None starts a Ray that ends with this process.

    Raises:
        InvalidJob: The cluster refuses the token, or the job's folder is too large for it.
        Temporary: No Ray answers at the address.
    """
    import ray

    os.environ.setdefault(_HIDE_GPUS, "1")
    quiet: dict[str, Any] = {"log_to_driver": False, "logging_level": "error", "configure_logging": True}
    if not address:
        # Ray blocks only SIGINT in its processes: without this they would end with the terminal, before the run does.
        with terminal_signals_blocked():
            ray.init(address="local", include_dashboard=False, object_store_memory=_OBJECT_STORE_BYTES, **quiet)
        return
    check_cluster(address)
    try:
        ray.init(address=address, runtime_env=build_runtime_env(job), **quiet)
    except ray.exceptions.AuthenticationError as error:
        raise token_error(address) from error
    except Exception as error:
        if _TOO_LARGE not in _chain_text(error):
            raise
        raise folder_too_large_error(job) from error


def describe_machine() -> Node:
    """Return this machine as the node of a Ray that is started here, before it is started."""
    from ray._private.accelerators import get_accelerator_manager_for_resource

    manager = get_accelerator_manager_for_resource("GPU")
    gpus = manager.get_current_node_num_accelerators() if manager is not None else 0
    return Node("this machine", float(available_cores()), float(gpus))


def list_nodes() -> list[Node]:
    """Return the live nodes."""
    import ray

    return [
        Node(node["NodeID"][:NODE_ID_DIGITS], node["Resources"].get("CPU", 0.0), node["Resources"].get("GPU", 0.0))
        for node in ray.nodes()
        if node["Alive"]
    ]


def read_autoscaler() -> Autoscaler | None:
    """Return the cluster's autoscaler; None if it has not reported yet, as in a cluster's first seconds."""
    from ray._private.state import state
    from ray._private.worker import global_worker
    from ray.core.generated import autoscaler_pb2
    from ray.experimental.internal_kv import _internal_kv_get

    config = state.get_cluster_config()
    groups = None
    if config is not None and config.node_group_configs:
        groups = tuple(
            NodeGroup(float(group.resources.get("GPU", 0)), None if group.max_count < 0 else group.max_count)
            for group in config.node_group_configs
        )
    worker: Any = global_worker
    messages: Any = autoscaler_pb2
    answer = worker.gcs_client.get_cluster_status(timeout_s=_ANSWER_SECONDS)
    reply = messages.GetClusterStatusReply.FromString(answer)
    if reply.autoscaling_state.autoscaler_state_version:  # the autoscaler v2
        return _read_autoscaling_state(reply, groups)
    status = _internal_kv_get(b"__autoscaling_status")
    return read_autoscaling_status(json.loads(status), groups) if status else None


def _read_autoscaling_state(reply: Any, groups: tuple[NodeGroup, ...] | None) -> Autoscaler:
    """Return the autoscaler of a `GetClusterStatusReply` (autoscaler v2)."""
    state = reply.autoscaling_state
    pending = Counter[str]()
    for request in state.pending_instance_requests:
        pending[request.ray_node_type_name] += request.count
    pending.update(instance.ray_node_type_name for instance in state.pending_instances)
    types = [node.ray_node_type_name for node in reply.cluster_resource_state.node_states]
    refused = tuple(dict(request.resources_bundle) for request in state.infeasible_resource_requests)
    is_active = bool(pending) or any(name and not name.startswith("node_") for name in types)
    return Autoscaler(is_active, groups, tuple(sorted(pending.items())), refused) if is_active else NO_AUTOSCALER


def actor_runtime_env(address: str | None) -> dict[str, Any] | None:
    """Return Ray's `runtime_env` of an actor; None for a Ray on this machine, which has our environment.

    A Ray on this machine starts the processes of workers together with itself, unless they ask for an environment.
    """
    return {"env_vars": {_HIDE_GPUS: "1"}} if address else None


def _chain_text(error: BaseException | None) -> str:
    """Return the texts of an error and of its causes."""
    return "" if error is None else f"{error} {_chain_text(error.__cause__ or error.__context__)}"


class ClusterHealth:
    """Polls the live nodes of a cluster, in a thread of its own: Ray's calls may hang without an error.

    Args:
        list_nodes: Returns the live nodes. It may hang or raise.
        nodes: The first answer.
        read_autoscaler: Returns the autoscaler, None if it does not report now. It may hang or raise.

    Attributes:
        nodes: The latest answer.
        autoscaler: Latest answer about the autoscaler.
    """

    def __init__(
        self,
        list_nodes: Callable[[], Sequence[Node]],
        nodes: Sequence[Node],
        read_autoscaler: Callable[[], Autoscaler | None] = lambda: None,
    ) -> None:
        self._list_nodes, self.nodes = list_nodes, nodes
        self._read_autoscaler, self.autoscaler = read_autoscaler, NO_AUTOSCALER
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
                self.autoscaler = self._read_autoscaler() or self.autoscaler
