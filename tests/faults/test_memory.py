"""Ten times the images, and no process takes more memory: not the driver, not the worker, not the loader."""

from __future__ import annotations

import re
import threading
from dataclasses import dataclass
from pathlib import Path

from commands import descendants
from figures import Figure
from nursery import Driver, Nursery
from pictures import JOB

FEW, TIMES, DISTINCT, SIDE = 3000, 10, 50, 128
PLANNED = 1_000_000, 10_000_000  # enough chunks of a plan to keep all of its rooms busy, and ten times as many
FLAT_MIB = 40  # though there are 1.2 GiB of pixels and 105 MiB of rows more

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
class Peaks:
    """MiB at most: of the driver, which is the worker here, and of the largest process below it."""

    driver: int
    loader: int


class Watcher:
    """Looks at a driver and all below it until it ends; the kernel remembers each one's peak."""

    def __init__(self, driver: Driver) -> None:
        self._driver, self._over = driver, threading.Event()
        self._peaks: dict[int, int] = {}
        self._thread = threading.Thread(target=self._look)
        self._thread.start()

    def peaks(self) -> Peaks:
        """Once the driver has ended."""
        self._over.set()
        self._thread.join()
        own = self._peaks.pop(self._driver.pid)
        return Peaks(own, max(self._peaks.values(), default=0))

    def _look(self) -> None:
        while not self._over.wait(0.1):
            for pid in [self._driver.pid, *(pid for pid, _ in descendants(self._driver.pid))]:
                self._peaks[pid] = max(self._peaks.get(pid, 0), peak(pid))


def peak(pid: int) -> int:
    """MiB that a process had in memory at most, by the kernel's own account; 0 where it has ended."""
    try:
        found = re.search(r"VmHWM:\s+(\d+) kB", Path(f"/proc/{pid}/status").read_text())
    except OSError:
        return 0
    return int(found[1]) // 1024 if found else 0


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


def test_driver_worker_and_loader_stay_flat(nursery: Nursery, tmp_path: Path, figure: Figure) -> None:
    found = []
    for images in (FEW, FEW * TIMES):
        job = write_job(tmp_path / str(images), images)
        settings = ["runtime.batch_size=32", "runtime.shard_size=250", "runtime.loader.processes=1"]
        driver = nursery.start("run", job, *settings, loaders="own")
        watcher = Watcher(driver)
        try:
            ended = driver.end()
        finally:
            found.append(watcher.peaks())
        assert ended.code == 0, ended.err
    few, many = found
    figure(
        "memory",
        f"{FEW:,} → {FEW * TIMES:,} images: driver and worker {few.driver} → {many.driver} MiB, "
        f"loader process {few.loader} → {many.loader} MiB",
    )
    assert many.driver - few.driver <= FLAT_MIB
    assert many.loader - few.loader <= FLAT_MIB


def test_a_plan_of_ten_times_the_images_takes_no_more(nursery: Nursery, tmp_path: Path, figure: Figure) -> None:
    found = []
    for images in PLANNED:
        job = write_job(tmp_path / str(images), images)
        driver = nursery.start("plan", job, "runtime.shard_size=1000")
        watcher = Watcher(driver)
        try:
            ended = driver.end()
        finally:
            found.append(watcher.peaks().driver)
        assert ended.code == 0, ended.err
    figure("memory", f"{PLANNED[0]:,} → {PLANNED[1]:,} images planned: driver {found[0]} → {found[1]} MiB")
    assert found[1] - found[0] <= FLAT_MIB
