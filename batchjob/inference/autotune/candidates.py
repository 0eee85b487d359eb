"""Which recipe a device gains by: candidates, the check against eager fp32, paired timings, the decision."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from typing import Any

from batchjob.inference.devices import DeviceCapabilities
from batchjob.inference.execution_config import ExecutionConfig, Precision
from batchjob.job.acceleration import Acceleration

__all__ = ["list_candidates", "requested", "with_overrides"]


def requested(settings: Acceleration) -> ExecutionConfig:
    """The recipe with nothing but what the job names: eager fp32 where it leaves everything open."""
    return with_overrides(ExecutionConfig(), settings)


def list_candidates(settings: Acceleration, device: DeviceCapabilities) -> list[ExecutionConfig]:
    """What to try, the quickest to try first; each holds to what the job names. The first is `wished`."""
    curated = [requested(settings), *(with_overrides(recipe, settings) for recipe in _curated(device))]
    return [recipe for recipe in dict.fromkeys(curated) if _sound(recipe)]


def _curated(device: DeviceCapabilities) -> Iterator[ExecutionConfig]:
    """What has been found to win on some model; trying is cheaper than guessing which. Compiling comes last."""
    plain = ExecutionConfig()
    fast: list[Precision] = ["bf16"] if device.bf16 else ["fp16"] if device.fp16 else []
    if device.kind == "cuda":
        yield replace(plain, precision="tf32", channels_last=True, cudnn_benchmark=True)
        for precision in fast:
            half = replace(plain, precision=precision, channels_last=True, cudnn_benchmark=True)
            yield from (half, replace(half, compile="default", freeze=True), replace(half, compile="reduce-overhead"))
            yield replace(half, compile="max-autotune")
        return
    yield replace(plain, channels_last=True, fold=True)
    yield from (replace(plain, precision=precision, channels_last=True) for precision in fast)
    yield replace(plain, channels_last=True)
    yield from (replace(plain, precision=precision, compile="default", freeze=True) for precision in (*fast, "fp32"))


def with_overrides(config: ExecutionConfig, settings: Acceleration) -> ExecutionConfig:
    """The recipe, changed where the job names something else."""
    named: dict[str, Any] = {
        name: getattr(settings, name) == "on"
        for name in ("channels_last", "fold", "freeze", "cudnn_benchmark")
        if getattr(settings, name) != "auto"
    }
    if settings.precision != "auto":
        named["precision"] = settings.precision
    if settings.compile != "auto":
        named["compile"] = "default" if settings.compile == "on" else settings.compile
    named["quantize"] = "none" if settings.quantize == "off" else settings.quantize
    made = replace(config, **named)
    return replace(made, half=settings.half_weights == "on" and made.precision in {"bf16", "fp16"})


def _sound(recipe: ExecutionConfig) -> bool:
    """Quantised modules are graphs of their own: neither folded nor in half precision; freezing is the compiler's."""
    if recipe.quantize != "none" and (recipe.fold or recipe.precision in {"bf16", "fp16"}):
        return False
    return recipe.compile not in {"off", "regional"} or not recipe.freeze
