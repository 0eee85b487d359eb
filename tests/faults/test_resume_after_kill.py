"""Drivers killed at a PUT, before or after the store carries it out: a resume redoes no committed part."""

from __future__ import annotations

import random
import re
import signal
import threading
from dataclasses import dataclass

import pytest

from tests.support.color_coded_job import (
    OutputCheck,
    check_output,
    format_overrides,
    list_committed_parts,
    run_parallel,
    upload_job,
)
from tests.support.driver_server import DriverProcess, DriverServer
from tests.support.fault_proxy import RESET, FaultProxy, run_fault_proxy
from tests.support.figures import Figure
from tests.support.seaweed import Seaweed

IMAGE_COUNT, SHARD_SIZE, POINT_COUNT = 120, 10, 20


@dataclass(frozen=True)
class KillPoint:
    """Moment of a kill: when this PUT arrives, which the store then never sees, or after the store has done it.

    Attributes:
        number: Number of the PUT, from 1.
        after_response: Kill after the store has done the PUT.
    """

    number: int
    after_response: bool


@dataclass(frozen=True)
class ResumedOutput:
    """Result of a driver that resumed the output of a killed one.

    Attributes:
        point: Moment of the kill.
        request: Path of the PUT at which the first driver was killed.
        parts_before: Number of parts that it had committed.
        redone_parts: Parts among them that are no longer the same.
        images_read_again: Number of images of these parts that the second driver read.
        check: Check of the output.
    """

    point: KillPoint
    request: str
    parts_before: int
    redone_parts: list[str]
    images_read_again: int
    check: OutputCheck


class KillAtRequest:
    """Kill a driver at one of its requests, from the proxy between the driver and its store."""

    def __init__(self, proxy: FaultProxy, point: KillPoint) -> None:
        self._point, self._lock, self._puts = point, threading.Lock(), 0
        self._driver_known = threading.Event()
        self._driver: DriverProcess | None = None
        self.request = ""
        if point.after_response:
            proxy.on_done = self._count_request
        else:
            proxy.decide = lambda method, path: RESET if self._count_request(method, path) else None

    def watch(self, driver: DriverProcess) -> None:
        self._driver = driver
        self._driver_known.set()

    def _count_request(self, method: str, path: str) -> bool:
        """Count a request; kill the driver and return True if it is the one."""
        if not is_counted_write(method, path):
            return False
        with self._lock:
            self._puts += 1
            is_point = self._puts == self._point.number
        if is_point:
            self._driver_known.wait(10)
            assert self._driver is not None
            self.request = path
            self._driver.send_signal(signal.SIGKILL)
        return is_point


def is_counted_write(method: str, path: str) -> bool:
    """Return True if a request is a write of the run, except the probe and the lease, whose number of writes varies."""
    return method == "PUT" and "/lease/" not in path and "/probe/" not in path


def list_positions(part: str) -> range:
    """Return the positions of a part, from its name."""
    found = re.search(r"part-(\d+)-", part)
    assert found is not None
    first = int(found[1]) * SHARD_SIZE
    return range(first, first + SHARD_SIZE)


def list_images_read(proxy: FaultProxy) -> set[int]:
    found = (re.search(r"images/(\d+)\.png", path) for method, path in proxy.requests if method == "GET")
    return {int(name[1]) for name in found if name}


def start_run(proxy: FaultProxy, driver_server: DriverServer, job: str, output: str) -> DriverProcess:
    env = {"AWS_ENDPOINT_URL": proxy.endpoint}
    return driver_server.start(
        "run", job, *format_overrides(output__uri=output, runtime__shard_size=SHARD_SIZE), env=env, short_lease=True
    )


@pytest.fixture(scope="module")
def job(tmp_path_factory: pytest.TempPathFactory, s3: Seaweed) -> str:
    """Make a job over images on SeaweedFS."""
    return upload_job(tmp_path_factory.mktemp("resume"), IMAGE_COUNT, s3)


def test_resume_redoes_no_committed_part(
    s3: Seaweed, driver_server: DriverServer, job: str, seed: int, figure: Figure
) -> None:
    def kill_and_resume(point: KillPoint) -> ResumedOutput:
        output = s3.bucket() + "out/"
        with run_fault_proxy(s3.endpoint) as proxy:
            killer = KillAtRequest(proxy, point)
            driver = start_run(proxy, driver_server, job, output)
            killer.watch(driver)
            assert driver.wait().exit_code == -signal.SIGKILL, f"{point} never came: {driver.stderr}"
        parts_before = list_committed_parts(output)
        with run_fault_proxy(s3.endpoint) as proxy:
            completed = start_run(proxy, driver_server, job, output).wait()
            assert completed.exit_code == 0, completed.stderr
            read = list_images_read(proxy)
        after = list_committed_parts(output)
        redone_parts = [part for part, footer in parts_before.items() if after.get(part) != footer]
        committed_positions = {position for part in parts_before for position in list_positions(part)}
        return ResumedOutput(
            point=point,
            request=killer.request,
            parts_before=len(parts_before),
            redone_parts=redone_parts,
            images_read_again=len(committed_positions & read),
            check=check_output(output, IMAGE_COUNT),
        )

    points = choose_points(seed, count_writes_of_a_run(s3, driver_server, job))
    runs = run_parallel(kill_and_resume, points, at_once=8)
    for run in sorted(runs, key=lambda run: run.point.number):
        print(f"{run.point}: {run.request}: {run.parts_before} parts, {run.images_read_again} images read again")
    redone_parts, read_again = sum(len(run.redone_parts) for run in runs), sum(run.images_read_again for run in runs)
    figure(
        "resume",
        f"{POINT_COUNT} drivers killed at a PUT, with {sum(r.parts_before for r in runs)} parts committed in all: "
        f"{redone_parts} redone, {read_again} of their images read again",
    )
    assert [run for run in runs if run.redone_parts or run.images_read_again or not run.check.is_correct] == []


def count_writes_of_a_run(s3: Seaweed, driver_server: DriverServer, job: str) -> int:
    """Count the writes of an undisturbed run."""
    with run_fault_proxy(s3.endpoint) as proxy:
        assert start_run(proxy, driver_server, job, s3.bucket() + "out/").wait().exit_code == 0
        return sum(is_counted_write(method, path) for method, path in proxy.requests)


def choose_points(seed: int, writes: int) -> list[KillPoint]:
    """Choose random moments, and always the first and the last two, which are in planning and in finishing."""
    points = [KillPoint(number, after_response) for number in range(1, writes + 1) for after_response in (False, True)]
    first_and_last = [*points[:2], *points[-2:]]
    return first_and_last + random.Random(f"resume {seed}").sample(points[2:-2], POINT_COUNT - len(first_and_last))
