"""Drivers killed at one request, before or after the store has carried it out: what is committed is not redone."""

from __future__ import annotations

import random
import re
import signal
import threading
from dataclasses import dataclass

import pytest
from color_coded_job import OutputCheck, check_output, format_overrides, list_committed_parts, run_parallel, upload_job
from driver_server import DriverProcess, DriverServer
from fault_proxy import RESET, FaultProxy, run_fault_proxy
from figures import Figure
from seaweed import Seaweed

IMAGES, SHARD, POINTS = 120, 10, 20


@dataclass(frozen=True)
class Point:
    """A moment to kill at: as this PUT arrives, which then the store never sees, or once it is carried out."""

    number: int
    carried_out: bool


@dataclass(frozen=True)
class Resumed:
    """What a fresh driver made of what a killed one had left."""

    point: Point
    request: str
    before: int
    redone: list[str]
    read_again: int
    tally: OutputCheck


class Killer:
    """Kills a driver at a point of its way through a go-between."""

    def __init__(self, proxy: FaultProxy, point: Point) -> None:
        self._point, self._lock, self._puts = point, threading.Lock(), 0
        self._born = threading.Event()
        self._driver: DriverProcess | None = None
        self.request = ""
        if point.carried_out:
            proxy.on_done = self._see
        else:
            proxy.decide = lambda method, path: RESET if self._see(method, path) else None

    def watch(self, driver: DriverProcess) -> None:
        self._driver = driver
        self._born.set()

    def _see(self, method: str, path: str) -> bool:
        """Whether this was the point."""
        if not is_step(method, path):
            return False
        with self._lock:
            self._puts += 1
            hit = self._puts == self._point.number
        if hit:
            self._born.wait(10)
            assert self._driver is not None
            self.request = path
            self._driver.send_signal(signal.SIGKILL)
        return hit


def is_step(method: str, path: str) -> bool:
    """A write of the run, but for its lease, whose beats nobody can count beforehand, and the probe of the store."""
    return method == "PUT" and "/lease/" not in path and "/probe/" not in path


def positions(part: str) -> range:
    """Images of a part, by its name."""
    found = re.search(r"part-(\d+)-", part)
    assert found is not None
    first = int(found[1]) * SHARD
    return range(first, first + SHARD)


def images_read(proxy: FaultProxy) -> set[int]:
    found = (re.search(r"images/(\d+)\.png", path) for method, path in proxy.requests if method == "GET")
    return {int(name[1]) for name in found if name}


def run_through(proxy: FaultProxy, driver_server: DriverServer, job: str, output: str) -> DriverProcess:
    env = {"AWS_ENDPOINT_URL": proxy.endpoint}
    return driver_server.start(
        "run", job, *format_overrides(output__uri=output, runtime__shard_size=SHARD), env=env, short_lease=True
    )


@pytest.fixture(scope="module")
def job(tmp_path_factory: pytest.TempPathFactory, s3: Seaweed) -> str:
    """A job over pictures on SeaweedFS."""
    return upload_job(tmp_path_factory.mktemp("resume"), IMAGES, s3)


def test_a_fresh_driver_redoes_nothing_that_is_committed(
    s3: Seaweed, driver_server: DriverServer, job: str, seed: int, figure: Figure
) -> None:
    def resume(point: Point) -> Resumed:
        output = s3.bucket() + "out/"
        with run_fault_proxy(s3.endpoint) as proxy:
            killer = Killer(proxy, point)
            driver = run_through(proxy, driver_server, job, output)
            killer.watch(driver)
            assert driver.wait().exit_code == -signal.SIGKILL, f"{point} never came: {driver.stderr}"
        before = list_committed_parts(output)
        with run_fault_proxy(s3.endpoint) as proxy:
            ended = run_through(proxy, driver_server, job, output).wait()
            assert ended.exit_code == 0, ended.stderr
            read = images_read(proxy)
        after = list_committed_parts(output)
        redone = [part for part, made in before.items() if after.get(part) != made]
        again = {position for part in before for position in positions(part)} & read
        return Resumed(point, killer.request, len(before), redone, len(again), check_output(output, IMAGES))

    points = chosen(seed, steps_of_a_clean_run(s3, driver_server, job))
    runs = run_parallel(resume, points, at_once=8)
    for run in sorted(runs, key=lambda run: run.point.number):
        print(f"{run.point}: {run.request}: {run.before} parts, {run.read_again} images read again")
    redone, again = sum(len(run.redone) for run in runs), sum(run.read_again for run in runs)
    figure(
        "resume",
        f"{POINTS} drivers killed at a PUT, with {sum(r.before for r in runs)} parts committed in all: "
        f"{redone} redone, {again} of their images read again",
    )
    assert [run for run in runs if run.redone or run.read_again or not run.tally.is_correct] == []


def steps_of_a_clean_run(s3: Seaweed, driver_server: DriverServer, job: str) -> int:
    """How many writes there are from first to last."""
    with run_fault_proxy(s3.endpoint) as proxy:
        assert run_through(proxy, driver_server, job, s3.bucket() + "out/").wait().exit_code == 0
        return sum(is_step(method, path) for method, path in proxy.requests)


def chosen(seed: int, steps: int) -> list[Point]:
    """Some of all the moments there are: the very first and last always, that is in planning and in finishing."""
    every = [Point(number, carried_out) for number in range(1, steps + 1) for carried_out in (False, True)]
    ends = [*every[:2], *every[-2:]]
    return ends + random.Random(f"resume {seed}").sample(every[2:-2], POINTS - len(ends))
