"""Figures of a bench, as frozen data. None stands for a figure that was not measured."""

# The field names are the keys of `batchjob bench --json`.

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

_NOISY_DRIFT = 0.05


@dataclass(frozen=True)
class StageMeasurement:
    """One stage alone, in one thread of one process unless `note` says otherwise.

    Attributes:
        name: list, fetch, decode, transform, collate, H2D, forward, D2H or write.
        images_per_second: Throughput by wall-clock time.
        cpu_ms: Milliseconds of CPU per image, of all cores together.
        gpu_ms: Milliseconds of the GPU per image.
        bytes: Bytes per image that the stage puts out.
        note: Conditions of the measurement, or the reason why a figure is missing.
    """

    name: str
    images_per_second: float | None = None
    cpu_ms: float | None = None
    gpu_ms: float | None = None
    bytes: float | None = None
    note: str = ""


@dataclass(frozen=True)
class ThroughputStep:
    """Throughput of the path from one place to its end; each step does one thing more than the step before it.

    Attributes:
        name: Place where the images start.
        images_per_second: Throughput; None if it was not measured.
        note: Work that this step adds.
    """

    name: str
    images_per_second: float | None
    note: str = ""


@dataclass(frozen=True)
class StageUtilization:
    """A stage within the run.

    Attributes:
        images_per_second: Throughput of one process or thread while it works on this stage.
        busy: Share of the run that its processes or threads worked on this stage, 0 to 1.
    """

    images_per_second: float
    busy: float


@dataclass(frozen=True)
class RunMetrics:
    """The run itself: from storage, through the worker, into Parquet.

    Attributes:
        images: Images of the run, error rows included.
        failed: Error rows among them.
        images_per_second: Throughput between 10 % and 90 % of the images, and after those loaded in advance, if
            `steady`; else over the whole run.
        steady: True if the run was long enough for a steady state.
        load_s: Seconds until the worker was ready, tuning included.
        first_batch_s: Seconds until the first batch was predicted, from the same start as `load_s`.
        total_s: Seconds until the last part was committed, from the same start.
        starvation: Share of the time between the first and the last batch that the forward loop waited for pixels.
        ready: Share of batches that were there when the forward loop asked for them.
        cores_busy: CPU seconds of all processes per second.
        services: Utilization of each stage, by its name.
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
    """An eager forward pass in fp32 in one grad mode.

    Attributes:
        name: gradients on, no_grad or inference_mode.
        ms: Milliseconds per image.
        bytes: Peak bytes of tensors for a batch, without the weights.
        note: Reason why a figure is missing.
    """

    name: str
    ms: float | None
    bytes: int | None
    note: str = ""


@dataclass(frozen=True)
class MemoryPeak:
    """Peak memory of a group of processes during the run.

    Attributes:
        processes: Name of the group.
        count: Highest number of processes in it.
        rss: Resident set size in bytes; shared pages count once per process.
        pss: Proportional set size in bytes; shared pages count once. None if the system does not tell.
    """

    processes: str
    count: int
    rss: int
    pss: int | None


@dataclass(frozen=True)
class Calibration:
    """Time of one small piece of work before and after the bench: how steady the machine was.

    Attributes:
        before_ms: Milliseconds before the bench.
        after_ms: Milliseconds after it.
    """

    before_ms: float
    after_ms: float

    @property
    def drift(self) -> float:
        """Relative slowdown of the machine: 0.05 is 5 % slower after the bench; negative is faster."""
        return self.after_ms / self.before_ms - 1

    @property
    def noisy(self) -> bool:
        """True if the machine changed so much that figures of the same bench cannot be compared."""
        return abs(self.drift) > _NOISY_DRIFT


@dataclass(frozen=True)
class BenchResult:
    """All figures of a bench.

    Attributes:
        model: Name and digest of the model.
        device: Device on which it ran.
        recipe: Execution config of the forward pass, in words.
        batch_size: Images per call of the model.
        cores: Cores that the worker may use.
        loader_processes: Number of loader processes.
        images: Images of the run.
        distinct: Distinct images among them; the others are repeats.
        stages: Each stage alone.
        ceilings: Joint ceilings, the tightest first.
        ladder: Throughput from four places, from the device up to storage.
        run: The run itself.
        share: Share of the tightest ceiling that the run reaches.
        modes: The forward pass in each grad mode.
        memory: Peak memory of each group of processes.
        calibration: Steadiness of the machine.
        verdict: One sentence: what limits the run, and which setting would change that.
        profile: Files that `--profile` wrote.
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
        """Return the result for JSON; null means `not measured`."""
        tightest = self.ceilings[0].name if self.ceilings else None
        steadiness = {"drift": self.calibration.drift, "noisy": self.calibration.noisy}
        fields = asdict(self)
        return fields | {"tightest": tightest, "calibration": {**fields["calibration"], **steadiness}}
