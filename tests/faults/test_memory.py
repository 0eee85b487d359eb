"""Memory of driver, worker and loader processes does not grow with ten times the images."""

from __future__ import annotations

import re
import threading
from dataclasses import dataclass
from pathlib import Path

from tests.support.batchjob_process import find_descendants
from tests.support.color_coded_job import JOB
from tests.support.driver_server import DriverProcess, DriverServer
from tests.support.figures import Figure

FEW, TIMES, DISTINCT, SIDE = 3000, 10, 50, 128
PLANNED = 1_000_000, 10_000_000  # enough chunks of a plan to keep every stage busy, and ten times as many
# Largest growth of the peak with ten times the images, which have 1.2 GiB more pixels and 105 MiB more rows.
FLAT_MIB = 40
# Largest growth from the middle to the last third of a run; 440 MiB of pixels and 40 MiB of rows pass in between.
STEADY_MIB = 10

# Each row has 1,024 numbers, so that the memory grows visibly if rows are kept.
WIDE_NET = """\
from torch import nn


class Wide(nn.Module):
    def forward(self, x):
        return nn.functional.adaptive_avg_pool2d(x, (16, 16)).flatten(1).repeat(1, 2)[:, :1024]


def make():
    return Wide()
"""


@dataclass(frozen=True)
class MemoryHistory:
    """Memory of a process over a run, in MiB.

    Attributes:
        peak: Peak resident memory, from the kernel.
        thirds: Largest sample in each third of the run.
    """

    peak: int
    thirds: tuple[int, int, int]

    @property
    def steady(self) -> bool:
        """True if the last third took no more than the middle one; the warm-up is over by then."""
        return self.thirds[2] - self.thirds[1] <= STEADY_MIB

    def __str__(self) -> str:
        first, second, third = self.thirds
        return f"thirds {first}, {second}, {third} MiB"


class MemorySampler:
    """Thread that samples a driver (here also the worker) and its descendants ten times a second until it ends."""

    def __init__(self, driver: DriverProcess) -> None:
        self._driver, self._stopped = driver, threading.Event()
        self._samples: dict[int, list[tuple[float, int]]] = {}  # by process, oldest first: seconds, MiB
        self._peaks: dict[int, int] = {}
        self._thread = threading.Thread(target=self._run)
        self._thread.start()

    def stop(self) -> list[MemoryHistory]:
        """Stop; return the histories of the processes, oldest first: the driver, …, the loader process."""
        self._stopped.set()
        self._thread.join()
        return [self._summarize(pid) for pid in self._samples]

    def _summarize(self, pid: int) -> MemoryHistory:
        times = [time for time, _ in self._samples[self._driver.pid]]
        began, third = times[0], (times[-1] - times[0]) / 3
        largest = [0, 0, 0]
        for time, size in self._samples[pid]:
            number = min(2, int((time - began) / third)) if third else 0
            largest[number] = max(largest[number], size)
        return MemoryHistory(self._peaks[pid], (largest[0], largest[1], largest[2]))

    def _run(self) -> None:
        while not self._stopped.wait(0.1):
            below = sorted(find_descendants(self._driver.pid), key=lambda process: process[1])
            for pid in [self._driver.pid, *(pid for pid, _ in below)]:
                if (sample := read_memory(pid)) is not None:
                    peak, size = sample
                    self._peaks[pid] = max(self._peaks.get(pid, 0), peak)
                    self._samples.setdefault(pid, []).append((self._driver.seconds, size))


def read_memory(pid: int) -> tuple[int, int] | None:
    """Read peak and current resident memory of a process, in MiB; None once it has ended."""
    try:
        values = dict(re.findall(r"(VmHWM|VmRSS):\s+(\d+) kB", Path(f"/proc/{pid}/status").read_text()))
    except OSError:
        return None
    return (int(values["VmHWM"]) // 1024, int(values["VmRSS"]) // 1024) if len(values) == 2 else None


def write_job(folder: Path, images: int) -> str:
    """Write a job whose manifest names the same few pictures again and again."""
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


def test_memory_of_driver_worker_and_loader_stays_flat(
    driver_server: DriverServer, tmp_path: Path, figure: Figure
) -> None:
    """Compare thirds too: two runs alone could not tell a leak from a longer warm-up."""
    histories = []
    for images in (FEW, FEW * TIMES):
        job = write_job(tmp_path / str(images), images)
        settings = ["runtime.batch_size=32", "runtime.shard_size=250", "runtime.loader.processes=1"]
        driver = driver_server.start("run", job, *settings, loaders="own")
        sampler = MemorySampler(driver)
        try:
            ended = driver.wait()
        finally:
            histories.append(sampler.stop())
        assert ended.exit_code == 0, ended.stderr
    (few, *_, few_loader), (many, *_, many_loader) = histories
    figure(
        "memory",
        f"{FEW:,} → {FEW * TIMES:,} images: driver and worker {few.peak} → {many.peak} MiB ({many}), "
        f"loader process {few_loader.peak} → {many_loader.peak} MiB ({many_loader})",
    )
    assert many.peak - few.peak <= FLAT_MIB
    assert many_loader.peak - few_loader.peak <= FLAT_MIB
    assert [history for history in histories[-1] if not history.steady] == [], "a process keeps growing"


def test_memory_of_planning_ten_times_the_images_stays_flat(
    driver_server: DriverServer, tmp_path: Path, figure: Figure
) -> None:
    histories = []
    for images in PLANNED:
        job = write_job(tmp_path / str(images), images)
        driver = driver_server.start("plan", job, "runtime.shard_size=1000")
        sampler = MemorySampler(driver)
        try:
            ended = driver.wait()
        finally:
            histories.append(sampler.stop()[0])
        assert ended.exit_code == 0, ended.stderr
    few, many = histories
    figure("memory", f"{PLANNED[0]:,} → {PLANNED[1]:,} images planned: driver {few.peak} → {many.peak} MiB ({many})")
    assert many.peak - few.peak <= FLAT_MIB
    assert many.steady, many
