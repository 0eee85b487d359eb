"""A cluster's last answer stays at hand while the next one is due."""

from __future__ import annotations

from batchjob.pool.ray_cluster import Pulse


def test_the_first_answer_is_there_at_once_and_its_nodes_live() -> None:
    pulse = Pulse(list[str], ["one"])
    assert pulse.nodes == ["one"]
    assert pulse.lost() is None
    pulse.stop()


def test_a_cluster_without_nodes_is_lost() -> None:
    pulse = Pulse(list[str], [])
    assert pulse.lost() == "has lost all its nodes"
    pulse.stop()
