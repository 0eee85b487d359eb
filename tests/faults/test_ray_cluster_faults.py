"""Ray clusters whose processes are killed or stopped, and whose nodes go away: each image has exactly one row."""

from __future__ import annotations

import os
import random
import signal
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest

from tests.support.batchjob_process import (
    Command,
    delete_lease,
    filter_alive,
    find_descendants,
    kill,
    kill_on_exit,
    read_all_footers,
    read_command_line,
    read_rows,
    start_batchjob,
    wait_until,
    write_slow_job,
)
from tests.support.figures import Figure
from tests.support.harmful_job import CUDA_ASSERT, CUDA_ECC_ERROR, write_harmful_job

pytestmark = pytest.mark.ray

IMAGES, SHARD = 240, 4
STALL_SECONDS = 6
LOADER_STOPPED_SECONDS = 4  # after which a stopped loader process is replaced
SHARDS_PER_WORKER = 4
# Ray declares a node dead that does not answer for some 5 s; by default, for half a minute.
FAST_HEALTH_CHECKS = {
    "health_check_period_ms": 500,
    "health_check_timeout_ms": 1500,
    "health_check_failure_threshold": 3,
}


@dataclass
class LocalCluster:
    """A cluster of a head without workers, and nodes for one worker or more each.

    Attributes:
        cluster: Ray's object.
        nodes: Nodes that were added and not removed.
    """

    cluster: Any
    nodes: list[Any] = field(default_factory=list)

    def add_node(self, workers: int = 1, **environment: str) -> None:
        """Add a node for so many workers, which see this environment."""
        self.nodes.append(self.cluster.add_node(num_cpus=workers, env_vars=environment or None))

    def raylet_pid(self, node: Any) -> int:
        """Return the process id of a node's raylet."""
        return int(node.all_processes["raylet"][0].process.pid)

    def find_actors(self) -> list[int]:
        """Return the process ids of the workers that run now."""
        descendants = {pid for node in self.nodes for pid, _ in find_descendants(self.raylet_pid(node))}
        return sorted(pid for pid in descendants if "ray::RayWorker" in read_command_line(pid))

    def find_loaders(self) -> list[int]:
        """Return the process ids of the loaders: children of a fork server, which is a child of a worker."""
        servers = {child for actor in self.find_actors() for child, _ in find_descendants(actor)}
        return sorted({pid for server in servers for pid, _ in find_descendants(server)})

    def remove_node(self, node: Any, graceful: bool = False) -> None:
        """Remove a node with all its processes."""
        self.nodes.remove(node)
        self.cluster.remove_node(node, allow_graceful=graceful)


# If BATCHJOB_TEST_HARM is set, all workers but the first raise it. Every other batch waits until two workers have
# failed, and takes a while then.
SHARING_NET = """\
import os
import time
from contextlib import suppress
from pathlib import Path

from torch import nn


class Sharing(nn.Module):
    def forward(self, x):
        if x[:, 0].amin() == 1 and x[:, 1].amax() == 0:  # the picture, not a warm-up
            work(os.environ.get("BATCHJOB_TEST_HARM"), Path(os.environ["BATCHJOB_TEST_MARKS"]))
        return x.mean(dim=(2, 3))


def work(harm, marks):
    if harm and not is_first(marks / "first"):
        (marks / f"fault-{os.getpid()}").touch()
        raise RuntimeError(harm)
    deadline = time.monotonic() + 100
    while len(list(marks.glob("fault-*"))) < 2 and time.monotonic() < deadline:
        time.sleep(0.05)
    time.sleep(0.2)
    if harm:
        with (marks / "done").open("ab") as done:
            done.write(b".")


def is_first(mark):
    with suppress(FileExistsError), mark.open("x") as file:
        file.write(f"{os.getpid()}")
    return mark.read_text() == f"{os.getpid()}"


def make():
    return Sharing()
"""


def write_sharing_job(folder: Path, images: int) -> Path:
    """Write a job over one picture, so many times; return the folder in which its workers leave marks."""
    job, marks = folder / "job.yaml", folder / "marks"
    write_slow_job(folder, images)
    (folder / "sharing.py").write_text(SHARING_NET)
    job.write_text(job.read_text().replace("slow:make", "sharing:make"))
    marks.mkdir()
    return marks


@contextmanager
def start_cluster(nodes: int = 2) -> Iterator[LocalCluster]:
    """Start a cluster of so many nodes; end all of them on exit."""
    from ray.cluster_utils import Cluster

    cluster = Cluster(
        initialize_head=True,
        head_node_args={"num_cpus": 0, "include_dashboard": False, "_system_config": FAST_HEALTH_CHECKS},
    )
    local_cluster = LocalCluster(cluster)
    try:
        for _ in range(nodes):
            local_cluster.add_node()
        yield local_cluster
    finally:
        for node in local_cluster.nodes:
            with suppress(ProcessLookupError):
                os.kill(local_cluster.raylet_pid(node), signal.SIGCONT)
        cluster.shutdown()


@dataclass
class ClusterJob:
    """A job on a cluster."""

    cluster: LocalCluster
    folder: Path

    @property
    def output(self) -> Path:
        return self.folder / "out"

    def start(self, *more: str, workers: int = 2, processes: int = 0, nap: str = "0.3") -> Command:
        settings = ["runtime.pool=ray", f"runtime.workers={workers}", "runtime.cpus_per_worker=1"]
        settings += [f"runtime.loader.processes={processes}", f"runtime.stall_seconds={STALL_SECONDS}"]
        env = {"RAY_ADDRESS": self.cluster.cluster.address, "BATCHJOB_TEST_NAP": nap}
        return start_batchjob("run", str(self.folder / "job.yaml"), "--json", *settings, *more, env=env)

    def read_attempts(self) -> Mapping[str, str]:
        """Return the attempt that made each committed part."""
        return {key: footer.attempt for key, footer in read_all_footers(self.output).items()}

    def wait_for_parts(self, driver: Command, more: int = 2) -> None:
        """Wait until so many more parts are committed."""
        before = len(self.read_attempts())
        wait_until(lambda: len(self.read_attempts()) >= min(before + more, IMAGES // SHARD), command=driver)

    def check_rows(self, images: int = IMAGES) -> None:
        """Check that each image has exactly one row."""
        assert sorted(read_rows(self.output)["position"].to_pylist()) == list(range(images))

    def check_no_error_rows(self, images: int) -> None:
        """Check that each image has exactly one row, without an error."""
        self.check_rows(images)
        assert read_rows(self.output)["error_stage"].null_count == images


def kill_victim(job: ClusterJob, driver: Command, chance: random.Random, victim: str) -> None:
    """Kill a process of this kind, as soon as there is one, or remove a node."""
    cluster = job.cluster
    match victim:
        case "actor" | "loader":
            find: Callable[[], list[int]] = cluster.find_actors if victim == "actor" else cluster.find_loaders
            os.kill(chance.choice(wait_until(find, command=driver)), signal.SIGKILL)
        case "raylet":
            node = chance.choice(cluster.nodes)
            os.kill(cluster.raylet_pid(node), signal.SIGKILL)
            cluster.remove_node(node)
            cluster.add_node()
        case "node":
            cluster.remove_node(chance.choice(cluster.nodes), graceful=True)
            cluster.add_node()


def test_killed_actors_loaders_raylets_nodes_and_drivers_lose_no_row(
    tmp_path: Path, seed: int, figure: Figure, monkeypatch: pytest.MonkeyPatch
) -> None:
    chance = random.Random(seed)
    write_slow_job(tmp_path, IMAGES)
    monkeypatch.setenv("BATCHJOB_TEST_NAP", "0.6")  # actors have the environment of their nodes
    victims = chance.sample(["actor", "loader", "raylet", "node"], 4)
    with start_cluster() as cluster:
        job = ClusterJob(cluster, tmp_path)
        with kill_on_exit(job.start(processes=1)) as driver:
            job.wait_for_parts(driver)
            for victim in victims[:2]:
                kill_victim(job, driver, chance, victim)
                job.wait_for_parts(driver)
            processes = kill(driver)
        wait_until(lambda: not filter_alive(processes), timeout=60)
        committed = job.read_attempts()
        delete_lease(job.output)
        with kill_on_exit(job.start(processes=1)) as driver:
            job.wait_for_parts(driver)
            for victim in victims[2:]:
                kill_victim(job, driver, chance, victim)
                job.wait_for_parts(driver)
            completed = driver.wait()
    assert (completed.exit_code, completed.json_result["status"]) == (0, "complete"), completed.stderr
    assert committed.items() <= job.read_attempts().items(), "a committed part was made again"
    job.check_rows()
    figure("every image exactly once", f"Ray: {', '.join(victims)} and the driver killed; 0 missing, 0 twice")
    figure("resume", f"Ray: driver killed at {len(committed)} of {IMAGES // SHARD} parts, 0 redone")


@pytest.mark.parametrize("victim", ["actor", "raylet"])
def test_stopped_actor_or_raylet_is_replaced_and_does_no_harm_later(
    tmp_path: Path, seed: int, figure: Figure, victim: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    chance = random.Random(seed)
    write_slow_job(tmp_path, IMAGES)
    monkeypatch.setenv("BATCHJOB_TEST_NAP", "1")  # actors have the environment of their nodes
    with start_cluster() as cluster:
        job = ClusterJob(cluster, tmp_path)
        with kill_on_exit(job.start(nap="1")) as driver:
            wait_until(lambda: len(cluster.find_actors()) == 2, command=driver)
            job.wait_for_parts(driver)
            stopped = (
                chance.choice(cluster.find_actors())
                if victim == "actor"
                else cluster.raylet_pid(chance.choice(cluster.nodes))
            )
            os.kill(stopped, signal.SIGSTOP)
            if victim == "actor":
                wait_until(lambda: stopped not in cluster.find_actors(), command=driver)  # killed while it is stopped
            else:
                job.wait_for_parts(driver, 12)
            with suppress(ProcessLookupError):
                os.kill(stopped, signal.SIGCONT)
            completed = driver.wait()
    print(completed.stderr[-1500:])
    assert (completed.exit_code, completed.json_result["status"]) == (0, "complete"), completed.stderr
    assert victim == "raylet" or "has not answered for" in completed.stderr
    job.check_rows()
    figure("a worker that does not move is replaced", f"Ray: {victim} stopped and woken; 0 missing, 0 twice")


def test_stopped_loaders_continue_or_are_replaced(
    tmp_path: Path, seed: int, figure: Figure, monkeypatch: pytest.MonkeyPatch
) -> None:
    """One is continued in time; the other one is not, and only its batches are loaded again."""
    chance, images = random.Random(seed), 160
    write_slow_job(tmp_path, images)
    monkeypatch.setenv("BATCHJOB_TEST_NAP", "0.4")  # actors have the environment of their nodes
    with start_cluster() as cluster:
        job = ClusterJob(cluster, tmp_path)
        with kill_on_exit(job.start(f"runtime.loader.image_seconds={LOADER_STOPPED_SECONDS}", processes=1)) as driver:
            wait_until(lambda: len(cluster.find_loaders()) == 2, command=driver)
            job.wait_for_parts(driver)
            stopped = chance.sample(cluster.find_loaders(), 2)
            for pid in stopped:
                os.kill(pid, signal.SIGSTOP)
            job.wait_for_parts(driver, 1)
            with suppress(ProcessLookupError):
                os.kill(stopped[0], signal.SIGCONT)
            wait_until(lambda: stopped[1] not in cluster.find_loaders(), command=driver)  # killed while it is stopped
            has_continued = stopped[0] in cluster.find_loaders()
            completed = driver.wait()
    print(completed.stderr[-1500:])
    assert (completed.exit_code, completed.json_result["status"]) == (0, "complete"), completed.stderr
    assert "was lost" not in completed.stderr, "a worker must survive the death of its loader"
    job.check_no_error_rows(images)
    outcome = "continued" if has_continued else "was continued too late"
    figure(
        "a worker that does not move is replaced",
        f"Ray: 2 loaders stopped, one {outcome}, one was replaced; 0 workers lost, 0 missing, 0 twice",
    )


def test_all_workers_leave_a_device_that_fails_twice(tmp_path: Path, figure: Figure) -> None:
    """One of two workers fails, and so does its replacement: the other one is retired; no attempt is used up."""
    images = 160
    marks = write_sharing_job(tmp_path, images)
    with start_cluster(nodes=0) as cluster:
        cluster.add_node(2, BATCHJOB_TEST_MARKS=str(marks), BATCHJOB_TEST_HARM=CUDA_ECC_ERROR)
        cluster.add_node(1, BATCHJOB_TEST_MARKS=str(marks))
        job = ClusterJob(cluster, tmp_path)
        settings = ["runtime.workers={min: 3, max: 3}", "errors.attempts=1", "runtime.stall_seconds=120"]
        with kill_on_exit(job.start(*settings)) as driver:
            completed = driver.wait()
    print(completed.stderr[-3000:])
    assert (completed.exit_code, completed.json_result["status"]) == (0, "complete"), completed.stderr
    job.check_no_error_rows(images)
    batches = len((marks / "done").read_bytes())
    assert len(list(marks.glob("fault-*"))) == 2
    assert batches <= 2 * SHARDS_PER_WORKER < images // SHARD // 3, "it went on with the banned device"
    assert "was put to rest: cpu on" in completed.stderr
    figure(
        "a device that fails is banned",
        f"Ray: 2 workers on one device, 2 faults: the one without a fault did {batches} of {images // SHARD} shards",
    )


def test_failing_device_is_banned_and_without_any_device_the_run_is_temporary(tmp_path: Path, figure: Figure) -> None:
    images = 96
    write_harmful_job(tmp_path, images, black_positions=range(images))
    with start_cluster(nodes=0) as cluster:
        cluster.add_node(BATCHJOB_TEST_HARM=CUDA_ECC_ERROR)
        job = ClusterJob(cluster, tmp_path)
        with kill_on_exit(job.start()) as driver:
            completed = driver.wait()
        assert (completed.exit_code, completed.json_result["status"]) == (75, "temporary"), completed.stderr
        assert "no device is left that works, cpu on" in completed.json_result["message"]
        delete_lease(job.output)
        cluster.add_node()
        with kill_on_exit(job.start()) as driver:
            completed = driver.wait()
    print(completed.stderr[-2000:])
    assert (completed.exit_code, completed.json_result["status"]) == (0, "complete"), completed.stderr
    assert not completed.json_result["failed"]
    job.check_rows(images)
    figure("a device that fails is banned", "Ray: 2 faults, then the other node did all; alone: exit 75; 0 error rows")


def test_images_that_break_the_device_become_error_rows_and_ban_no_device(
    tmp_path: Path, seed: int, figure: Figure
) -> None:
    images = 64
    black = sorted(random.Random(seed).sample(range(images), 2))
    write_harmful_job(tmp_path, images, black)
    with start_cluster(nodes=0) as cluster:
        for _ in range(2):
            cluster.add_node(BATCHJOB_TEST_HARM=CUDA_ASSERT)
        job = ClusterJob(cluster, tmp_path)
        with kill_on_exit(job.start()) as driver:
            completed = driver.wait()
    print(completed.stderr[-3000:])
    assert (completed.exit_code, completed.json_result["status"]) == (0, "complete"), completed.stderr
    assert "used no more" not in completed.stderr
    job.check_rows(images)
    error_types = {
        row["position"]: row["error_type"] for row in read_rows(job.output).to_pylist() if row["error_stage"]
    }
    assert error_types == dict.fromkeys(black, "device")
    deaths = Counter("failed: RuntimeError" in line for line in completed.stderr.splitlines())[True]
    figure("poison", f"Ray: {len(black)} images that break the context, {deaths} failed attempts, all other rows right")
