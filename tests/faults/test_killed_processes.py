"""Drivers and loader processes killed at random moments: every image has its row, once."""

from __future__ import annotations

import os
import random
import signal
from collections import Counter
from dataclasses import dataclass
from functools import partial

import pytest
from batchjob_process import filter_alive, find_descendants, wait_until
from color_coded_job import OutputCheck, check_output, format_overrides, format_range, run_parallel, upload_job
from driver_server import DriverProcess, DriverServer, LoaderOrigin
from figures import Figure
from seaweed import Seaweed

RUNS, WITH_LOADERS = 25, 6
IMAGES = 240
NAP = {"BATCHJOB_TEST_NAP": "0.15"}  # a batch; 48 of them


@dataclass(frozen=True)
class Survived:
    """A run that was killed, again and again, and then left alone."""

    tally: OutputCheck
    kills: Counter[str]
    seconds: float


def loaders(driver: DriverProcess) -> set[int]:
    """Its loader processes: children of the fork server, which is its child."""
    return {pid for child, _ in find_descendants(driver.pid) for pid, _ in find_descendants(child)}


@dataclass
class Run:
    """One output, and who works on it."""

    driver_server: DriverServer
    job: str
    output: str
    processes: int

    def start(self) -> DriverProcess:
        settings = format_overrides(output__uri=self.output, runtime__loader__processes=self.processes)
        servers: LoaderOrigin = "own" if self.processes else "none"
        return self.driver_server.start("run", self.job, *settings, env=NAP, short_lease=True, loaders=servers)

    def has_loaders(self, driver: DriverProcess) -> bool:
        return len(loaders(driver)) >= self.processes

    def survive(self, chance: random.Random, victims: list[str]) -> Survived:
        """Kill these one after the other, and see the run to its end."""
        kills: Counter[str] = Counter()
        family: set[tuple[int, int]] = set()
        driver = self.start()
        for victim in victims:
            if victim == "loader":
                driver.wait_until(partial(self.has_loaders, driver))
            if not driver.run_for(chance.uniform(0.2, 2.5)):
                break
            if victim == "loader":
                os.kill(chance.choice(sorted(loaders(driver))), signal.SIGKILL)
            else:
                family |= driver.kill()
                driver = self.start()
            kills[victim] += 1
        ended = driver.wait()
        assert ended.exit_code == 0, ended.stderr
        wait_until(lambda: not filter_alive(family), timeout=30)
        return Survived(check_output(self.output, IMAGES), kills, ended.seconds)


@pytest.fixture(scope="module")
def job(tmp_path_factory: pytest.TempPathFactory, s3: Seaweed) -> str:
    """A job over pictures on SeaweedFS."""
    return upload_job(tmp_path_factory.mktemp("kills"), IMAGES, s3)


def test_every_image_exactly_once_whoever_is_killed(
    s3: Seaweed, driver_server: DriverServer, job: str, seed: int, figure: Figure
) -> None:
    def survive(number: int) -> Survived:
        chance = random.Random(f"kills {seed} {number}")
        with_loaders = number < WITH_LOADERS  # the long ones first
        victims = ["loader"] * 4 + ["driver"] * (number % 2) if with_loaders else ["driver"] * chance.randint(2, 4)
        chance.shuffle(victims)
        return Run(driver_server, job, s3.bucket() + "out/", 2 if with_loaders else 0).survive(chance, victims)

    runs = run_parallel(survive, range(RUNS), at_once=12)
    kills = sum((run.kills for run in runs), Counter[str]())
    missing, twice = (sum(getattr(run.tally, name) for run in runs) for name in ("missing", "duplicates"))
    figure(
        "every image exactly once",
        f"{RUNS} runs on SeaweedFS, {kills['driver']} drivers and {kills['loader']} loader processes killed: "
        f"{missing} missing, {twice} twice of {RUNS * IMAGES}; the last drivers took "
        f"{format_range(run.seconds for run in runs)} s",
    )
    assert [run.tally for run in runs if not run.tally.is_correct] == []
    assert kills["driver"] >= RUNS
    assert kills["loader"] >= WITH_LOADERS
