"""Figures of a bench, as frozen data: the field names are keys of its JSON, and columns of its tables."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

__all__ = ["BenchResult", "Ceiling", "RunMetrics", "StageMeasurement"]

_NOISY_DRIFT = 0.05


@dataclass(frozen=True)
class StageMeasurement:
    """One stage alone, in one thread of one process unless `note` says otherwise.

    Attributes:
        name: list, fetch, decode, transform, collate, H2D, forward, D2H or write.
        images_per_second: Throughput by wall-clock time; None if it was not measured.
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
class Ceiling:
    """Throughput that one part of the hardware allows if everything else costs nothing.

    Attributes:
        name: cpu, gpu, link or store.
        images_per_second: Highest throughput.
        note: The calculation or the measurement, in words.
    """

    name: str
    images_per_second: float
    note: str


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
        starvation: Share of the time between the first and the last batch that the forward loop waited for pixels;
            None if there was one batch only.
        cores_busy: CPU seconds of all processes per second, after the first batch.
        busy: Share of the time from its first to its last image, 0 to 1, that the processes of a stage worked on it.
    """

    images: int
    failed: int
    images_per_second: float
    steady: bool
    load_s: float
    first_batch_s: float
    total_s: float
    starvation: float | None
    cores_busy: float
    busy: Mapping[str, float]


@dataclass(frozen=True)
class BenchResult:
    """All figures of a bench.

    Attributes:
        model: Name and digest of the model.
        device: Device on which it ran.
        recipe: Execution config of the forward pass, in words.
        decode_mode: `decode.mode` of the job: exact or fast.
        batch_size: Images per call of the model.
        cores: Cores that the worker may use.
        loader_processes: Number of loader processes.
        distinct: Distinct images of the run; the others are repeats.
        stages: Each stage alone.
        ceilings: Joint ceilings, the tightest first.
        run: The run itself.
        memory: Peak memory of each group of processes in bytes; shared pages count once where the system tells.
        calibration_ms: Time of the same small piece of work before and after the bench.
        profile: Files that `--profile` wrote.
    """

    model: str
    device: str
    recipe: str
    decode_mode: str
    batch_size: int
    cores: int
    loader_processes: int
    distinct: int
    stages: tuple[StageMeasurement, ...]
    ceilings: tuple[Ceiling, ...]
    run: RunMetrics
    memory: Mapping[str, int]
    calibration_ms: tuple[float, float]
    profile: tuple[str, ...] = ()

    @property
    def share(self) -> float:
        """Share of the tightest joint ceiling that the run reaches."""
        return self.run.images_per_second / self.ceilings[0].images_per_second

    @property
    def drift(self) -> float:
        """Relative slowdown of the machine: 0.05 is 5 % slower after the bench; negative is faster."""
        before, after = self.calibration_ms
        return after / before - 1

    @property
    def noisy(self) -> bool:
        """True if the machine changed so much that figures of the same bench cannot be compared."""
        return abs(self.drift) > _NOISY_DRIFT
