"""What a bench finds, as frozen data. A figure that was not measured is None, and is never made up of others."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from typing import Any

from batchjob.bench.bottleneck import Ceiling

__all__ = [
    "BenchResult",
    "Calibration",
    "GradModeResult",
    "MemoryPeak",
    "RunMetrics",
    "StageMeasurement",
    "StageUtilization",
    "ThroughputStep",
]


@dataclass(frozen=True)
class StageMeasurement:
    """One stage alone, in one thread of one process unless `note` says otherwise.

    Attributes:
        name: list, fetch, decode, transform, collate, device decode, H2D, forward, D2H or write.
        images_per_second: by the clock on the wall.
        cpu_ms: milliseconds of all CPU cores together, an image.
        gpu_ms: of the GPU, an image.
        bytes: that come out of it, an image.
        note: what else there is to know, or why a figure is missing.
    """

    name: str
    images_per_second: float | None = None
    cpu_ms: float | None = None
    gpu_ms: float | None = None
    bytes: float | None = None
    note: str = ""


@dataclass(frozen=True)
class ThroughputStep:
    """The path from one place on to its end, each rung with one thing more to do than the one above it."""

    name: str
    images_per_second: float | None
    note: str = ""


@dataclass(frozen=True)
class StageUtilization:
    """A stage within the run.

    Attributes:
        images_per_second: of one process or thread, while it is at this.
        busy: share of the run that it was, of all processes or threads that do it.
    """

    images_per_second: float
    busy: float


@dataclass(frozen=True)
class RunMetrics:
    """The run itself: from storage, through the worker, into Parquet.

    Attributes:
        images: that went through; `failed` of them are error rows.
        images_per_second: between 10 % and 90 % of the images and past what was loaded ahead, where `steady`; else over
            all of the run.
        steady: whether the run was long enough for that.
        load_s: until the worker stood, tuning included.
        first_batch_s: until the first batch was predicted, from the beginning of `load_s`.
        total_s: until the last part was committed, from there too.
        starvation: share of the time between first and last batch that the forward loop waited for pixels.
        ready: share of batches that were there when it asked.
        cores_busy: CPU seconds of all processes, a second.
        services: stage → how it did.
    """

    images: int
    failed: int
    images_per_second: float
    steady: bool
    load_s: float
    first_batch_s: float
    total_s: float
    starvation: float | None
    ready: float | None
    cores_busy: float | None
    services: Mapping[str, StageUtilization]


@dataclass(frozen=True)
class GradModeResult:
    """Eager fp32 with gradients on, under `no_grad`, under `inference_mode`: milliseconds an image, and peak bytes of
    tensors for a batch, weights left out.
    """

    name: str
    ms: float | None
    bytes: int | None
    note: str = ""


@dataclass(frozen=True)
class MemoryPeak:
    """The most memory that processes held during the run: RSS counts shared pages in each, PSS once. Bytes."""

    processes: str
    count: int
    rss: int
    pss: int | None


@dataclass(frozen=True)
class Calibration:
    """Milliseconds of one small piece of work, before and after: how steady the machine was meanwhile."""

    before_ms: float
    after_ms: float

    @property
    def drift(self) -> float:
        """How much slower (or, below 0, faster) the machine had become."""
        return self.after_ms / self.before_ms - 1

    @property
    def noisy(self) -> bool:
        """Whether figures of the same bench may differ by that much."""
        return abs(self.drift) > 0.05


@dataclass(frozen=True)
class BenchResult:
    """All of it.

    Attributes:
        images: that were asked for; `distinct` of them differ, the others are repeats.
        share: of the tightest ceiling that the run reaches.
        verdict: one sentence: what holds the run back, and which setting would move it.
        profile: files that `--profile` wrote.
    """

    model: str
    device: str
    recipe: str
    batch_size: int
    cores: int
    loader_processes: int
    images: int
    distinct: int
    stages: tuple[StageMeasurement, ...]
    ceilings: tuple[Ceiling, ...]
    ladder: tuple[ThroughputStep, ...]
    run: RunMetrics
    share: float | None
    modes: tuple[GradModeResult, ...]
    memory: tuple[MemoryPeak, ...]
    calibration: Calibration
    verdict: str
    profile: tuple[str, ...] = field(default=())

    def to_json_dict(self) -> dict[str, Any]:
        """For a machine: null is `not measured`."""
        tightest = self.ceilings[0].name if self.ceilings else None
        steady = {"drift": self.calibration.drift, "noisy": self.calibration.noisy}
        found = asdict(self)
        return found | {"tightest": tightest, "calibration": {**found["calibration"], **steady}}
