"""Drivers that are stopped before a PUT, taken for dead, and go on when their shard has long been made by a rival."""

from __future__ import annotations

import random
import signal
import threading
from dataclasses import dataclass

import pytest
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
from fault_proxy import FaultProxy, run_fault_proxy
from figures import Figure
from seaweed import Seaweed

ZOMBIES, IMAGES, SHARD = 20, 60, 5
NAP = {"BATCHJOB_TEST_NAP": "0.1"}


@dataclass(frozen=True)
class Risen:
    """What a driver did that woke up after its rival had finished.

    Attributes:
        part: that it was about to put.
        missing: whether that part was not there as the driver was stopped.
        kept: whether each part is still the one that the rival left, the part in question among them.
        late: whether its PUT of that part went out after all.
        code: of its exit.
        waited: seconds until the rival was done, its wait for the lease included.
    """

    part: str
    missing: bool
    kept: bool
    late: bool
    code: int
    waited: float
    tally: OutputCheck


class Trap:
    """Stops a driver at its n-th commit, before the part is there: as its PUT is on the way, or just before that.

    A PUT on the way is held until the driver goes on; then it arrives. Just before it the driver asks whether its plan
    still stands; that it does, it hears when it goes on.

    Args:
        proxy: between the driver and its store.
        number: n, two at least.
        on_the_way: which of both.
    """

    def __init__(self, proxy: FaultProxy, number: int, on_the_way: bool) -> None:
        self._number, self._on_the_way = number, on_the_way
        self._puts = self._looks = 0
        self._born = threading.Event()
        self._driver: DriverProcess | None = None
        self.stopped, self.go_on = threading.Event(), threading.Event()
        proxy.decide, proxy.on_done = self._asked, self._answered

    def watch(self, driver: DriverProcess) -> None:
        self._driver = driver
        self._born.set()

    def _asked(self, method: str, path: str) -> None:
        if method == "PUT" and "/predictions/" in path:
            self._puts, self._looks = self._puts + 1, 0
            if self._on_the_way and self._puts == self._number:
                self._stop()
        elif path.endswith("/discarded"):
            self._looks += 1

    def _answered(self, method: str, path: str) -> None:
        """Of the looks at the plan between two PUTs the first belongs to the one before, the second to the next."""
        before = path.endswith("/discarded") and (self._puts, self._looks) == (self._number - 1, 2)
        if before and not self._on_the_way:
            self._stop()

    def _stop(self) -> None:
        self._born.wait(10)
        assert self._driver is not None
        self._driver.send_signal(signal.SIGSTOP)
        self.stopped.set()
        self.go_on.wait(120)


@pytest.fixture(scope="module")
def job(tmp_path_factory: pytest.TempPathFactory, s3: Seaweed) -> str:
    """A job over pictures on SeaweedFS."""
    return upload_job(tmp_path_factory.mktemp("zombie"), IMAGES, s3)


def test_what_a_rival_has_committed_stands(
    s3: Seaweed, driver_server: DriverServer, job: str, seed: int, figure: Figure
) -> None:
    """With the lease's clock at full length."""

    def rise(number: int) -> Risen:
        chance = random.Random(f"zombie {seed} {number}")
        output = s3.bucket() + "out/"
        settings = format_overrides(output__uri=output, runtime__shard_size=SHARD)
        with run_fault_proxy(s3.endpoint) as proxy:
            commit = chance.randint(2, IMAGES // SHARD)
            trap = Trap(proxy, commit, on_the_way=bool(number % 2))
            zombie = driver_server.start("run", job, *settings, env={**NAP, "AWS_ENDPOINT_URL": proxy.endpoint})
            trap.watch(zombie)
            assert zombie.wait_until(trap.stopped.is_set), zombie.stderr
            before, puts = list_committed_parts(output), len(proxy.requests)
            rival = driver_server.start("run", job, *settings).wait()
            assert rival.exit_code == 0, rival.stderr
            after = list_committed_parts(output)
            assert before.items() <= after.items()
            part = sorted(after)[commit - 1]
            zombie.send_signal(signal.SIGCONT)
            trap.go_on.set()
            ended = zombie.wait()
            later = proxy.requests[puts:] if not number % 2 else proxy.requests
        late = any(method == "PUT" and path.endswith(part) for method, path in later)
        kept = list_committed_parts(output) == after
        return Risen(part, part not in before, kept, late, ended.exit_code, rival.seconds, check_output(output, IMAGES))

    risen = run_parallel(rise, range(ZOMBIES), at_once=ZOMBIES)
    figure(
        "zombie",
        f"{sum(one.missing for one in risen)}/{ZOMBIES} stopped before their part was there, "
        f"{sum(one.missing and one.kept for one in risen)}/{ZOMBIES} with the rival's attempt in its footer; the "
        f"zombie's PUT came late {sum(one.late for one in risen)} times; rivals done after "
        f"{format_range(one.waited for one in risen)} s; exit codes {sorted({one.code for one in risen})}",
    )
    assert [one for one in risen if not (one.missing and one.kept and one.tally.is_correct)] == []
    assert {one.code for one in risen} == {75}
    assert sum(one.late for one in risen) >= ZOMBIES // 2
