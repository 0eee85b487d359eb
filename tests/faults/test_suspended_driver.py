"""Drivers that are suspended before a PUT, lose their lease, and go on after a rival has committed their shard."""

from __future__ import annotations

import random
import signal
import threading
from dataclasses import dataclass

import pytest

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
from tests.support.fault_proxy import FaultProxy, run_fault_proxy
from tests.support.figures import Figure
from tests.support.seaweed import Seaweed

DRIVER_COUNT, IMAGE_COUNT, SHARD_SIZE = 20, 60, 5
SLOW_BATCHES = {"BATCHJOB_TEST_NAP": "0.1"}


@dataclass(frozen=True)
class ResumedDriver:
    """Result of a driver that was resumed after its rival had finished.

    Attributes:
        part: Part that it was about to put.
        was_missing: Whether that part was missing when the driver was suspended.
        parts_unchanged: Whether all parts are still the rival's.
        late_put: Whether its PUT of that part was sent after all.
        exit_code: Its exit code.
        rival_seconds: Time until the rival was done, with its wait for the lease, in seconds.
        check: Check of the output.
    """

    part: str
    was_missing: bool
    parts_unchanged: bool
    late_put: bool
    exit_code: int
    rival_seconds: float
    check: OutputCheck


class SuspendTrap:
    """Suspend a driver at its n-th commit before the part is there: during its PUT, or just before it.

    A PUT is held until the driver goes on; then it arrives. Just before a PUT the driver reads the plan's tombstone; it
    gets the answer, that the plan is in force, when it goes on.

    Args:
        proxy: Proxy between the driver and its store.
        number: n; at least 2.
        during_put: Suspend during the PUT, not before it.
    """

    def __init__(self, proxy: FaultProxy, number: int, during_put: bool) -> None:
        self._number, self._during_put = number, during_put
        self._puts = self._tombstone_reads = 0
        self._driver_known = threading.Event()
        self._driver: DriverProcess | None = None
        self.suspended, self.may_continue = threading.Event(), threading.Event()
        proxy.decide, proxy.on_done = self._handle_request, self._handle_response

    def watch(self, driver: DriverProcess) -> None:
        self._driver = driver
        self._driver_known.set()

    def _handle_request(self, method: str, path: str) -> None:
        if method == "PUT" and "/predictions/" in path:
            self._puts, self._tombstone_reads = self._puts + 1, 0
            if self._during_put and self._puts == self._number:
                self._suspend()
        elif path.endswith("/discarded"):
            self._tombstone_reads += 1

    def _handle_response(self, method: str, path: str) -> None:
        # The first tombstone read between two PUTs belongs to the PUT before, the second one to the next PUT.
        before = path.endswith("/discarded") and (self._puts, self._tombstone_reads) == (self._number - 1, 2)
        if before and not self._during_put:
            self._suspend()

    def _suspend(self) -> None:
        self._driver_known.wait(10)
        assert self._driver is not None
        self._driver.send_signal(signal.SIGSTOP)
        self.suspended.set()
        self.may_continue.wait(120)


@pytest.fixture(scope="module")
def job(tmp_path_factory: pytest.TempPathFactory, s3: Seaweed) -> str:
    """Make a job over images on SeaweedFS."""
    return upload_job(tmp_path_factory.mktemp("zombie"), IMAGE_COUNT, s3)


def test_parts_of_a_rival_are_never_overwritten(
    s3: Seaweed, driver_server: DriverServer, job: str, seed: int, figure: Figure
) -> None:
    # The leases expire as in production.
    def suspend_and_resume(number: int) -> ResumedDriver:
        random_numbers = random.Random(f"zombie {seed} {number}")
        output = s3.bucket() + "out/"
        settings = format_overrides(output__uri=output, runtime__shard_size=SHARD_SIZE)
        with run_fault_proxy(s3.endpoint) as proxy:
            commit = random_numbers.randint(2, IMAGE_COUNT // SHARD_SIZE)
            trap = SuspendTrap(proxy, commit, during_put=bool(number % 2))
            env = {**SLOW_BATCHES, "AWS_ENDPOINT_URL": proxy.endpoint}
            driver = driver_server.start("run", job, *settings, env=env)
            trap.watch(driver)
            assert driver.wait_until(trap.suspended.is_set), driver.stderr
            before, puts = list_committed_parts(output), len(proxy.requests)
            rival = driver_server.start("run", job, *settings).wait()
            assert rival.exit_code == 0, rival.stderr
            after = list_committed_parts(output)
            assert before.items() <= after.items()
            part = sorted(after)[commit - 1]
            driver.send_signal(signal.SIGCONT)
            trap.may_continue.set()
            completed = driver.wait()
            later_requests = proxy.requests[puts:] if not number % 2 else proxy.requests
        late_put = any(method == "PUT" and path.endswith(part) for method, path in later_requests)
        parts_unchanged = list_committed_parts(output) == after
        return ResumedDriver(
            part=part,
            was_missing=part not in before,
            parts_unchanged=parts_unchanged,
            late_put=late_put,
            exit_code=completed.exit_code,
            rival_seconds=rival.seconds,
            check=check_output(output, IMAGE_COUNT),
        )

    drivers = run_parallel(suspend_and_resume, range(DRIVER_COUNT), at_once=DRIVER_COUNT)
    kept = [driver for driver in drivers if driver.was_missing and driver.parts_unchanged]
    late_puts = sum(driver.late_put for driver in drivers)
    exit_codes = {driver.exit_code for driver in drivers}
    figure(
        "zombie",
        f"{sum(driver.was_missing for driver in drivers)}/{DRIVER_COUNT} stopped before their part was there, "
        f"{len(kept)}/{DRIVER_COUNT} with the rival's attempt in its footer; the "
        f"zombie's PUT came late {late_puts} times; rivals done after "
        f"{format_range(driver.rival_seconds for driver in drivers)} s; exit codes {sorted(exit_codes)}",
    )
    assert [driver for driver in drivers if driver not in kept or not driver.check.is_correct] == []
    assert exit_codes == {75}
    assert late_puts >= DRIVER_COUNT // 2
