"""Concurrent drivers, as if a scheduler had fired twice or eight times: one works, the others exit soon with 75."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import pytest

from tests.support.batchjob_process import CompletedCommand, kill_on_exit, start_batchjob
from tests.support.color_coded_job import (
    OutputCheck,
    check_output,
    format_overrides,
    format_range,
    run_parallel,
    upload_job,
    write_job,
)
from tests.support.driver_server import DriverServer
from tests.support.figures import Figure
from tests.support.seaweed import Seaweed

IMAGE_COUNT = 120
MAX_LOSER_SECONDS = 10
SLOW_BATCHES = {"BATCHJOB_TEST_NAP": "0.3"}  # seconds per batch; 24 batches outlast the losers


@dataclass(frozen=True)
class ConcurrentRun:
    """Result of drivers that were started at once."""

    drivers: int
    winners: list[CompletedCommand]
    losers: list[CompletedCommand]
    check: OutputCheck


def run_concurrently(driver_server: DriverServer, job: str, output: str, drivers: int) -> ConcurrentRun:
    settings = [*format_overrides(output__uri=output), "--json"]
    started = [driver_server.start("run", job, *settings, env=SLOW_BATCHES) for _ in range(drivers)]
    return sort_drivers([driver.wait() for driver in started], output)


def sort_drivers(completed: list[CompletedCommand], output: str) -> ConcurrentRun:
    winners = [driver for driver in completed if driver.exit_code == 0]
    losers = [driver for driver in completed if driver.exit_code != 0]
    return ConcurrentRun(len(completed), winners, losers, check_output(output, IMAGE_COUNT))


@pytest.mark.parametrize("where", ["local", "SeaweedFS"])
def test_one_of_many_concurrent_drivers_works(
    where: str, s3: Seaweed, driver_server: DriverServer, tmp_path: Path, figure: Figure
) -> None:
    on_s3 = where == "SeaweedFS"
    job = upload_job(tmp_path, IMAGE_COUNT, s3) if on_s3 else write_job(tmp_path, IMAGE_COUNT)
    runs = [
        run_concurrently(
            driver_server, job, s3.bucket() + "out/" if on_s3 else str(tmp_path / f"out{drivers}"), drivers
        )
        for drivers in (2, 4, 8)
    ]
    losers = [loser for run in runs for loser in run.losers]
    figure(
        "double fire",
        f"2, 4 and 8 drivers at once, {where}: {[len(run.winners) for run in runs]} winners, losers' exit codes "
        f"{sorted({loser.exit_code for loser in losers})} after {format_range(loser.seconds for loser in losers)} s, "
        f"{[run.check.plans for run in runs]} plans, {sum(run.check.duplicates for run in runs)} rows twice",
    )
    for run in runs:
        assert len(run.winners) == 1, [completed.stderr for completed in run.losers]
        assert run.check.is_correct, run.check
    for loser in losers:
        assert (loser.exit_code, loser.json_result["status"]) == (75, "temporary"), loser.stderr
        assert "another driver" in loser.json_result["message"]
        assert loser.seconds <= MAX_LOSER_SECONDS


def test_command_started_twice_from_the_shell(tmp_path: Path, figure: Figure) -> None:
    """Start the command from the shell, including all imports."""
    command = ["run", write_job(tmp_path, IMAGE_COUNT), "--json"]
    with (
        kill_on_exit(start_batchjob(*command, env=SLOW_BATCHES)) as first,
        kill_on_exit(start_batchjob(*command, env=SLOW_BATCHES)) as second,
    ):
        completed = run_parallel(lambda command: command.wait(), [first, second], at_once=2)
    run = sort_drivers(completed, str(tmp_path / "out"))
    figure(
        "double fire",
        f"2 commands from the shell: the loser left after {format_range(loser.seconds for loser in run.losers)} s",
    )
    assert run.check.is_correct, run.check
    (loser,) = run.losers
    assert (loser.exit_code, loser.json_result["status"]) == (75, "temporary"), loser.stderr
    assert loser.seconds <= MAX_LOSER_SECONDS
