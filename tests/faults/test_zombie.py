"""Drivers that are stopped before a PUT, taken for dead, and go on when their shard has long been made by a rival."""

from __future__ import annotations

import random
import signal
import threading
from dataclasses import dataclass

import pytest
from faulty import Faulty, between
from figures import Figure
from nursery import Driver, Nursery
from pictures import Tally, committed, numbers, overrides, publish, side_by_side, tally
from seaweed import Seaweed

ZOMBIES, IMAGES, SHARD = 20, 60, 5
NAP = {"BATCHJOB_TEST_NAP": "0.1"}


@dataclass(frozen=True)
class Risen:
    """What a driver did that woke up after its rival had finished.

    Attributes:
        part: that it was about to make.
        kept: whether each part is still the one that the rival left, the part in question among them.
        late: whether its PUT of that part went out after all.
        code: of its exit.
        waited: seconds until the rival was done, its wait for the lease included.
    """

    part: str
    kept: bool
    late: bool
    code: int
    waited: float
    tally: Tally


class Trap:
    """Stops a driver at its n-th commit: as it asks whether its plan still stands, or as its PUT is on the way.

    A PUT on the way is held until the driver goes on; then it arrives.
    """

    def __init__(self, proxy: Faulty, number: int, on_the_way: bool) -> None:
        self._number, self._on_the_way, self._met = number, on_the_way, 0
        self._born = threading.Event()
        self._driver: Driver | None = None
        self.stopped, self.go_on = threading.Event(), threading.Event()
        proxy.decide = self._decide

    def watch(self, driver: Driver) -> None:
        self._driver = driver
        self._born.set()

    def _decide(self, method: str, path: str) -> None:
        commits = method == "PUT" and "/predictions/" in path if self._on_the_way else path.endswith("/discarded")
        self._met += commits
        if not commits or self._met != self._number:
            return
        self._born.wait(10)
        assert self._driver is not None
        self._driver.send(signal.SIGSTOP)
        self.stopped.set()
        self.go_on.wait(120)


@pytest.fixture(scope="module")
def job(tmp_path_factory: pytest.TempPathFactory, s3: Seaweed) -> str:
    """A job over pictures on SeaweedFS."""
    return publish(tmp_path_factory.mktemp("zombie"), IMAGES, s3)


def test_what_a_rival_has_committed_stands(s3: Seaweed, nursery: Nursery, job: str, seed: int, figure: Figure) -> None:
    """With the lease's clock at full length."""

    def rise(number: int) -> Risen:
        chance = random.Random(f"zombie {seed} {number}")
        output = s3.bucket() + "out/"
        settings = overrides(output__uri=output, runtime__shard_size=SHARD)
        with between(s3.endpoint) as proxy:
            trap = Trap(proxy, chance.randint(2, IMAGES // SHARD), on_the_way=bool(number % 2))
            zombie = nursery.start("run", job, *settings, env={**NAP, "AWS_ENDPOINT_URL": proxy.endpoint})
            trap.watch(zombie)
            zombie.until(trap.stopped.is_set)
            before, puts = committed(output), len(proxy.seen)
            rival = nursery.start("run", job, *settings).end()
            assert rival.code == 0, rival.err
            after = committed(output)
            assert before.items() <= after.items()
            (part, *_) = sorted(after.keys() - before.keys())
            zombie.send(signal.SIGCONT)
            trap.go_on.set()
            ended = zombie.end()
            later = proxy.seen[puts:] if not number % 2 else proxy.seen
        late = any(method == "PUT" and path.endswith(part) for method, path in later)
        return Risen(part, committed(output) == after, late, ended.code, rival.seconds, tally(output, IMAGES))

    risen = side_by_side(rise, range(ZOMBIES), at_once=ZOMBIES)
    figure(
        "zombie",
        f"{sum(one.kept for one in risen)}/{ZOMBIES} with the rival's attempt in the footer; the zombie's PUT came "
        f"late {sum(one.late for one in risen)} times; rivals done after {numbers(one.waited for one in risen)} s; "
        f"exit codes {sorted({one.code for one in risen})}",
    )
    assert [one for one in risen if not one.kept or not one.tally.right] == []
    assert {one.code for one in risen} == {75}
    assert sum(one.late for one in risen) >= ZOMBIES // 2
