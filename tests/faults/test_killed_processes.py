"""Drivers and loader processes killed at random moments: every image has exactly one row."""

from __future__ import annotations

import os
import random
import signal
from collections import Counter
from dataclasses import dataclass
from functools import partial

import pytest

from tests.support.batchjob_process import filter_alive, find_descendants, wait_until
from tests.support.color_coded_job import (
    OutputCheck,
    check_output,
    format_overrides,
    format_range,
    run_parallel,
    upload_job,
)
from tests.support.driver_server import DriverProcess, DriverServer, LoaderOrigin
from tests.support.figures import Figure
from tests.support.seaweed import Seaweed

RUN_COUNT, RUNS_WITH_LOADERS = 25, 6
IMAGE_COUNT = 240
SLOW_BATCHES = {"BATCHJOB_TEST_NAP": "0.15"}  # seconds per batch; there are 48 batches


@dataclass(frozen=True)
class SurvivedRun:
    """Run whose processes were killed several times and that then came to its end."""

    check: OutputCheck
    kills: Counter[str]
    seconds: float


def find_loader_processes(driver: DriverProcess) -> set[int]:
    """Find the loader processes of a driver: they are children of its fork server, which is its child."""
    return {pid for child, _ in find_descendants(driver.pid) for pid, _ in find_descendants(child)}


@dataclass
class KilledRun:
    """Output whose drivers and loader processes are killed."""

    driver_server: DriverServer
    job: str
    output: str
    processes: int

    def start(self) -> DriverProcess:
        settings = format_overrides(output__uri=self.output, runtime__loader__processes=self.processes)
        servers: LoaderOrigin = "own" if self.processes else "none"
        return self.driver_server.start("run", self.job, *settings, env=SLOW_BATCHES, short_lease=True, loaders=servers)

    def has_loaders(self, driver: DriverProcess) -> bool:
        return len(find_loader_processes(driver)) >= self.processes

    def kill_and_finish(self, random_numbers: random.Random, victims: list[str]) -> SurvivedRun:
        """Kill these victims one after the other, and let the run come to its end."""
        kills: Counter[str] = Counter()
        process_ids: set[tuple[int, int]] = set()
        driver = self.start()
        for victim in victims:
            if victim == "loader":
                driver.wait_until(partial(self.has_loaders, driver))
            if not driver.run_for(random_numbers.uniform(0.2, 2.5)):
                break
            if victim == "loader":
                loaders = sorted(find_loader_processes(driver))
                # A driver that is finishing its run has closed its loader, or closes it just now.
                if not loaders:
                    break
                try:
                    os.kill(random_numbers.choice(loaders), signal.SIGKILL)
                except ProcessLookupError:
                    break
            else:
                process_ids |= driver.kill()
                driver = self.start()
            kills[victim] += 1
        completed = driver.wait()
        assert completed.exit_code == 0, completed.stderr
        wait_until(lambda: not filter_alive(process_ids), timeout=30)
        return SurvivedRun(check_output(self.output, IMAGE_COUNT), kills, completed.seconds)


@pytest.fixture(scope="module")
def job(tmp_path_factory: pytest.TempPathFactory, s3: Seaweed) -> str:
    """Make a job over images on SeaweedFS."""
    return upload_job(tmp_path_factory.mktemp("kills"), IMAGE_COUNT, s3)


def test_every_image_has_one_row_after_kills(
    s3: Seaweed, driver_server: DriverServer, job: str, seed: int, figure: Figure
) -> None:
    def kill_and_finish(number: int) -> SurvivedRun:
        random_numbers = random.Random(f"kills {seed} {number}")
        has_loaders = number < RUNS_WITH_LOADERS  # these take longest, so they start first
        if has_loaders:
            victims = ["loader"] * 4 + ["driver"] * (number % 2)
        else:
            victims = ["driver"] * random_numbers.randint(2, 4)
        random_numbers.shuffle(victims)
        run = KilledRun(driver_server, job, s3.bucket() + "out/", 2 if has_loaders else 0)
        return run.kill_and_finish(random_numbers, victims)

    runs = run_parallel(kill_and_finish, range(RUN_COUNT), at_once=12)
    kills = sum((run.kills for run in runs), Counter[str]())
    missing, duplicates = (sum(getattr(run.check, name) for run in runs) for name in ("missing", "duplicates"))
    figure(
        "every image exactly once",
        f"{RUN_COUNT} runs on SeaweedFS, {kills['driver']} drivers and {kills['loader']} loader processes killed: "
        f"{missing} missing, {duplicates} twice of {RUN_COUNT * IMAGE_COUNT}; the last drivers took "
        f"{format_range(run.seconds for run in runs)} s",
    )
    assert [run.check for run in runs if not run.check.is_correct] == []
    assert kills["driver"] >= RUN_COUNT
    assert kills["loader"] >= RUNS_WITH_LOADERS
