"""Drivers and workers killed on one running Ray, that drivers come to and leave: every image has its row, once."""

from __future__ import annotations

import ctypes
import os
import random
import secrets
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
from collections import Counter
from collections.abc import Iterator
from contextlib import closing
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import pytest
from batchjob_process import filter_alive, find_descendants, read_command_line, wait_until
from color_coded_job import (
    OutputCheck,
    check_output,
    format_overrides,
    format_range,
    list_committed_parts,
    run_parallel,
    upload_job,
)
from driver_server import DriverProcess, DriverServer
from figures import Figure
from seaweed import Seaweed

RUNS, IMAGES = 5, 240
ORDERS = [["driver"], ["driver", "worker"], ["worker", "driver"]]  # what a run loses; each at least once in all runs
NAP = "0.3"  # seconds a batch; 48 of them
RAY = Path(sys.executable).with_name("ray")


@dataclass(frozen=True)
class Head:
    """A running Ray: where it is, what its clients need to be let in, and the process below which all workers are."""

    address: str
    environment: dict[str, str]
    pid: int

    def workers(self, job: str) -> set[tuple[int, int]]:
        """Processes of this job's actors: their working directory is a copy of the job's folder."""
        actors = {(pid, born) for pid, born in find_descendants(self.pid) if "ray::RayWorker" in read_command_line(pid)}
        return {(pid, born) for pid, born in actors if Path(f"/proc/{pid}/cwd", mark(job)).exists()}


@dataclass(frozen=True)
class Survived:
    """What a run came through.

    Attributes:
        due: what it was to lose; `kills` what it did.
        redone: committed parts that were made again.
    """

    due: Counter[str]
    kills: Counter[str]
    redone: int
    tally: OutputCheck
    seconds: float


def end_with_parent() -> None:
    """In the child: hear SIGTERM when the tests are gone, on which Ray ends all that it has started."""
    ctypes.CDLL(None).prctl(1, signal.SIGTERM)


@pytest.fixture(scope="module")
def head(s3: Seaweed) -> Iterator[Head]:
    """A Ray head on the loopback; its workers find SeaweedFS and nap as long as NAP says."""
    folder = tempfile.mkdtemp(prefix="r-", dir="/tmp")  # sockets want short paths
    with closing(socket.socket()) as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    command = [str(RAY), "start", "--head", "--block", "--include-dashboard=false", "--num-cpus=8", f"--port={port}"]
    command += [f"--temp-dir={folder}", "--node-ip-address=127.0.0.1", "--disable-usage-stats"]
    token = Path(folder) / "token"
    token.write_text(secrets.token_hex(32))
    token.chmod(0o600)
    environment = {"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN_PATH": str(token), "RAY_ADDRESS": ""}
    with (Path(folder) / "said").open("w") as said:
        process = subprocess.Popen(
            command,
            env={**os.environ, **environment, "BATCHJOB_TEST_NAP": NAP},
            stdout=said,
            stderr=said,
            start_new_session=True,
            preexec_fn=end_with_parent if sys.platform == "linux" else None,
        )
    try:
        wait_until(lambda: "Ray runtime started" in (Path(folder) / "said").read_text(), timeout=90)
        yield Head(f"127.0.0.1:{port}", environment, process.pid)
    finally:
        process.send_signal(signal.SIGTERM)
        process.wait(60)
        shutil.rmtree(folder, ignore_errors=True)


@pytest.fixture(scope="module")
def job(tmp_path_factory: pytest.TempPathFactory, s3: Seaweed) -> str:
    """A job over pictures on SeaweedFS."""
    return upload_job(tmp_path_factory.mktemp("ray"), IMAGES, s3)


def copied(job: str, folder: Path) -> str:
    """The job in a folder of its own, whose name is a file in it, so that its workers are known by where they are."""
    shutil.copytree(Path(job).parent, folder, ignore=shutil.ignore_patterns("images"))
    (folder / mark(folder / "job.yaml")).touch()
    return str(folder / "job.yaml")


def mark(job: str | Path) -> str:
    return f"is-{Path(job).parent.name}"


def start(driver_server: DriverServer, head: Head, job: str, output: str) -> DriverProcess:
    settings = format_overrides(output__uri=output, runtime__pool="ray", runtime__workers=1, runtime__cpus_per_worker=1)
    return driver_server.start(
        "run", job, *settings, "--json", "--address", head.address, env=head.environment, short_lease=True
    )


def more_than(parts: int, output: str) -> bool:
    return len(list_committed_parts(output)) > parts


def kill_worker(victim: tuple[int, int], driver: DriverProcess) -> None:
    """SIGKILL to one of this driver's, seen through, until the driver knows."""
    os.kill(victim[0], signal.SIGKILL)
    assert driver.wait_until(lambda: not filter_alive({victim}) and "was lost" in driver.stderr), driver.stderr


def test_every_image_exactly_once_on_ray(
    tmp_path: Path, s3: Seaweed, driver_server: DriverServer, head: Head, job: str, seed: int, figure: Figure
) -> None:
    """Each run loses a driver, most a worker too, before or after it."""
    orders = random.Random(f"ray {seed}").sample(ORDERS, len(ORDERS)) * 2

    def survive(number: int) -> Survived:
        chance, due = random.Random(f"ray {seed} {number}"), orders[number]
        own = copied(job, tmp_path / f"run{number}")
        output, kills, redone, orphans = s3.bucket() + "out/", Counter[str](), 0, set[tuple[int, int]]()
        driver, before = start(driver_server, head, own, output), list_committed_parts(output)
        for victim in due:
            seen = list_committed_parts(output)
            driver.wait_until(partial(more_than, len(seen), output))
            if not driver.run_for(chance.uniform(0, 1)):
                break
            before = list_committed_parts(output)
            if victim == "worker":
                kill_worker(chance.choice(sorted(head.workers(own) - orphans)), driver)
            else:
                driver.kill()
                orphans = head.workers(own)
                driver = start(driver_server, head, own, output)
            kills[victim] += 1
            redone += len(before.items() - list_committed_parts(output).items())
        ended = driver.wait()
        assert ended.exit_code == 0, ended.stderr
        redone += len(before.items() - list_committed_parts(output).items())
        return Survived(Counter(due), kills, redone, check_output(output, IMAGES), ended.seconds)

    runs = run_parallel(survive, range(RUNS), at_once=RUNS)
    due, kills = (sum((getattr(run, name) for run in runs), Counter[str]()) for name in ("due", "kills"))
    missing, twice = (sum(getattr(run.tally, name) for run in runs) for name in ("missing", "twice"))
    figure(
        "every image exactly once",
        f"{RUNS} runs on Ray, {kills['driver']} drivers and {kills['worker']} workers killed: {missing} missing, "
        f"{twice} twice of {RUNS * IMAGES}; the last drivers took {format_range(run.seconds for run in runs)} s",
    )
    assert [run.tally for run in runs if not run.tally.is_correct] == []
    assert sum(run.redone for run in runs) == 0
    assert due["worker"] >= 3
    assert kills == due, "a run was through before its time"


def test_sigterm_on_ray(s3: Seaweed, driver_server: DriverServer, head: Head, job: str, figure: Figure) -> None:
    output = s3.bucket() + "out/"
    driver = start(driver_server, head, job, output)
    assert driver.wait_until(lambda: list_committed_parts(output)), driver.stderr
    asked = driver.seconds
    driver.send_signal(signal.SIGTERM)
    ended = driver.wait()
    figure("SIGTERM", f"on Ray, amid its shards: exit code {ended.exit_code} after {ended.seconds - asked:.1f} s")
    assert ended.exit_code == 75, ended.stderr
    assert ended.json_result["status"] == "temporary"
    assert ended.seconds - asked <= 20
