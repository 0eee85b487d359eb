"""Joint ceilings of the hardware, computed from each stage alone, and the sentence about what limits the run."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Protocol

__all__ = ["Ceiling", "StageFigures", "compute_ceilings", "explain_bottleneck"]

_NEAR = 0.9  # share of the tightest ceiling; above it, only that ceiling limits the run
_STARVED = 0.1  # share of its time that the forward loop waits for pixels
_IDLE = 0.7  # share of the cores; below it, a model on the CPU that has work is held back by other programs
_BUSY = 0.9  # share of the cores; above it, every stage that waits is waiting for a core
_PART_OF_FORWARD = "D2H"  # forward is timed until its results are on the host
_CPU_STAGES = ("fetch", "decode", "transform", "collate", "forward", "write")  # measured on every device
_SETTINGS = {
    "gpu": "the GPU: runtime.precision=bf16, runtime.compile=on or runtime.tuning=on would move it",
    "link": "the link to the device: runtime.loader.pin_memory=true or a smaller preprocess.crop would move it",
    "store": "fetching: more runtime.loader.processes, or workers nearer to the store, would move it",
    "disk": "the disk of the parts: TMPDIR on a faster one, or fewer columns in task, would move it",
}
_MORE_CORES = "more cores (runtime.cpus_per_worker, workers)"
_FAST_DECODING = "decode.mode=fast (pixels then differ a little), "
_LESS_WORK = {
    "fetch": "smaller source images",
    "decode": "smaller source images",
    "transform": "a smaller preprocess.resize, if the model takes it",
    "collate": "a smaller preprocess.crop, if the model takes it",
    "write": "fewer columns in task",
}


class StageFigures(Protocol):
    """Figures of a stage alone; `StageMeasurement` says what they are."""

    @property
    def name(self) -> str: ...
    @property
    def images_per_second(self) -> float | None: ...
    @property
    def cpu_ms(self) -> float | None: ...
    @property
    def gpu_ms(self) -> float | None: ...
    @property
    def bytes(self) -> float | None: ...


@dataclass(frozen=True)
class Ceiling:
    """Throughput that one part of the hardware allows if everything else costs nothing.

    Attributes:
        name: cpu, gpu, link, store or disk.
        images_per_second: Highest throughput.
        words: The calculation, in words.
    """

    name: str
    images_per_second: float
    words: str


def compute_ceilings(
    stages: Sequence[StageFigures],
    cores: int,
    *,
    store_images_per_second: float | None = None,
    disk_bytes_per_second: float | None = None,
) -> tuple[Ceiling, ...]:
    """Compute the joint ceilings, the tightest first; a ceiling whose figures were not all measured is left out.

    Example: 2 cores and stages that take 2.5 ms (decode) and 4 ms (forward) of CPU per image: 2 / 6.5 ms = 308
    images/s.

    Args:
        stages: Each stage alone.
        cores: Cores that share the CPU work.
        store_images_per_second: Throughput at which all loader processes together fetch.
        disk_bytes_per_second: Throughput of the disk of the parts.
    """
    by_name = {stage.name: stage for stage in stages}
    ceilings = [_compute_cpu_ceiling(stages, cores), _compute_gpu_ceiling(by_name), _compute_link_ceiling(by_name)]
    if store_images_per_second:
        words = "fetching alone, all loader processes at once"
        ceilings.append(Ceiling("store", store_images_per_second, words))
    part_bytes = by_name["write"].bytes if "write" in by_name else None
    if disk_bytes_per_second and part_bytes:
        words = f"{disk_bytes_per_second / 1e6:,.0f} MB/s ÷ {part_bytes / 1e3:,.2f} kB an image"
        ceilings.append(Ceiling("disk", disk_bytes_per_second / part_bytes, words))
    measured = (ceiling for ceiling in ceilings if ceiling is not None)
    return tuple(sorted(measured, key=lambda ceiling: ceiling.images_per_second))


def explain_bottleneck(  # noqa: PLR0913 - most by keyword, from the one place that has measured them
    images_per_second: float,
    ceilings: Sequence[Ceiling],
    stages: Sequence[StageFigures],
    *,
    starvation: float | None,
    loader_processes: int,
    on_cpu: bool,
    cores: int = 0,
    cores_busy: float | None = None,
    exact_decode: bool = True,
) -> str:
    """Return one sentence: what limits the run, and the setting that would change that.

    Args:
        images_per_second: Throughput of the run.
        ceilings: Result of `compute_ceilings`.
        stages: Each stage alone.
        starvation: Share of its time that the forward loop waited for pixels; None if unknown.
        loader_processes: Number of loader processes.
        on_cpu: True if the model runs on the CPU.
        cores: Cores that the worker may use.
        cores_busy: Cores that it used on average; None if unknown.
        exact_decode: True for `decode.mode: exact`, False for `fast`.
    """
    if not ceilings:
        return "bottleneck: not measured, for no ceiling could be"
    tightest = ceilings[0]
    share = images_per_second / tightest.images_per_second
    reached = f"the run reaches {share:.0%} of the tightest ceiling ({tightest.name})"
    if share >= _NEAR:
        return f"bottleneck: {_explain_ceiling(tightest.name, stages, on_cpu, exact_decode)}; {reached}"
    starved = starvation is not None and starvation > _STARVED
    if cores_busy is not None and cores_busy >= _BUSY * cores > 0 and (on_cpu or starved or tightest.name == "cpu"):
        busy = f"all cores are busy ({cores_busy:.2f} of {cores}), so more processes or threads would only share them"
        return f"bottleneck: {_explain_ceiling('cpu', stages, on_cpu, exact_decode)}; {busy}; {reached}"
    if starved:
        setting = "runtime.loader.processes" if loader_processes else "runtime.loader.processes (none are in use)"
        return (
            f"bottleneck: loading; the forward loop waited {starvation:.0%} of its time for pixels and {reached}: "
            f"raise {setting} or runtime.loader.prefetch"
        )
    if on_cpu and cores_busy is not None and cores_busy < _IDLE * cores:
        return (
            f"bottleneck: cores; the run had {cores_busy:.1f} of {cores} on average though it rarely waited for "
            f"pixels, and {reached}: run again when no other program takes them, or raise runtime.batch_size"
        )
    return (
        f"bottleneck: the forward loop itself, which rarely waits for pixels; {reached}: "
        "try runtime.batch_size, runtime.compile=on or runtime.tuning=on"
    )


def _compute_cpu_ceiling(stages: Sequence[StageFigures], cores: int) -> Ceiling | None:
    cpu_ms = _select_cpu_ms(stages)
    total = sum(ms for ms in cpu_ms.values() if ms is not None)
    if total <= 0 or any(cpu_ms.get(name) is None for name in _CPU_STAGES):
        return None
    return Ceiling("cpu", cores / total * 1e3, f"{cores} cores ÷ {total:,.2f} ms of CPU an image")


def _select_cpu_ms(stages: Sequence[StageFigures]) -> dict[str, float | None]:
    """Return the CPU milliseconds per image of each stage, without those that another stage contains."""
    return {stage.name: stage.cpu_ms for stage in stages if stage.name != _PART_OF_FORWARD}


def _compute_gpu_ceiling(stages: Mapping[str, StageFigures]) -> Ceiling | None:
    gpu_ms = stages["forward"].gpu_ms if "forward" in stages else None
    return Ceiling("gpu", 1e3 / gpu_ms, f"{gpu_ms:,.3f} ms of the GPU an image") if gpu_ms else None


def _compute_link_ceiling(stages: Mapping[str, StageFigures]) -> Ceiling | None:
    gpu_ms = stages["H2D"].gpu_ms if "H2D" in stages else None
    return Ceiling("link", 1e3 / gpu_ms, f"{gpu_ms:,.3f} ms to the device an image") if gpu_ms else None


def _explain_ceiling(name: str, stages: Sequence[StageFigures], on_cpu: bool, exact_decode: bool) -> str:
    if name != "cpu":
        return _SETTINGS[name]
    cpu_ms = {stage: ms or 0.0 for stage, ms in _select_cpu_ms(stages).items()}
    costliest, total = max(cpu_ms, key=lambda stage: cpu_ms[stage]), sum(cpu_ms.values())
    cause = f"the CPU, of which {costliest} takes {cpu_ms[costliest] / total:.0%}" if total else "the CPU"
    if costliest == "forward" and on_cpu:
        return f"{cause}: runtime.device=cuda, runtime.tuning=on, a smaller model or {_MORE_CORES} would move it"
    faster = _FAST_DECODING if exact_decode and costliest in {"decode", "transform"} else ""
    smaller = f"{_LESS_WORK[costliest]} or " if costliest in _LESS_WORK else ""
    return f"{cause}: {faster}{smaller}{_MORE_CORES} would move it"
