"""Ray clusters whose processes are killed, stopped and taken away: every image has its row, once."""

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
from commands import Command, alive, descendants, ends, footers, forget_lease, kill, start, table, until, write_slow_job
from figures import Figure
from lost import ASSERT, ECC, write_harmful_job

IMAGES, SHARD = 240, 4
STALL_SECONDS = 6
# A node that does not answer is dead after some 5 s; as Ray is shipped, after half a minute.
IMPATIENT = {"health_check_period_ms": 500, "health_check_timeout_ms": 1500, "health_check_failure_threshold": 3}


@dataclass
class Machines:
    """A cluster: a head without room for workers, and nodes for one worker each.

    Attributes:
        cluster: Ray's own.
        nodes: those that were added and are not known to be gone.
    """

    cluster: Any
    nodes: list[Any] = field(default_factory=list)

    def add(self, **environment: str) -> None:
        """One more node, whose workers see this environment."""
        self.nodes.append(self.cluster.add_node(num_cpus=1, env_vars=environment or None))

    def raylet(self, node: Any) -> int:
        """The process that is the node."""
        return int(node.all_processes["raylet"][0].process.pid)

    def actors(self) -> list[int]:
        """The workers that run now."""
        below = {pid for node in self.nodes for pid, _ in descendants(self.raylet(node))}
        return sorted(pid for pid in below if "ray::_Worker" in title(pid))

    def loaders(self) -> list[int]:
        """Their loader processes: children of the fork server, which is a child of the worker."""
        servers = {child for actor in self.actors() for child, _ in descendants(actor)}
        return sorted({pid for server in servers for pid, _ in descendants(server)})

    def remove(self, node: Any, graceful: bool = False) -> None:
        """Take a node away with all that runs on it."""
        self.nodes.remove(node)
        self.cluster.remove_node(node, allow_graceful=graceful)


def title(pid: int) -> str:
    try:
        return Path(f"/proc/{pid}/cmdline").read_bytes().replace(b"\0", b" ").decode(errors="replace")
    except OSError:
        return ""


@contextmanager
def machines(nodes: int = 2) -> Iterator[Machines]:
    """A cluster of so many nodes, all gone afterwards."""
    from ray.cluster_utils import Cluster

    cluster = Cluster(
        initialize_head=True,
        head_node_args={"num_cpus": 0, "include_dashboard": False, "_system_config": IMPATIENT},
    )
    found = Machines(cluster)
    try:
        for _ in range(nodes):
            found.add()
        yield found
    finally:
        for node in found.nodes:
            with suppress(ProcessLookupError):
                os.kill(found.raylet(node), signal.SIGCONT)
        cluster.shutdown()


@dataclass
class Run:
    """A job on such a cluster."""

    machines: Machines
    folder: Path

    @property
    def output(self) -> Path:
        return self.folder / "out"

    def start(self, *more: str, workers: int = 2, processes: int = 0, nap: str = "0.3") -> Command:
        settings = ["runtime.pool=ray", f"runtime.workers={workers}", "runtime.cpus_per_worker=1"]
        settings += [f"runtime.loader.processes={processes}", f"runtime.stall_seconds={STALL_SECONDS}"]
        where = {"RAY_ADDRESS": self.machines.cluster.address, "BATCHJOB_TEST_NAP": nap}
        return start("run", str(self.folder / "job.yaml"), "--json", *settings, *more, env=where)

    def parts(self) -> Mapping[str, str]:
        """Each committed part and the attempt that made it."""
        return {key: made.attempt for key, made in footers(self.output).items()}

    def goes_on(self, driver: Command, more: int = 2) -> None:
        """Wait until so many more parts are there."""
        before = len(self.parts())
        until(lambda: len(self.parts()) >= min(before + more, IMAGES // SHARD), command=driver)

    def check(self, images: int = IMAGES) -> None:
        assert sorted(table(self.output)["position"].to_pylist()) == list(range(images))


def killed(run: Run, driver: Command, chance: random.Random, victim: str) -> None:
    """Kill something of this kind, once it is there."""
    them = run.machines
    match victim:
        case "actor" | "loader":
            find: Callable[[], list[int]] = them.actors if victim == "actor" else them.loaders
            os.kill(chance.choice(until(find, command=driver)), signal.SIGKILL)
        case "raylet":
            node = chance.choice(them.nodes)
            os.kill(them.raylet(node), signal.SIGKILL)
            them.remove(node)
            them.add()
        case "node":
            them.remove(chance.choice(them.nodes), graceful=True)
            them.add()


def test_killed_actors_loaders_raylets_nodes_and_drivers_lose_nothing(
    tmp_path: Path, seed: int, figure: Figure, monkeypatch: pytest.MonkeyPatch
) -> None:
    chance = random.Random(seed)
    write_slow_job(tmp_path, IMAGES)
    monkeypatch.setenv("BATCHJOB_TEST_NAP", "0.6")  # of the nodes, whose actors have their environment
    victims = chance.sample(["actor", "loader", "raylet", "node"], 4)
    with machines() as them:
        run = Run(them, tmp_path)
        with ends(run.start(processes=1)) as driver:
            run.goes_on(driver)
            for victim in victims[:2]:
                killed(run, driver, chance, victim)
                run.goes_on(driver)
            family = kill(driver)
        until(lambda: not alive(family), timeout=60)
        first = run.parts()
        forget_lease(run.output)
        with ends(run.start(processes=1)) as driver:
            run.goes_on(driver)
            for victim in victims[2:]:
                killed(run, driver, chance, victim)
                run.goes_on(driver)
            ended = driver.end()
    assert (ended.code, ended.answer["status"]) == (0, "complete"), ended.err
    assert first.items() <= run.parts().items(), "a committed part was done again"
    run.check()
    figure("every image exactly once", f"Ray: {', '.join(victims)} and the driver killed; 0 missing, 0 twice")
    figure("resume", f"Ray: driver killed at {len(first)} of {IMAGES // SHARD} parts, 0 redone")


@pytest.mark.parametrize("victim", ["actor", "raylet"])
def test_what_is_stopped_is_replaced_and_does_no_harm_when_it_wakes(
    tmp_path: Path, seed: int, figure: Figure, victim: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    chance = random.Random(seed)
    write_slow_job(tmp_path, IMAGES)
    monkeypatch.setenv("BATCHJOB_TEST_NAP", "1")  # of the nodes, whose actors have their environment
    with machines() as them:
        run = Run(them, tmp_path)
        with ends(run.start(nap="1")) as driver:
            until(lambda: len(them.actors()) == 2, command=driver)
            run.goes_on(driver)
            sleeper = chance.choice(them.actors()) if victim == "actor" else them.raylet(chance.choice(them.nodes))
            os.kill(sleeper, signal.SIGSTOP)
            if victim == "actor":
                until(lambda: sleeper not in them.actors(), command=driver)  # killed, stopped as it is
            else:
                run.goes_on(driver, 12)
            with suppress(ProcessLookupError):
                os.kill(sleeper, signal.SIGCONT)
            ended = driver.end()
    print(ended.err[-1500:])
    assert (ended.code, ended.answer["status"]) == (0, "complete"), ended.err
    assert victim == "raylet" or "has not answered for" in ended.err
    run.check()
    figure("a worker that does not move is replaced", f"Ray: {victim} stopped and woken; 0 missing, 0 twice")


def test_a_device_that_fails_is_used_no_more_and_without_any_the_run_is_temporary(
    tmp_path: Path, figure: Figure
) -> None:
    images = 96
    write_harmful_job(tmp_path, images, black=range(images))
    with machines(nodes=0) as them:
        them.add(BATCHJOB_TEST_HARM=ECC)
        run = Run(them, tmp_path)
        with ends(run.start()) as driver:
            ended = driver.end()
        assert (ended.code, ended.answer["status"]) == (75, "temporary"), ended.err
        assert "no device is left that works, cpu on" in ended.answer["message"]
        forget_lease(run.output)
        them.add()
        with ends(run.start()) as driver:
            ended = driver.end()
    print(ended.err[-2000:])
    assert (ended.code, ended.answer["status"]) == (0, "complete"), ended.err
    assert not ended.answer["failed"]
    run.check(images)
    figure("a device that fails is banned", "Ray: 2 faults, then the other node did all; alone: exit 75; 0 error rows")


def test_images_that_break_the_device_are_error_rows_and_no_fault_of_the_device(
    tmp_path: Path, seed: int, figure: Figure
) -> None:
    images = 64
    black = sorted(random.Random(seed).sample(range(images), 2))
    write_harmful_job(tmp_path, images, black)
    with machines(nodes=0) as them:
        for _ in range(2):
            them.add(BATCHJOB_TEST_HARM=ASSERT)
        run = Run(them, tmp_path)
        with ends(run.start()) as driver:
            ended = driver.end()
    print(ended.err[-3000:])
    assert (ended.code, ended.answer["status"]) == (0, "complete"), ended.err
    assert "used no more" not in ended.err
    run.check(images)
    faults = {row["position"]: row["error_type"] for row in table(run.output).to_pylist() if row["error_stage"]}
    assert faults == dict.fromkeys(black, "device")
    deaths = Counter("failed: RuntimeError" in line for line in ended.err.splitlines())[True]
    figure("poison", f"Ray: {len(black)} images that break the context, {deaths} failed attempts, all other rows right")
