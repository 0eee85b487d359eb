"""Kills of drivers and workers on one running Ray: each image has exactly one row."""

from __future__ import annotations

import ctypes
import os
import random
import secrets
import shutil
import signal
import subprocess
import sys
import tempfile
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import pytest

from tests.support.batchjob_process import filter_alive, find_descendants, read_command_line, wait_until
from tests.support.color_coded_job import (
    OutputCheck,
    check_output,
    format_overrides,
    format_range,
    list_committed_parts,
    run_parallel,
    upload_job,
)
from tests.support.driver_server import DriverProcess, DriverServer
from tests.support.figures import Figure
from tests.support.loopback import find_free_port
from tests.support.seaweed import Seaweed

RUNS, IMAGES = 5, 240
# Victims of a run, in order. Each list is used at least once.
ORDERS = [["driver"], ["driver", "worker"], ["worker", "driver"]]
NAP = "0.3"  # seconds per batch; a run has 48 batches
pytestmark = pytest.mark.ray

RAY = Path(sys.executable).with_name("ray")


@dataclass(frozen=True)
class RayHead:
    """A running Ray.

    Attributes:
        address: Address for drivers.
        environment: Variables that drivers need to be let in.
        pid: Process that all workers descend from.
    """

    address: str
    environment: dict[str, str]
    pid: int

    def find_workers(self, job: str) -> set[tuple[int, int]]:
        """Return the processes of this job's actors: their working directory is a copy of the job's folder."""
        actors = {(pid, born) for pid, born in find_descendants(self.pid) if "ray::RayWorker" in read_command_line(pid)}
        return {(pid, born) for pid, born in actors if Path(f"/proc/{pid}/cwd", marker_name(job)).exists()}


@dataclass(frozen=True)
class KilledRun:
    """A run that lost processes.

    Attributes:
        planned_kills: Victims it was to lose.
        kills: Victims it did lose.
        repeated_parts: Committed parts that were made again.
        check: Rows of the output.
        seconds: Time that the last driver took.
    """

    planned_kills: Counter[str]
    kills: Counter[str]
    repeated_parts: int
    check: OutputCheck
    seconds: float


def terminate_with_parent() -> None:
    """Ask the kernel to send SIGTERM to this child when the tests end; Ray then ends all that it has started."""
    ctypes.CDLL(None).prctl(1, signal.SIGTERM)


@pytest.fixture(scope="module")
def head(s3: Seaweed) -> Iterator[RayHead]:
    """Ray head on the loopback; its workers find SeaweedFS and sleep for NAP seconds per batch."""
    folder = tempfile.mkdtemp(prefix="r-", dir="/tmp")  # the paths of sockets must be short
    port = find_free_port()
    command = [str(RAY), "start", "--head", "--block", "--include-dashboard=false", "--num-cpus=8", f"--port={port}"]
    command += [f"--temp-dir={folder}", "--node-ip-address=127.0.0.1", "--disable-usage-stats"]
    token = Path(folder) / "token"
    token.write_text(secrets.token_hex(32))
    token.chmod(0o600)
    environment = {"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN_PATH": str(token), "RAY_ADDRESS": ""}
    with (Path(folder) / "log").open("w") as log:
        process = subprocess.Popen(
            command,
            env={**os.environ, **environment, "BATCHJOB_TEST_NAP": NAP},
            stdout=log,
            stderr=log,
            start_new_session=True,
            preexec_fn=terminate_with_parent if sys.platform == "linux" else None,
        )
    try:
        wait_until(lambda: "Ray runtime started" in (Path(folder) / "log").read_text(), timeout=90)
        yield RayHead(f"127.0.0.1:{port}", environment, process.pid)
    finally:
        process.send_signal(signal.SIGTERM)
        process.wait(60)
        shutil.rmtree(folder, ignore_errors=True)


@pytest.fixture(scope="module")
def job(tmp_path_factory: pytest.TempPathFactory, s3: Seaweed) -> str:
    """Job over pictures on SeaweedFS."""
    return upload_job(tmp_path_factory.mktemp("ray"), IMAGES, s3)


def copy_job(job: str, folder: Path) -> str:
    """Copy the job into a folder of its own, with a marker file in it by which its workers are found."""
    shutil.copytree(Path(job).parent, folder, ignore=shutil.ignore_patterns("images"))
    (folder / marker_name(folder / "job.yaml")).touch()
    return str(folder / "job.yaml")


def marker_name(job: str | Path) -> str:
    return f"is-{Path(job).parent.name}"


def start_driver(driver_server: DriverServer, head: RayHead, job: str, output: str) -> DriverProcess:
    settings = format_overrides(output__uri=output, runtime__pool="ray", runtime__workers=1, runtime__cpus_per_worker=1)
    return driver_server.start(
        "run", job, *settings, "--json", "--address", head.address, env=head.environment, short_lease=True
    )


def has_more_parts(parts: int, output: str) -> bool:
    return len(list_committed_parts(output)) > parts


def kill_worker(victim: tuple[int, int], driver: DriverProcess) -> None:
    """Kill a worker of this driver; wait until the driver has noticed."""
    os.kill(victim[0], signal.SIGKILL)
    assert driver.wait_until(lambda: not filter_alive({victim}) and "was lost" in driver.stderr), driver.stderr


def test_killed_drivers_and_workers_on_ray_lose_and_repeat_no_image(
    tmp_path: Path, s3: Seaweed, driver_server: DriverServer, head: RayHead, job: str, seed: int, figure: Figure
) -> None:
    """Each run loses a driver; most lose a worker too, before or after it."""
    orders = random.Random(f"ray {seed}").sample(ORDERS, len(ORDERS)) * 2

    def run_and_kill(number: int) -> KilledRun:
        chance, victims = random.Random(f"ray {seed} {number}"), orders[number]
        own_job = copy_job(job, tmp_path / f"run{number}")
        output, kills, repeated, orphans = s3.bucket() + "out/", Counter[str](), 0, set[tuple[int, int]]()
        driver, before = start_driver(driver_server, head, own_job, output), list_committed_parts(output)
        for victim in victims:
            driver.wait_until(partial(has_more_parts, len(list_committed_parts(output)), output))
            if not driver.run_for(chance.uniform(0, 1)):
                break
            before = list_committed_parts(output)
            if victim == "worker":
                kill_worker(chance.choice(sorted(head.find_workers(own_job) - orphans)), driver)
            else:
                driver.kill()
                orphans = head.find_workers(own_job)
                driver = start_driver(driver_server, head, own_job, output)
            kills[victim] += 1
            repeated += len(before.items() - list_committed_parts(output).items())
        completed = driver.wait()
        assert completed.exit_code == 0, completed.stderr
        repeated += len(before.items() - list_committed_parts(output).items())
        return KilledRun(Counter(victims), kills, repeated, check_output(output, IMAGES), completed.seconds)

    runs = run_parallel(run_and_kill, range(RUNS), at_once=RUNS)
    planned = sum((run.planned_kills for run in runs), Counter[str]())
    kills = sum((run.kills for run in runs), Counter[str]())
    missing, twice = sum(run.check.missing for run in runs), sum(run.check.duplicates for run in runs)
    figure(
        "every image exactly once",
        f"{RUNS} runs on Ray, {kills['driver']} drivers and {kills['worker']} workers killed: {missing} missing, "
        f"{twice} twice of {RUNS * IMAGES}; the last drivers took {format_range(run.seconds for run in runs)} s",
    )
    assert [run.check for run in runs if not run.check.is_correct] == []
    assert sum(run.repeated_parts for run in runs) == 0
    assert planned["worker"] >= 3
    assert kills == planned, "a run ended before all its kills"


def test_sigterm_on_ray_ends_the_run_within_20_seconds(
    s3: Seaweed, driver_server: DriverServer, head: RayHead, job: str, figure: Figure
) -> None:
    output = s3.bucket() + "out/"
    driver = start_driver(driver_server, head, job, output)
    assert driver.wait_until(lambda: list_committed_parts(output)), driver.stderr
    signalled = driver.seconds
    driver.send_signal(signal.SIGTERM)
    completed = driver.wait()
    figure(
        "SIGTERM",
        f"on Ray, while shards run: exit code {completed.exit_code} after {completed.seconds - signalled:.1f} s",
    )
    assert completed.exit_code == 75, completed.stderr
    assert completed.json_result["status"] == "temporary"
    assert completed.seconds - signalled <= 20
