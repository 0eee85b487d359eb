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
from batchjob_process import (
    Command,
    delete_lease,
    filter_alive,
    find_descendants,
    kill,
    kill_on_exit,
    read_all_footers,
    read_rows,
    start_batchjob,
    wait_until,
    write_slow_job,
)
from figures import Figure
from harmful_job import CUDA_ASSERT, CUDA_ECC_ERROR, write_harmful_job

IMAGES, SHARD = 240, 4
STALL_SECONDS = 6
HALTED_SECONDS = 4  # after which a loader that somebody stopped is replaced
IN_HAND = 4  # shards that a worker has
# A node that does not answer is dead after some 5 s; as Ray is shipped, after half a minute.
IMPATIENT = {"health_check_period_ms": 500, "health_check_timeout_ms": 1500, "health_check_failure_threshold": 3}


@dataclass
class Machines:
    """A cluster: a head without room for workers, and nodes for one worker each, or more.

    Attributes:
        cluster: Ray's own.
        nodes: those that were added and are not known to be gone.
    """

    cluster: Any
    nodes: list[Any] = field(default_factory=list)

    def add(self, workers: int = 1, **environment: str) -> None:
        """One more node for so many workers, which see this environment."""
        self.nodes.append(self.cluster.add_node(num_cpus=workers, env_vars=environment or None))

    def raylet(self, node: Any) -> int:
        """The process that is the node."""
        return int(node.all_processes["raylet"][0].process.pid)

    def actors(self) -> list[int]:
        """The workers that run now."""
        below = {pid for node in self.nodes for pid, _ in find_descendants(self.raylet(node))}
        return sorted(pid for pid in below if "ray::RayWorker" in title(pid))

    def loaders(self) -> list[int]:
        """Their loader processes: children of the fork server, which is a child of the worker."""
        servers = {child for actor in self.actors() for child, _ in find_descendants(actor)}
        return sorted({pid for server in servers for pid, _ in find_descendants(server)})

    def remove(self, node: Any, graceful: bool = False) -> None:
        """Take a node away with all that runs on it."""
        self.nodes.remove(node)
        self.cluster.remove_node(node, allow_graceful=graceful)


def title(pid: int) -> str:
    try:
        return Path(f"/proc/{pid}/cmdline").read_bytes().replace(b"\0", b" ").decode(errors="replace")
    except OSError:
        return ""


# Where BATCHJOB_TEST_HARM is set, that befalls all workers but the first. A batch waits there and elsewhere until two
# have failed, and takes a while then.
SHARING_NET = """\
import os
import time
from contextlib import suppress
from pathlib import Path

from torch import nn


class Sharing(nn.Module):
    def forward(self, x):
        if x[:, 0].amin() == 1 and x[:, 1].amax() == 0:  # the picture, and no warm-up
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
    """Write it there over one picture so many times; the folder in which its workers leave marks."""
    job, marks = folder / "job.yaml", folder / "marks"
    write_slow_job(folder, images)
    (folder / "sharing.py").write_text(SHARING_NET)
    job.write_text(job.read_text().replace("slow:make", "sharing:make"))
    marks.mkdir()
    return marks


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
        return start_batchjob("run", str(self.folder / "job.yaml"), "--json", *settings, *more, env=where)

    def parts(self) -> Mapping[str, str]:
        """Each committed part and the attempt that made it."""
        return {key: made.attempt for key, made in read_all_footers(self.output).items()}

    def goes_on(self, driver: Command, more: int = 2) -> None:
        """Wait until so many more parts are there."""
        before = len(self.parts())
        wait_until(lambda: len(self.parts()) >= min(before + more, IMAGES // SHARD), command=driver)

    def check(self, images: int = IMAGES) -> None:
        assert sorted(read_rows(self.output)["position"].to_pylist()) == list(range(images))

    def check_without_errors(self, images: int) -> None:
        self.check(images)
        assert read_rows(self.output)["error_stage"].null_count == images


def killed(run: Run, driver: Command, chance: random.Random, victim: str) -> None:
    """Kill something of this kind, once it is there."""
    them = run.machines
    match victim:
        case "actor" | "loader":
            find: Callable[[], list[int]] = them.actors if victim == "actor" else them.loaders
            os.kill(chance.choice(wait_until(find, command=driver)), signal.SIGKILL)
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
        with kill_on_exit(run.start(processes=1)) as driver:
            run.goes_on(driver)
            for victim in victims[:2]:
                killed(run, driver, chance, victim)
                run.goes_on(driver)
            family = kill(driver)
        wait_until(lambda: not filter_alive(family), timeout=60)
        first = run.parts()
        delete_lease(run.output)
        with kill_on_exit(run.start(processes=1)) as driver:
            run.goes_on(driver)
            for victim in victims[2:]:
                killed(run, driver, chance, victim)
                run.goes_on(driver)
            ended = driver.wait()
    assert (ended.exit_code, ended.json_result["status"]) == (0, "complete"), ended.stderr
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
        with kill_on_exit(run.start(nap="1")) as driver:
            wait_until(lambda: len(them.actors()) == 2, command=driver)
            run.goes_on(driver)
            sleeper = chance.choice(them.actors()) if victim == "actor" else them.raylet(chance.choice(them.nodes))
            os.kill(sleeper, signal.SIGSTOP)
            if victim == "actor":
                wait_until(lambda: sleeper not in them.actors(), command=driver)  # killed, stopped as it is
            else:
                run.goes_on(driver, 12)
            with suppress(ProcessLookupError):
                os.kill(sleeper, signal.SIGCONT)
            ended = driver.wait()
    print(ended.stderr[-1500:])
    assert (ended.exit_code, ended.json_result["status"]) == (0, "complete"), ended.stderr
    assert victim == "raylet" or "has not answered for" in ended.stderr
    run.check()
    figure("a worker that does not move is replaced", f"Ray: {victim} stopped and woken; 0 missing, 0 twice")


def test_loaders_that_are_stopped_go_on_or_are_replaced(
    tmp_path: Path, seed: int, figure: Figure, monkeypatch: pytest.MonkeyPatch
) -> None:
    """One is woken before its time is over, the other one is not and loses nothing but what it had in hand."""
    chance, images = random.Random(seed), 160
    write_slow_job(tmp_path, images)
    monkeypatch.setenv("BATCHJOB_TEST_NAP", "0.4")  # of the nodes, whose actors have their environment
    with machines() as them:
        run = Run(them, tmp_path)
        with kill_on_exit(run.start(f"runtime.loader.image_seconds={HALTED_SECONDS}", processes=1)) as driver:
            wait_until(lambda: len(them.loaders()) == 2, command=driver)
            run.goes_on(driver)
            sleepers = chance.sample(them.loaders(), 2)
            for sleeper in sleepers:
                os.kill(sleeper, signal.SIGSTOP)
            run.goes_on(driver, 1)
            with suppress(ProcessLookupError):
                os.kill(sleepers[0], signal.SIGCONT)
            wait_until(lambda: sleepers[1] not in them.loaders(), command=driver)  # killed, stopped as it is
            woken = sleepers[0] in them.loaders()
            ended = driver.wait()
    print(ended.stderr[-1500:])
    assert (ended.exit_code, ended.json_result["status"]) == (0, "complete"), ended.stderr
    assert "was lost" not in ended.stderr, "a loader's death is not its worker's"
    run.check_without_errors(images)
    went_on = "woke and went on" if woken else "was woken too late"
    figure(
        "a worker that does not move is replaced",
        f"Ray: 2 loaders stopped, one {went_on}, one was replaced; 0 workers lost, 0 missing, 0 twice",
    )


def test_nobody_stays_on_a_device_that_has_failed_under_others(tmp_path: Path, figure: Figure) -> None:
    """One of two fails, and so does the next in its place: the other one is put to rest; no attempt is used up."""
    images = 160
    marks = write_sharing_job(tmp_path, images)
    with machines(nodes=0) as them:
        them.add(2, BATCHJOB_TEST_MARKS=str(marks), BATCHJOB_TEST_HARM=CUDA_ECC_ERROR)
        them.add(1, BATCHJOB_TEST_MARKS=str(marks))
        run = Run(them, tmp_path)
        three = ["runtime.workers={min: 3, max: 3}", "errors.attempts=1", "runtime.stall_seconds=120"]
        with kill_on_exit(run.start(*three)) as driver:
            ended = driver.wait()
    print(ended.stderr[-3000:])
    assert (ended.exit_code, ended.json_result["status"]) == (0, "complete"), ended.stderr
    run.check_without_errors(images)
    batches = len((marks / "done").read_bytes())
    assert len(list(marks.glob("fault-*"))) == 2
    assert batches <= 2 * IN_HAND < images // SHARD // 3, "it went on there"
    assert "was put to rest: cpu on" in ended.stderr
    figure(
        "a device that fails is banned",
        f"Ray: 2 workers on one device, 2 faults: the one without a fault did {batches} of {images // SHARD} shards",
    )


def test_a_device_that_fails_is_used_no_more_and_without_any_the_run_is_temporary(
    tmp_path: Path, figure: Figure
) -> None:
    images = 96
    write_harmful_job(tmp_path, images, black_positions=range(images))
    with machines(nodes=0) as them:
        them.add(BATCHJOB_TEST_HARM=CUDA_ECC_ERROR)
        run = Run(them, tmp_path)
        with kill_on_exit(run.start()) as driver:
            ended = driver.wait()
        assert (ended.exit_code, ended.json_result["status"]) == (75, "temporary"), ended.stderr
        assert "no device is left that works, cpu on" in ended.json_result["message"]
        delete_lease(run.output)
        them.add()
        with kill_on_exit(run.start()) as driver:
            ended = driver.wait()
    print(ended.stderr[-2000:])
    assert (ended.exit_code, ended.json_result["status"]) == (0, "complete"), ended.stderr
    assert not ended.json_result["failed"]
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
            them.add(BATCHJOB_TEST_HARM=CUDA_ASSERT)
        run = Run(them, tmp_path)
        with kill_on_exit(run.start()) as driver:
            ended = driver.wait()
    print(ended.stderr[-3000:])
    assert (ended.exit_code, ended.json_result["status"]) == (0, "complete"), ended.stderr
    assert "used no more" not in ended.stderr
    run.check(images)
    faults = {row["position"]: row["error_type"] for row in read_rows(run.output).to_pylist() if row["error_stage"]}
    assert faults == dict.fromkeys(black, "device")
    deaths = Counter("failed: RuntimeError" in line for line in ended.stderr.splitlines())[True]
    figure("poison", f"Ray: {len(black)} images that break the context, {deaths} failed attempts, all other rows right")
