"""Joint ceilings of the hardware, computed from each stage alone, and what limits the run."""

from __future__ import annotations

from collections.abc import Sequence

from batchjob.bench.results import BenchResult, Ceiling, StageMeasurement
from batchjob.text import format_count

__all__ = ["compute_ceilings", "find_bottleneck"]

_NEAR = 0.9  # share of the tightest ceiling; above it, only that ceiling limits the run
_STARVED = 0.1  # share of its time that the forward loop waits for pixels
_IDLE = 0.7  # share of the cores; below it, a model on the CPU that has work is held back by other programs
_BUSY = 0.9  # share of the cores; above it, every stage that waits is waiting for a core
# The driver lists before the run; forward is timed until its results are on the host.
_NOT_COUNTED = ("list", "D2H")
_MORE_CORES = "more cores (runtime.cpus_per_worker, workers)"
_LESS_WORK = {
    "fetch": "smaller source images",
    "decode": "smaller source images",
    "transform": "a smaller preprocess.resize, if the model takes it",
    "collate": "a smaller preprocess.crop, if the model takes it",
    "write": "fewer columns in task",
}
_CEILINGS = {
    "gpu": ("the GPU", "runtime.precision=bf16, runtime.compile=on or runtime.tuning=on"),
    "link": ("the link to the device", "runtime.loader.pin_memory=true or a smaller preprocess.crop"),
    "store": ("fetching", "more runtime.loader.processes, or workers nearer to the store"),
}


def compute_ceilings(
    stages: Sequence[StageMeasurement], cores: int, store_images_per_second: float
) -> tuple[Ceiling, ...]:
    """Compute the joint ceilings, the tightest first; on a CPU there is none of GPU and link.

    Example: 2 cores and stages that take 2.5 ms (decode) and 4 ms (forward) of CPU per image: 2 / 6.5 ms = 308
    images/s.

    Args:
        stages: Each stage alone.
        cores: Cores that share the CPU work.
        store_images_per_second: Throughput at which all loader processes together fetch.
    """
    by_name = {stage.name: stage for stage in stages}
    cpu_ms = sum(_select_cpu_ms(stages).values())
    ceilings = [
        Ceiling("cpu", cores / cpu_ms * 1e3, f"{format_count(cores, 'core')} ÷ {cpu_ms:,.2f} ms of CPU an image"),
        Ceiling("store", store_images_per_second, "fetching alone, all loader processes at once"),
    ]
    for name, stage, words in (("gpu", "forward", "of the GPU"), ("link", "H2D", "to the device")):
        if gpu_ms := by_name[stage].gpu_ms:
            ceilings.append(Ceiling(name, 1e3 / gpu_ms, f"{gpu_ms:,.3f} ms {words} an image"))
    return tuple(sorted(ceilings, key=lambda ceiling: ceiling.images_per_second))


def find_bottleneck(result: BenchResult) -> tuple[str, str]:
    """Return what limits the run, with the figures that show it, and the settings that would move it."""
    run, cores, on_cpu = result.run, result.cores, result.device == "cpu"
    tightest = result.ceilings[0].name
    if result.share >= _NEAR:
        return _explain_ceiling(tightest, result)
    is_starved = run.starvation is not None and run.starvation > _STARVED
    if run.cores_busy >= _BUSY * cores and (on_cpu or is_starved or tightest == "cpu"):
        cause, remedy = _explain_ceiling("cpu", result)
        busy = f"all cores are busy ({run.cores_busy:.2f} of {cores})"
        return f"{cause}; {busy}, so more processes or threads would only share them", remedy
    # Decoding never waits: processes that decode for longer than they have a core share it with other programs.
    is_displaced = run.cores_busy < _IDLE * result.loader_processes * run.busy.get("decode", 0.0)
    if is_starved and not is_displaced:
        in_use = "" if result.loader_processes else " (none are in use)"
        cause = f"loading; the forward loop waited {run.starvation:.0%} of its time for pixels"
        return cause, f"more runtime.loader.processes{in_use} or runtime.loader.prefetch"
    if is_displaced or (on_cpu and run.cores_busy < _IDLE * cores):
        cause = f"cores; the run had {run.cores_busy:.1f} of {cores} on average, though it had work for more"
        return cause, "a run when no other program takes them, or a larger runtime.batch_size"
    cause = "the forward loop itself, which rarely waits for pixels"
    return cause, "runtime.batch_size, runtime.compile=on or runtime.tuning=on"


def _select_cpu_ms(stages: Sequence[StageMeasurement]) -> dict[str, float]:
    """Return the CPU milliseconds per image of each stage of the run that no other stage contains."""
    return {stage.name: stage.cpu_ms or 0.0 for stage in stages if stage.name not in _NOT_COUNTED}


def _explain_ceiling(name: str, result: BenchResult) -> tuple[str, str]:
    if name != "cpu":
        return _CEILINGS[name]
    cpu_ms = _select_cpu_ms(result.stages)
    costliest = max(cpu_ms, key=lambda stage: cpu_ms[stage])
    cause = f"the CPU, of which {costliest} takes {cpu_ms[costliest] / sum(cpu_ms.values()):.0%}"
    if costliest == "forward" and result.device == "cpu":
        return cause, f"runtime.device=cuda, runtime.tuning=on, a smaller model or {_MORE_CORES}"
    is_slower = result.decode_mode == "exact" and costliest in {"decode", "transform"}
    faster = "decode.mode=fast (pixels then differ a little), " if is_slower else ""
    smaller = f"{_LESS_WORK[costliest]} or " if costliest in _LESS_WORK else ""
    return cause, f"{faster}{smaller}{_MORE_CORES}"
