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
from commands import descendants, title, until
from figures import Figure
from nursery import Driver, Nursery
from pictures import Tally, committed, numbers, overrides, publish, side_by_side, tally
from seaweed import Seaweed

RUNS, IMAGES = 5, 240
NAP = "0.3"  # seconds a batch; 48 of them
RAY = Path(sys.executable).with_name("ray")


@dataclass(frozen=True)
class Head:
    """A running Ray: where it is, what its clients need to be let in, and the process below which all workers are."""

    address: str
    environment: dict[str, str]
    pid: int

    def workers(self) -> set[int]:
        """Processes of batchjob's actors, of whichever driver."""
        return {pid for pid, _ in descendants(self.pid) if "ray::_Worker" in title(pid)}


@dataclass(frozen=True)
class Survived:
    kills: Counter[str]
    redone: int
    tally: Tally
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
        until(lambda: "Ray runtime started" in (Path(folder) / "said").read_text(), timeout=90)
        yield Head(f"127.0.0.1:{port}", environment, process.pid)
    finally:
        process.send_signal(signal.SIGTERM)
        process.wait(60)
        shutil.rmtree(folder, ignore_errors=True)


@pytest.fixture(scope="module")
def job(tmp_path_factory: pytest.TempPathFactory, s3: Seaweed) -> str:
    """A job over pictures on SeaweedFS."""
    return publish(tmp_path_factory.mktemp("ray"), IMAGES, s3)


def start(nursery: Nursery, head: Head, job: str, output: str) -> Driver:
    settings = overrides(output__uri=output, runtime__pool="ray", runtime__workers=1, runtime__cpus_per_worker=1)
    return nursery.start(
        "run", job, *settings, "--json", "--address", head.address, env=head.environment, short_lease=True
    )


def more_than(parts: int, output: str) -> bool:
    return len(committed(output)) > parts


def test_every_image_exactly_once_on_ray(
    s3: Seaweed, nursery: Nursery, head: Head, job: str, seed: int, figure: Figure
) -> None:
    """Each run has lost one driver or more; of the workers of all runs, some are killed meanwhile."""

    def survive(number: int) -> Survived:
        chance = random.Random(f"ray {seed} {number}")
        output, kills, redone = s3.bucket() + "out/", Counter[str](), 0
        driver, before = start(nursery, head, job, output), committed(output)
        for victim in chance.choice([["driver"], ["driver", "worker"], ["worker", "driver"]]):
            seen = committed(output)
            driver.until(partial(more_than, len(seen), output))
            if not driver.work(chance.uniform(0, 1)):
                break
            before = committed(output)
            if victim == "worker":
                os.kill(chance.choice(sorted(head.workers())), signal.SIGKILL)  # of this run, or of another
            else:
                driver.kill()
                driver = start(nursery, head, job, output)
            kills[victim] += 1
            redone += len(before.items() - committed(output).items())
        ended = driver.end()
        assert ended.code == 0, ended.err
        redone += len(before.items() - committed(output).items())
        return Survived(kills, redone, tally(output, IMAGES), ended.seconds)

    runs = side_by_side(survive, range(RUNS), at_once=RUNS)
    kills = sum((run.kills for run in runs), Counter[str]())
    missing, twice = (sum(getattr(run.tally, name) for run in runs) for name in ("missing", "twice"))
    figure(
        "every image exactly once",
        f"{RUNS} runs on Ray, {kills['driver']} drivers and {kills['worker']} workers killed: {missing} missing, "
        f"{twice} twice of {RUNS * IMAGES}; the last drivers took {numbers(run.seconds for run in runs)} s",
    )
    assert [run.tally for run in runs if not run.tally.right] == []
    assert sum(run.redone for run in runs) == 0
    assert kills["driver"] >= RUNS - 1


def test_sigterm_on_ray(s3: Seaweed, nursery: Nursery, head: Head, job: str, figure: Figure) -> None:
    output = s3.bucket() + "out/"
    driver = start(nursery, head, job, output)
    assert driver.until(lambda: committed(output)), driver.said
    asked = driver.seconds
    driver.send(signal.SIGTERM)
    ended = driver.end()
    figure("SIGTERM", f"on Ray, amid its shards: exit code {ended.code} after {ended.seconds - asked:.1f} s")
    assert ended.code == 75, ended.err
    assert ended.answer["status"] == "temporary"
    assert ended.seconds - asked <= 20
