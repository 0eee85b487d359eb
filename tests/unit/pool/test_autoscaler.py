"""Autoscaler of a cluster, from the reports of Ray's monitor: at work or not, and what it is starting."""

from __future__ import annotations

from typing import Any

import pytest
from ray.core.generated import autoscaler_pb2

from batchjob.pool.autoscaler import NO_AUTOSCALER, Autoscaler, NodeGroup, read_autoscaling_status
from batchjob.pool.ray_cluster import _read_autoscaling_state


def report(**values: Any) -> dict[str, Any]:
    return {"autoscaler_report": {"active_nodes": {}, "pending_nodes": [], "pending_launches": {}, **values}}


def test_cluster_of_nodes_started_by_hand_has_no_autoscaler() -> None:
    status = report(active_nodes={"node_7478a6e571fe": 1, "node_0123": 1})
    assert read_autoscaling_status(status, None) == NO_AUTOSCALER


@pytest.mark.parametrize("status", [{}, {"autoscaler_report": None}, report()])
def test_status_without_nodes_tells_nothing_yet(status: dict[str, Any]) -> None:
    assert read_autoscaling_status(status, None) is None


def test_cluster_with_node_types_has_an_autoscaler() -> None:
    assert read_autoscaling_status(report(active_nodes={"ray.head.default": 1}), None) == Autoscaler(True)


def test_nodes_that_are_launched_and_that_start_are_pending() -> None:
    status = report(
        active_nodes={"head": 1}, pending_launches={"gpu": 2}, pending_nodes=[["10.0.0.7", "gpu", "setting-up"]]
    )
    autoscaler = read_autoscaling_status(status, (NodeGroup(1.0, 8),))
    assert autoscaler is not None
    assert autoscaler.pending == (("gpu", 3),)
    assert autoscaler.describe() == "its autoscaler is starting 3 nodes of type gpu, at most 8 GPUs may come"


@pytest.mark.parametrize(
    ("autoscaler", "text"),
    [
        (NO_AUTOSCALER, "no autoscaler is at work"),
        (Autoscaler(True), "its autoscaler is starting no node, and does not tell which nodes may come"),
        (Autoscaler(True, (NodeGroup(0.5),)), "its autoscaler is starting no node, any number of GPUs may come"),
        (Autoscaler(True, (NodeGroup(0.0),)), "its autoscaler is starting no node, at most 0 GPUs may come"),
    ],
)
def test_autoscaler_is_described(autoscaler: Autoscaler, text: str) -> None:
    assert autoscaler.describe() == text


def test_state_of_the_second_autoscaler_names_pending_and_refused_requests() -> None:
    messages: Any = autoscaler_pb2
    reply = messages.GetClusterStatusReply()
    reply.cluster_resource_state.node_states.add(ray_node_type_name="headgroup")
    reply.autoscaling_state.pending_instance_requests.add(ray_node_type_name="gpu", count=2)
    reply.autoscaling_state.pending_instances.add(ray_node_type_name="gpu")
    reply.autoscaling_state.infeasible_resource_requests.add(resources_bundle={"GPU": 4.0})
    autoscaler = _read_autoscaling_state(reply, None)
    assert autoscaler == Autoscaler(True, None, (("gpu", 3),), ({"GPU": 4.0},))
    assert not autoscaler.may_bring(4.0)
    assert autoscaler.may_bring(1.0)


@pytest.mark.parametrize("node_type", ["", "node_7478a6e571fe"])
def test_state_without_node_types_is_of_no_autoscaler(node_type: str) -> None:
    messages: Any = autoscaler_pb2
    reply = messages.GetClusterStatusReply()
    reply.cluster_resource_state.node_states.add(ray_node_type_name=node_type)
    assert _read_autoscaling_state(reply, None) == NO_AUTOSCALER
