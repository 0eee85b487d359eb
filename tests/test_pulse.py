"""A cluster's last answer stays at hand while the next one is due."""

from __future__ import annotations

from batchjob.pool.ray_cluster import ClusterHealth


def test_the_first_answer_is_there_at_once_and_its_nodes_live() -> None:
    pulse = ClusterHealth(list[str], ["one"])
    assert pulse.nodes == ["one"]
    assert pulse.find_failure() is None
    pulse.stop()


def test_a_cluster_without_nodes_is_lost() -> None:
    pulse = ClusterHealth(list[str], [])
    assert pulse.find_failure() == "has lost all its nodes"
    pulse.stop()
