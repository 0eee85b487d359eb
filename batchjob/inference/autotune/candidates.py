"""Execution configs worth trying on a device, in the order they are tried."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace

from batchjob.inference.devices import DeviceCapabilities
from batchjob.inference.execution_config import ExecutionConfig, Precision, requested_config, with_overrides
from batchjob.job.acceleration import Acceleration

__all__ = ["list_candidates"]


def list_candidates(settings: Acceleration, device: DeviceCapabilities) -> list[ExecutionConfig]:
    """Return the configs to try, each with what the job names applied; the first is `requested_config(settings)`.

    Configs that take longest to build come last, so that a short time budget still tries the others.
    """
    configs = [requested_config(settings), *(with_overrides(config, settings) for config in _configs_for(device))]
    return [config for config in dict.fromkeys(configs) if _is_supported(config)]


def _configs_for(device: DeviceCapabilities) -> Iterator[ExecutionConfig]:
    """Yield configs that were the fastest for some model on this kind of device; compiled ones last.

    Trying a config costs less than predicting for which models it wins.
    """
    eager = ExecutionConfig()
    half_precisions: list[Precision] = ["bf16"] if device.bf16 else ["fp16"] if device.fp16 else []
    if device.kind == "cuda":
        yield replace(eager, precision="tf32", channels_last=True, cudnn_benchmark=True)
        for precision in half_precisions:
            half = replace(eager, precision=precision, channels_last=True, cudnn_benchmark=True)
            yield from (half, replace(half, compile="default", freeze=True), replace(half, compile="reduce-overhead"))
            yield replace(half, compile="max-autotune")
        return
    yield replace(eager, channels_last=True, fold=True)
    yield from (replace(eager, precision=precision, channels_last=True) for precision in half_precisions)
    yield replace(eager, channels_last=True)
    for precision in (*half_precisions, "fp32"):
        yield replace(eager, precision=precision, compile="default", freeze=True)


def _is_supported(config: ExecutionConfig) -> bool:
    """Return True if the options go together.

    A quantised module is a graph of its own: batch norms cannot be folded into it and it has no half precision.
    `freeze` is an option of the compiler, and regional compilation does not take it.
    """
    if config.quantize != "none" and (config.fold or config.precision in {"bf16", "fp16"}):
        return False
    return config.compile not in {"off", "regional"} or not config.freeze
