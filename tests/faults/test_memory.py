"""Ten times the images, and no process takes more memory: not the driver, not the worker, not the loader."""

from __future__ import annotations

import re
import threading
from dataclasses import dataclass
from pathlib import Path

from batchjob_process import find_descendants
from color_coded_job import JOB
from driver_server import DriverProcess, DriverServer
from figures import Figure

FEW, TIMES, DISTINCT, SIDE = 3000, 10, 50, 128
PLANNED = 1_000_000, 10_000_000  # enough chunks of a plan to keep all of its rooms busy, and ten times as many
FLAT_MIB = 40  # though there are 1.2 GiB of pixels and 105 MiB of rows more
STEADY_MIB = 10  # from the middle third of a run to the last, with 440 MiB of pixels and 40 MiB of rows between

# Rows of 1,024 numbers, so that whoever keeps them is seen.
WIDE_NET = """\
from torch import nn


class Wide(nn.Module):
    def forward(self, x):
        return nn.functional.adaptive_avg_pool2d(x, (16, 16)).flatten(1).repeat(1, 2)[:, :1024]


def make():
    return Wide()
"""


@dataclass(frozen=True)
class Course:
    """MiB that a process had in memory.

    Attributes:
        peak: at most, by the kernel's own account.
        thirds: at most at any look in each third of the run.
    """

    peak: int
    thirds: tuple[int, int, int]

    @property
    def steady(self) -> bool:
        """Whether the last third took no more than the middle one: what was warming up has done so by then."""
        return self.thirds[2] - self.thirds[1] <= STEADY_MIB

    def __str__(self) -> str:
        first, second, third = self.thirds
        return f"thirds {first}, {second}, {third} MiB"


class Watcher:
    """Looks at a driver, which is the worker here, and at all below it, ten times a second until it ends."""

    def __init__(self, driver: DriverProcess) -> None:
        self._driver, self._over = driver, threading.Event()
        self._looks: dict[int, list[tuple[float, int]]] = {}  # of each process, by age: the moment, and MiB
        self._peaks: dict[int, int] = {}
        self._thread = threading.Thread(target=self._look)
        self._thread.start()

    def courses(self) -> list[Course]:
        """Of the driver first, once it has ended, and of the loader process, which is the youngest, at last."""
        self._over.set()
        self._thread.join()
        return [self._course(pid) for pid in self._looks]

    def _course(self, pid: int) -> Course:
        seconds = [moment for moment, _ in self._looks[self._driver.pid]]
        began, third = seconds[0], (seconds[-1] - seconds[0]) / 3
        most = [0, 0, 0]
        for moment, size in self._looks[pid]:
            number = min(2, int((moment - began) / third)) if third else 0
            most[number] = max(most[number], size)
        return Course(self._peaks[pid], (most[0], most[1], most[2]))

    def _look(self) -> None:
        while not self._over.wait(0.1):
            below = sorted(find_descendants(self._driver.pid), key=lambda process: process[1])
            for pid in [self._driver.pid, *(pid for pid, _ in below)]:
                if (found := memory(pid)) is not None:
                    peak, size = found
                    self._peaks[pid] = max(self._peaks.get(pid, 0), peak)
                    self._looks.setdefault(pid, []).append((self._driver.seconds, size))


def memory(pid: int) -> tuple[int, int] | None:
    """MiB that a process had in memory at most and that it has now, by the kernel's own account; None once it ended."""
    try:
        found = dict(re.findall(r"(VmHWM|VmRSS):\s+(\d+) kB", Path(f"/proc/{pid}/status").read_text()))
    except OSError:
        return None
    return (int(found["VmHWM"]) // 1024, int(found["VmRSS"]) // 1024) if len(found) == 2 else None


def write_job(folder: Path, images: int) -> str:
    """A job over a manifest that names the same pictures again and again."""
    import numpy as np
    from PIL import Image

    folder.mkdir()
    (folder / "slow.py").write_text(WIDE_NET)
    (folder / "job.yaml").write_text(JOB.replace("[8, 8]", f"[{SIDE}, {SIDE}]"))
    noise = np.random.default_rng(0)
    for number in range(DISTINCT):
        Image.fromarray(noise.integers(0, 255, (SIDE, SIDE, 3), np.uint8)).save(folder / f"{number}.jpg")
    names = [f"{number % DISTINCT}.jpg" for number in range(images)]
    (folder / "manifest.csv").write_text("\n".join(["file", *names, ""]))
    return str(folder / "job.yaml")


def test_driver_worker_and_loader_stay_flat(driver_server: DriverServer, tmp_path: Path, figure: Figure) -> None:
    """Two runs alone could not tell what is kept for good from what is warming up."""
    found = []
    for images in (FEW, FEW * TIMES):
        job = write_job(tmp_path / str(images), images)
        settings = ["runtime.batch_size=32", "runtime.shard_size=250", "runtime.loader.processes=1"]
        driver = driver_server.start("run", job, *settings, loaders="own")
        watcher = Watcher(driver)
        try:
            ended = driver.wait()
        finally:
            found.append(watcher.courses())
        assert ended.exit_code == 0, ended.stderr
    (few, *_, few_loader), (many, *_, many_loader) = found
    figure(
        "memory",
        f"{FEW:,} → {FEW * TIMES:,} images: driver and worker {few.peak} → {many.peak} MiB ({many}), "
        f"loader process {few_loader.peak} → {many_loader.peak} MiB ({many_loader})",
    )
    assert many.peak - few.peak <= FLAT_MIB
    assert many_loader.peak - few_loader.peak <= FLAT_MIB
    assert [course for course in found[-1] if not course.steady] == [], "one of the processes goes on growing"


def test_a_plan_of_ten_times_the_images_takes_no_more(
    driver_server: DriverServer, tmp_path: Path, figure: Figure
) -> None:
    found = []
    for images in PLANNED:
        job = write_job(tmp_path / str(images), images)
        driver = driver_server.start("plan", job, "runtime.shard_size=1000")
        watcher = Watcher(driver)
        try:
            ended = driver.wait()
        finally:
            found.append(watcher.courses()[0])
        assert ended.exit_code == 0, ended.stderr
    few, many = found
    figure("memory", f"{PLANNED[0]:,} → {PLANNED[1]:,} images planned: driver {few.peak} → {many.peak} MiB ({many})")
    assert many.peak - few.peak <= FLAT_MIB
    assert many.steady, many
