"""SIGTERM at any time once the lease is held: 75 within 20 seconds, and the next driver goes on at once.

Also where the store has fallen silent a moment ago, and all clocks that wait for it have just begun.
"""

from __future__ import annotations

import random
import signal
from dataclasses import dataclass
from pathlib import Path

import pytest
from batchjob_process import CompletedCommand, delete_lease, kill_on_exit, open_output, start_batchjob, wait_until
from color_coded_job import (
    OutputCheck,
    check_output,
    format_overrides,
    format_range,
    list_committed_parts,
    run_parallel,
    upload_job,
    write_job,
)
from driver_server import DriverServer, LoaderOrigin
from fault_proxy import RESET, Decide, Delay, run_fault_proxy
from figures import Figure
from seaweed import Seaweed

IMAGES, LONG, SECONDS = 120, 100, 20
SILENCES: dict[str, Decide] = {
    "connections break": lambda method, path: RESET,
    "no request is answered": lambda method, path: Delay(600),
}


@dataclass(frozen=True)
class Moment:
    """When the signal comes, and in what kind of run.

    Attributes:
        after: seconds since the lease was taken.
        shard: images in a shard; one of 100, in batches of 5 that take 3 s each, outlasts any grace.
        processes: of the loader.
        silence: how the store fell silent right before, if it did.
    """

    after: float
    shard: int
    processes: int
    silence: str = ""

    @property
    def nap(self) -> float:
        """Seconds a batch."""
        return 3.0 if self.shard == LONG else 1.0


@dataclass(frozen=True)
class Stopped:
    """How a driver ended that was asked to, and what the next one made of it."""

    moment: Moment
    ended: CompletedCommand
    seconds: float
    parts: int
    redone: int
    waited: bool
    tally: OutputCheck


def held(output: str) -> bool:
    """Whether a driver has taken the lease."""
    return any(True for _ in open_output(output).list("_batchjob/lease/"))


@pytest.fixture(scope="module")
def job(tmp_path_factory: pytest.TempPathFactory, s3: Seaweed) -> str:
    """A job over pictures on SeaweedFS."""
    return upload_job(tmp_path_factory.mktemp("sigterm"), IMAGES, s3)


def moments(seed: int) -> list[Moment]:
    """Early and late, with long shards and short ones, with loader processes and without."""
    chance = random.Random(f"sigterm {seed}")
    early = [Moment(0, 20, 0), Moment(chance.uniform(0, 0.3), 5, 0), Moment(chance.uniform(0, 6), 20, 1)]
    short = [Moment(chance.uniform(2, 10), 10, 0), Moment(chance.uniform(4, 10), 5, 0)]
    long = [Moment(chance.uniform(1, 4), LONG, 0), Moment(chance.uniform(4, 12), LONG, 0)]
    silent = [Moment(chance.uniform(3, 8), 5, processes, how) for how in SILENCES for processes in (0, 1)]
    return [*early, *short, *long, Moment(chance.uniform(6, 15), LONG, 1), *silent]


def test_it_drains_and_the_next_run_resumes(
    s3: Seaweed, driver_server: DriverServer, job: str, seed: int, figure: Figure
) -> None:
    def stop(moment: Moment) -> Stopped:
        output = s3.bucket() + "out/"
        servers: LoaderOrigin = "own" if moment.processes else "none"
        settings = format_overrides(
            output__uri=output,
            runtime__shard_size=moment.shard,
            runtime__loader__processes=moment.processes,
        )
        env = {"BATCHJOB_TEST_NAP": str(moment.nap)}
        with run_fault_proxy(s3.endpoint) as gate:
            if moment.silence:
                env["AWS_ENDPOINT_URL"] = gate.endpoint
            driver = driver_server.start("run", job, *settings, "--json", env=env, loaders=servers)
            driver.wait_until(lambda: held(output))
            assert driver.run_for(moment.after)
            if moment.silence:
                driver.wait_until(lambda: list_committed_parts(output))
                gate.decide = SILENCES[moment.silence]
            asked = driver.seconds
            driver.send_signal(signal.SIGTERM)
            ended = driver.wait()
        before = list_committed_parts(output)
        if moment.silence:
            delete_lease(output)  # it could not be given back
        heir = driver_server.start("run", job, *settings, loaders=servers).wait()
        assert heir.exit_code == 0, heir.stderr
        redone = len(before.items() - list_committed_parts(output).items())
        return Stopped(
            moment,
            ended,
            ended.seconds - asked,
            len(before),
            redone,
            "waiting" in heir.stderr,
            check_output(output, IMAGES),
        )

    stopped = run_parallel(stop, moments(seed), at_once=12)
    for one in stopped:
        print(f"{one.moment}: {one.ended.exit_code} after {one.seconds:.1f} s with {one.parts} parts")
    heard = [one for one in stopped if not one.moment.silence]
    unheard = [one for one in stopped if one.moment.silence]
    after = format_range(one.moment.after for one in heard)
    figure("SIGTERM", f"{len(heard)} drivers, {after} s after they took the lease: {words(heard)}")
    figure(
        "SIGTERM",
        f"{len(unheard)} drivers, right after their store fell silent ({' or '.join(SILENCES)}), under the default "
        f"patience: {words(unheard)}",
    )
    for one in stopped:
        assert (one.ended.exit_code, one.ended.json_result["status"]) == (75, "temporary"), one
        assert one.seconds <= SECONDS, one
        assert one.redone == 0, one
        assert not one.waited, "the lease was left behind"
        assert one.tally.is_correct, one


def words(stopped: list[Stopped]) -> str:
    """How they ended, for the table."""
    codes, seconds = sorted({one.ended.exit_code for one in stopped}), format_range(one.seconds for one in stopped)
    redone, parts = sum(one.redone for one in stopped), sum(one.parts for one in stopped)
    return f"exit codes {codes} after {seconds} s, {redone} of {parts} parts redone"


@pytest.mark.parametrize("after", [0.0, 2.0])
def test_while_torch_is_still_being_imported(after: float, tmp_path: Path, figure: Figure) -> None:
    """The command from the shell, which takes the lease first and imports afterwards."""
    job, output = write_job(tmp_path, IMAGES), str(tmp_path / "out")
    with kill_on_exit(start_batchjob("run", job, "--json", env={"BATCHJOB_TEST_NAP": "1"})) as command:
        wait_until(lambda: held(output), command=command)
        asked = command.seconds + after
        wait_until(lambda: command.seconds >= asked, command=command)
        command.process.send_signal(signal.SIGTERM)
        ended = command.wait()
    figure("SIGTERM", f"{after:.0f} s after a command from the shell took the lease: {ended.seconds - asked:.1f} s")
    assert (ended.exit_code, ended.json_result["status"]) == (75, "temporary"), ended.stderr
    assert ended.seconds - asked <= SECONDS
