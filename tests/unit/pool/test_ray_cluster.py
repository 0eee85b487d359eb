"""A Ray cluster, without Ray: the latest answer is kept, a lost cluster is noticed, its autoscaler is read."""

from __future__ import annotations

import threading
from collections.abc import Sequence

import pytest

from batchjob.pool.ray_cluster import ClusterHealth, actor_runtime_env
from batchjob.pool.worker_sizing import Node

NODE = Node("0123456789ab", 8.0, 0.0)
OTHER_NODE = Node("ba9876543210", 4.0, 0.0)


class ScriptedCluster:
    """Cluster that gives one answer after another: nodes, or an exception. After the last answer it hangs.

    Attributes:
        silent: Set once all answers have been taken in.
    """

    def __init__(self, *answers: Sequence[Node] | Exception) -> None:
        self._answers = iter(answers)
        self._released = threading.Event()
        self.silent = threading.Event()

    def list_nodes(self) -> Sequence[Node]:
        answer = next(self._answers, None)
        if answer is None:
            self.silent.set()
            self._released.wait()
            raise ConnectionError("released")
        if isinstance(answer, Exception):
            raise answer
        return answer

    def release(self) -> None:
        self._released.set()


@pytest.fixture
def fast_poll(monkeypatch: pytest.MonkeyPatch) -> None:
    """Poll the cluster without a pause."""
    monkeypatch.setattr("batchjob.pool.ray_cluster._POLL_SECONDS", 0.001)


def test_first_answer_is_available_at_once() -> None:
    health = ClusterHealth(list[Node], [NODE])
    assert health.nodes == [NODE]
    assert health.find_failure() is None
    health.stop()


def test_cluster_without_nodes_is_lost() -> None:
    health = ClusterHealth(list[Node], [])
    assert health.find_failure() == "has lost all its nodes"
    health.stop()


@pytest.mark.usefixtures("fast_poll")
def test_latest_answer_replaces_the_first() -> None:
    cluster = ScriptedCluster([NODE, OTHER_NODE], [OTHER_NODE])
    health = ClusterHealth(cluster.list_nodes, [NODE])
    assert cluster.silent.wait(30)
    assert health.nodes == [OTHER_NODE]
    health.stop()
    cluster.release()


@pytest.mark.usefixtures("fast_poll")
def test_error_of_the_cluster_keeps_the_nodes_and_the_polling() -> None:
    cluster = ScriptedCluster(ConnectionError("no head node"), [NODE, OTHER_NODE], RuntimeError("a bug"))
    health = ClusterHealth(cluster.list_nodes, [NODE])
    assert cluster.silent.wait(30)
    assert health.nodes == [NODE, OTHER_NODE]
    assert health.find_failure() is None
    health.stop()
    cluster.release()


@pytest.mark.usefixtures("fast_poll")
def test_cluster_that_loses_its_last_node_is_lost() -> None:
    cluster = ScriptedCluster([])
    health = ClusterHealth(cluster.list_nodes, [NODE])
    assert cluster.silent.wait(30)
    assert health.find_failure() == "has lost all its nodes"
    health.stop()
    cluster.release()


@pytest.mark.usefixtures("fast_poll")
def test_cluster_that_hangs_fails_although_its_nodes_were_well(monkeypatch: pytest.MonkeyPatch) -> None:
    cluster = ScriptedCluster()
    health = ClusterHealth(cluster.list_nodes, [NODE])
    assert cluster.silent.wait(30)
    assert health.find_failure() is None, "it has been silent for less than 30 s"
    monkeypatch.setattr("batchjob.pool.ray_cluster._MAX_SILENCE_SECONDS", 0.0)
    assert health.find_failure() == "has not answered for 0 s"
    health.stop()
    cluster.release()


@pytest.mark.usefixtures("fast_poll")
def test_stopped_health_asks_no_more() -> None:
    before = set(threading.enumerate())
    health = ClusterHealth(lambda: [NODE], [NODE])
    (thread,) = set(threading.enumerate()) - before
    health.stop()
    thread.join(30)
    assert not thread.is_alive()


def test_actor_on_a_cluster_sees_no_gpu_that_it_did_not_ask_for() -> None:
    assert actor_runtime_env("ray://head:10001") == {"env_vars": {"RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO": "1"}}


def test_actor_on_this_machine_has_no_environment_of_its_own() -> None:
    """With an environment, Ray starts the actor's process late."""
    assert actor_runtime_env(None) is None
