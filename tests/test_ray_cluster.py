"""Health of a Ray cluster, without Ray: the latest answer stays available, and a lost cluster is noticed."""

from __future__ import annotations

from batchjob.pool.ray_cluster import ClusterHealth
from batchjob.pool.worker_sizing import Node

NODE = Node("0123456789ab", 8.0, 0.0)


def test_first_answer_is_available_at_once() -> None:
    health = ClusterHealth(list[Node], [NODE])
    assert health.nodes == [NODE]
    assert health.find_failure() is None
    health.stop()


def test_cluster_without_nodes_is_lost() -> None:
    health = ClusterHealth(list[Node], [])
    assert health.find_failure() == "has lost all its nodes"
    health.stop()
