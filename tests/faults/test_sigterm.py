"""SIGTERM at any time after the lease is taken: exit code 75 within 20 seconds, and the next driver starts at once.

This also holds if the store has just stopped answering and every time-out for it has just begun.
"""

from __future__ import annotations

import random
import signal
from dataclasses import dataclass
from pathlib import Path

import pytest

from tests.support.batchjob_process import (
    CompletedCommand,
    delete_lease,
    kill_on_exit,
    open_output,
    start_batchjob,
    wait_until,
)
from tests.support.color_coded_job import (
    OutputCheck,
    check_output,
    format_overrides,
    format_range,
    list_committed_parts,
    run_parallel,
    upload_job,
    write_job,
)
from tests.support.driver_server import DriverServer, LoaderOrigin
from tests.support.fault_proxy import RESET, Decide, Delay, run_fault_proxy
from tests.support.figures import Figure
from tests.support.seaweed import Seaweed

IMAGE_COUNT, LONG_SHARD, MAX_SECONDS = 120, 100, 20
OUTAGES: dict[str, Decide] = {
    "connections break": lambda method, path: RESET,
    "no request is answered": lambda method, path: Delay(600),
}


@dataclass(frozen=True)
class StopMoment:
    """Moment of the signal, and the kind of run.

    Attributes:
        delay: Time since the lease was taken, in seconds.
        shard_size: Images per shard. A shard of 100, in batches of 5 that take 3 s each, takes longer than any drain.
        processes: Loader processes.
        outage: Kind of outage of the store right before the signal; empty for none.
    """

    delay: float
    shard_size: int
    processes: int
    outage: str = ""

    @property
    def batch_seconds(self) -> float:
        """Time per batch, in seconds."""
        return 3.0 if self.shard_size == LONG_SHARD else 1.0


@dataclass(frozen=True)
class StoppedDriver:
    """Result of a driver that was stopped, and of the driver that resumed its run."""

    moment: StopMoment
    completed: CompletedCommand
    seconds: float
    parts: int
    redone_parts: int
    lease_was_held: bool
    check: OutputCheck


def is_lease_held(output: str) -> bool:
    """Return True if a driver has taken the lease."""
    return any(True for _ in open_output(output).list("_batchjob/lease/"))


@pytest.fixture(scope="module")
def job(tmp_path_factory: pytest.TempPathFactory, s3: Seaweed) -> str:
    """Make a job over images on SeaweedFS."""
    return upload_job(tmp_path_factory.mktemp("sigterm"), IMAGE_COUNT, s3)


def choose_moments(seed: int) -> list[StopMoment]:
    """Choose early and late moments, with long and short shards, with and without loader processes."""
    uniform = random.Random(f"sigterm {seed}").uniform
    early = [StopMoment(0, 20, 0), StopMoment(uniform(0, 0.3), 5, 0), StopMoment(uniform(0, 6), 20, 1)]
    short = [StopMoment(uniform(2, 10), 10, 0), StopMoment(uniform(4, 10), 5, 0)]
    long = [StopMoment(uniform(1, 4), LONG_SHARD, 0), StopMoment(uniform(4, 12), LONG_SHARD, 0)]
    outages = [StopMoment(uniform(3, 8), 5, processes, outage) for outage in OUTAGES for processes in (0, 1)]
    return [*early, *short, *long, StopMoment(uniform(6, 15), LONG_SHARD, 1), *outages]


def test_sigterm_drains_and_the_next_run_resumes(
    s3: Seaweed, driver_server: DriverServer, job: str, seed: int, figure: Figure
) -> None:
    def stop_and_resume(moment: StopMoment) -> StoppedDriver:
        output = s3.bucket() + "out/"
        servers: LoaderOrigin = "own" if moment.processes else "none"
        settings = format_overrides(
            output__uri=output,
            runtime__shard_size=moment.shard_size,
            runtime__loader__processes=moment.processes,
        )
        env = {"BATCHJOB_TEST_NAP": str(moment.batch_seconds)}
        with run_fault_proxy(s3.endpoint) as proxy:
            if moment.outage:
                env["AWS_ENDPOINT_URL"] = proxy.endpoint
            driver = driver_server.start("run", job, *settings, "--json", env=env, loaders=servers)
            driver.wait_until(lambda: is_lease_held(output))
            assert driver.run_for(moment.delay)
            if moment.outage:
                driver.wait_until(lambda: list_committed_parts(output))
                proxy.decide = OUTAGES[moment.outage]
            signalled_at = driver.seconds
            driver.send_signal(signal.SIGTERM)
            completed = driver.wait()
        parts_before = list_committed_parts(output)
        if moment.outage:
            delete_lease(output)  # it could not be released
        next_driver = driver_server.start("run", job, *settings, loaders=servers).wait()
        assert next_driver.exit_code == 0, next_driver.stderr
        redone_parts = len(parts_before.items() - list_committed_parts(output).items())
        return StoppedDriver(
            moment,
            completed,
            completed.seconds - signalled_at,
            len(parts_before),
            redone_parts,
            "waiting" in next_driver.stderr,
            check_output(output, IMAGE_COUNT),
        )

    stopped = run_parallel(stop_and_resume, choose_moments(seed), at_once=12)
    for driver in stopped:
        print(f"{driver.moment}: {driver.completed.exit_code} after {driver.seconds:.1f} s with {driver.parts} parts")
    with_store = [driver for driver in stopped if not driver.moment.outage]
    without_store = [driver for driver in stopped if driver.moment.outage]
    delay = format_range(driver.moment.delay for driver in with_store)
    figure("SIGTERM", f"{len(with_store)} drivers, {delay} s after they took the lease: {describe_stops(with_store)}")
    figure(
        "SIGTERM",
        f"{len(without_store)} drivers, right after their store fell silent ({' or '.join(OUTAGES)}), under the "
        f"default patience: {describe_stops(without_store)}",
    )
    for driver in stopped:
        assert (driver.completed.exit_code, driver.completed.json_result["status"]) == (75, "temporary"), driver
        assert driver.seconds <= MAX_SECONDS, driver
        assert driver.redone_parts == 0, driver
        assert not driver.lease_was_held, "the lease was left behind"
        assert driver.check.is_correct, driver


def describe_stops(stopped: list[StoppedDriver]) -> str:
    """Describe how drivers ended, for the table of figures."""
    codes = sorted({driver.completed.exit_code for driver in stopped})
    seconds = format_range(driver.seconds for driver in stopped)
    redone_parts, parts = sum(driver.redone_parts for driver in stopped), sum(driver.parts for driver in stopped)
    return f"exit codes {codes} after {seconds} s, {redone_parts} of {parts} parts redone"


@pytest.mark.parametrize("delay", [0.0, 2.0])
def test_sigterm_while_torch_is_imported(delay: float, tmp_path: Path, figure: Figure) -> None:
    """Stop a command from the shell, which takes the lease first and imports torch afterwards."""
    job, output = write_job(tmp_path, IMAGE_COUNT), str(tmp_path / "out")
    with kill_on_exit(start_batchjob("run", job, "--json", env={"BATCHJOB_TEST_NAP": "1"})) as command:
        wait_until(lambda: is_lease_held(output), command=command)
        signalled_at = command.seconds + delay
        wait_until(lambda: command.seconds >= signalled_at, command=command)
        command.process.send_signal(signal.SIGTERM)
        completed = command.wait()
    seconds = completed.seconds - signalled_at
    figure("SIGTERM", f"{delay:.0f} s after a command from the shell took the lease: {seconds:.1f} s")
    assert (completed.exit_code, completed.json_result["status"]) == (75, "temporary"), completed.stderr
    assert seconds <= MAX_SECONDS
