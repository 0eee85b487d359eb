"""A scheduler that fires twice, or eight times: one driver works, the others say so in good time."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import pytest
from batchjob_process import CompletedCommand, kill_on_exit, start_batchjob
from color_coded_job import (
    OutputCheck,
    check_output,
    format_overrides,
    format_range,
    run_parallel,
    upload_job,
    write_job,
)
from driver_server import DriverServer
from figures import Figure
from seaweed import Seaweed

IMAGES = 120
LOSER_SECONDS = 10
NAP = {"BATCHJOB_TEST_NAP": "0.3"}  # a batch; 24 of them outlast the losers


@dataclass(frozen=True)
class Fired:
    """What became of drivers that were started at once."""

    drivers: int
    winners: list[CompletedCommand]
    losers: list[CompletedCommand]
    tally: OutputCheck


def fire(driver_server: DriverServer, job: str, output: str, drivers: int) -> Fired:
    settings = [*format_overrides(output__uri=output), "--json"]
    started = [driver_server.start("run", job, *settings, env=NAP) for _ in range(drivers)]
    return sorted_out([driver.wait() for driver in started], output)


def sorted_out(ended: list[CompletedCommand], output: str) -> Fired:
    winners = [one for one in ended if one.exit_code == 0]
    losers = [one for one in ended if one.exit_code != 0]
    return Fired(len(ended), winners, losers, check_output(output, IMAGES))


@pytest.mark.parametrize("where", ["local", "SeaweedFS"])
def test_of_many_drivers_one_works(
    where: str, s3: Seaweed, driver_server: DriverServer, tmp_path: Path, request: pytest.FixtureRequest, figure: Figure
) -> None:
    on_s3 = where == "SeaweedFS"
    job = upload_job(tmp_path, IMAGES, s3) if on_s3 else write_job(tmp_path, IMAGES)
    fired = [
        fire(driver_server, job, s3.bucket() + "out/" if on_s3 else str(tmp_path / f"out{drivers}"), drivers)
        for drivers in (2, 4, 8)
    ]
    losers = [loser for one in fired for loser in one.losers]
    figure(
        "double fire",
        f"2, 4 and 8 drivers at once, {where}: {[len(one.winners) for one in fired]} winners, losers' exit codes "
        f"{sorted({loser.exit_code for loser in losers})} after {format_range(loser.seconds for loser in losers)} s, "
        f"{[one.tally.plans for one in fired]} plans, {sum(one.tally.duplicates for one in fired)} rows twice",
    )
    for one in fired:
        assert len(one.winners) == 1, [ended.stderr for ended in one.losers]
        assert one.tally.is_correct, one.tally
    for loser in losers:
        assert (loser.exit_code, loser.json_result["status"]) == (75, "temporary"), loser.stderr
        assert "another driver" in loser.json_result["message"]
        assert loser.seconds <= LOSER_SECONDS


def test_a_scheduler_s_own_command_fired_twice(tmp_path: Path, figure: Figure) -> None:
    """The same from the shell, with all that a start takes."""
    command = ["run", write_job(tmp_path, IMAGES), "--json"]
    with (
        kill_on_exit(start_batchjob(*command, env=NAP)) as one,
        kill_on_exit(start_batchjob(*command, env=NAP)) as other,
    ):
        ended = run_parallel(lambda command: command.wait(), [one, other], at_once=2)
    fired = sorted_out(ended, str(tmp_path / "out"))
    figure(
        "double fire",
        f"2 commands from the shell: the loser left after {format_range(one.seconds for one in fired.losers)} s",
    )
    assert fired.tally.is_correct, fired.tally
    (loser,) = fired.losers
    assert (loser.exit_code, loser.json_result["status"]) == (75, "temporary"), loser.stderr
    assert loser.seconds <= LOSER_SECONDS
