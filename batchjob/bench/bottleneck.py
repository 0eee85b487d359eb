"""What the hardware would allow, from each stage alone: pure arithmetic, and the sentence that follows from it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Protocol

__all__ = ["Ceiling", "compute_ceilings", "explain_bottleneck"]

_NEAR = 0.9  # of the tightest ceiling: there only that ceiling can be moved
_STARVED = 0.1
_IDLE = 0.7  # of the cores in use, though the model runs on them and has work: others are in the way
_BUSY = 0.9  # of the cores in use: whoever waits, waits for one of them
_WITHIN = "D2H"  # forward is timed until its results are on the host
_NEEDED = ("fetch", "decode", "transform", "collate", "forward", "write")  # the copies may have nothing to do


class StageFigures(Protocol):
    """What is needed of a stage."""

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
    """Images a second that one part of the hardware allows, all else being free.

    Attributes:
        name: cpu, gpu, link, store or disk.
        images_per_second: at most.
        words: how that comes about.
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
    """The joint ceilings, the tightest first; one whose figures were not all measured is left out.

    Args:
        stages: each alone.
        cores: that share the CPU work.
        store: images/s that all loader processes together fetch.
        disk: bytes/s that the disk of the parts takes.
    """
    by_name = {stage.name: stage for stage in stages}
    found = [_cpu(stages, cores), _gpu(by_name), _link(by_name)]
    if store_images_per_second:
        found.append(Ceiling("store", store_images_per_second, "fetching alone, all loader processes at once"))
    written = by_name["write"].bytes if "write" in by_name else None
    if disk_bytes_per_second and written:
        words = f"{disk_bytes_per_second / 1e6:,.0f} MB/s ÷ {written / 1e3:,.2f} kB an image"
        found.append(Ceiling("disk", disk_bytes_per_second / written, words))
    return tuple(sorted((one for one in found if one is not None), key=lambda one: one.images_per_second))


def _cpu(stages: Sequence[StageFigures], cores: int) -> Ceiling | None:
    spent = _cpu_ms(stages)
    total = sum(ms for ms in spent.values() if ms is not None)
    if total <= 0 or any(spent.get(name) is None for name in _NEEDED):
        return None
    words = f"{cores} cores ÷ {total:,.2f} ms of CPU an image"
    beside = next((stage.images_per_second for stage in stages if stage.name == "device decode"), None)
    if beside is None:
        return Ceiling("cpu", cores / total * 1e3, words)
    spared = sum(spent[name] or 0.0 for name in ("decode", "transform"))  # by each image that the device decodes
    shared = (cores * 1e3 + beside * spared) / total
    none_left = cores * 1e3 / (total - spared)
    return Ceiling("cpu", min(shared, none_left), f"{words}, up to {beside:,.0f} images/s decoded on the device")


def _cpu_ms(stages: Sequence[StageFigures]) -> dict[str, float | None]:
    """What an image takes of the CPU, nothing twice."""
    return {stage.name: stage.cpu_ms for stage in stages if stage.name != _WITHIN}


def _gpu(stages: Mapping[str, StageFigures]) -> Ceiling | None:
    spent = stages["forward"].gpu_ms if "forward" in stages else None
    return Ceiling("gpu", 1e3 / spent, f"{spent:,.3f} ms of the GPU an image") if spent else None


def _link(stages: Mapping[str, StageFigures]) -> Ceiling | None:
    spent = stages["H2D"].gpu_ms if "H2D" in stages else None
    return Ceiling("link", 1e3 / spent, f"{spent:,.3f} ms to the device an image") if spent else None


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
    """One sentence: what holds the run back, and the setting that would move it.

    Args:
        rate: images/s of the run.
        found: from `ceilings`.
        stages: each alone.
        starvation: share of its time that the forward loop waited for pixels.
        processes: of the loader.
        on_cpu: whether the model runs on the CPU.
        cores: that the worker may use.
        busy: that it did use, on average.
        exact: whether images are decoded so; else as fast as can be.
    """
    if not ceilings:
        return "bottleneck: not measured, for no ceiling could be"
    tightest = ceilings[0]
    share = images_per_second / tightest.images_per_second
    held = f"the run reaches {share:.0%} of the tightest ceiling ({tightest.name})"
    if share >= _NEAR:
        return f"bottleneck: {_bound(tightest.name, stages, on_cpu, exact_decode)}; {held}"
    starved = starvation is not None and starvation > _STARVED
    if cores_busy is not None and cores_busy >= _BUSY * cores > 0 and (on_cpu or starved or tightest.name == "cpu"):
        said = f"all cores are busy ({cores_busy:.2f} of {cores}), so more processes or threads would only share them"
        return f"bottleneck: {_bound('cpu', stages, on_cpu, exact_decode)}; {said}; {held}"
    if starved:
        more = "runtime.loader.processes" if loader_processes else "runtime.loader.processes (none are in use)"
        return (
            f"bottleneck: loading; the forward loop waited {starvation:.0%} of its time for pixels and {held}: raise "
            f"{more} or runtime.loader.prefetch"
        )
    if on_cpu and cores_busy is not None and cores_busy < _IDLE * cores:
        return (
            f"bottleneck: cores; the run had {cores_busy:.1f} of {cores} on average though it "
            "rarely waited for pixels, and "
            f"{held}: run again when no other program takes them, or raise runtime.batch_size"
        )
    return (
        f"bottleneck: the forward loop itself, which rarely waits for pixels; {held}: "
        "try runtime.batch_size, runtime.compile=on or runtime.tuning=on"
    )


_MOVES = {
    "gpu": "the GPU: runtime.precision=bf16, runtime.compile=on or runtime.tuning=on would move it",
    "link": "the link to the device: runtime.loader.pin_memory=true or a smaller preprocess.crop would move it",
    "store": "fetching: more runtime.loader.processes, or workers nearer to the store, would move it",
    "disk": "the disk of the parts: TMPDIR on a faster one, or fewer columns in task, would move it",
}
_CORES = "more cores (runtime.cpus_per_worker, workers)"
_FAST = "decode.mode=fast (pixels then differ a little), "
_SMALLER = {
    "fetch": "smaller source images",
    "decode": "smaller source images",
    "transform": "a smaller preprocess.resize, if the model takes it",
    "collate": "a smaller preprocess.crop, if the model takes it",
    "write": "fewer columns in task",
}


def _bound(name: str, stages: Sequence[StageFigures], on_cpu: bool, exact: bool) -> str:
    if name != "cpu":
        return _MOVES[name]
    spent = {stage: ms or 0.0 for stage, ms in _cpu_ms(stages).items()}
    most, total = max(spent, key=lambda stage: spent[stage]), sum(spent.values())
    said = f"the CPU, of which {most} takes {spent[most] / total:.0%}" if total else "the CPU"
    if most == "forward" and on_cpu:
        return f"{said}: runtime.device=cuda, runtime.tuning=on, a smaller model or {_CORES} would move it"
    faster = _FAST if exact and most in {"decode", "transform"} else ""
    smaller = f"{_SMALLER[most]} or " if most in _SMALLER else ""
    return f"{said}: {faster}{smaller}{_CORES} would move it"
