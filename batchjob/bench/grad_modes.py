"""The same forward pass with gradients on, under `no_grad` and under `inference_mode`: time and memory side by side."""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from itertools import accumulate
from pathlib import Path
from statistics import median
from typing import TYPE_CHECKING, Any

from batchjob.bench.bench_worker import BenchWorker
from batchjob.bench.profiler_trace import torch_profiler
from batchjob.bench.results import GradModeResult
from batchjob.bench.stages import move_to_device, select_full_batches
from batchjob.inference.execution_config import ExecutionConfig
from batchjob.inference.forward import ForwardPass
from batchjob.types import Batch

if TYPE_CHECKING:
    import torch

__all__ = ["measure_grad_modes"]

_ROUNDS = range(3, 10)  # at least and at most
_SECONDS = 6.0
_NAMES = ("gradients on", "no_grad", "inference_mode")


def measure_grad_modes(rig: BenchWorker, batches: Sequence[Batch]) -> tuple[GradModeResult, ...]:
    """The three, taken in turn so that the machine's moods hit them alike; eager fp32, whatever the recipe.

    Args:
        rig: whose model is measured.
        batches: of its sample.
    """
    engine = rig.parts.engine
    if not engine.model.eager:
        note = f"model.type {rig.job.model.type} runs as it was saved"
        return tuple(GradModeResult(name, None, None, note) for name in _NAMES)
    forward = engine.build_forward(ExecutionConfig())
    pixels, batch = move_to_device(rig, select_full_batches(rig, batches))[0]
    if batch.shapes is not None:
        return tuple(GradModeResult(name, None, None, "images differ in size") for name in _NAMES)
    values = list(pixels) if forward.input_kind == "list" else pixels
    with _wanting_gradients(engine.model.module):
        return _side_by_side(rig, forward, values, len(pixels))


def _side_by_side(rig: BenchWorker, forward: ForwardPass, values: Any, images: int) -> tuple[GradModeResult, ...]:
    ways = _ways()
    seconds: dict[str, list[float]] = {name: [] for name in ways}
    faults: dict[str, str] = {}
    began = time.perf_counter()
    for rounds in range(1, _ROUNDS.stop):
        for name, mode in ways.items():
            if name not in faults:
                try:
                    seconds[name].append(_clocked(forward, values, mode))
                except Exception as error:  # noqa: BLE001 - a model that cannot run so is a line that says so
                    faults[name] = f"fails: {type(error).__name__}: {' '.join(str(error).split())[:100]}"
        if rounds >= _ROUNDS.start and (rounds * images >= rig.images or time.perf_counter() - began > _SECONDS):
            break
    return tuple(
        GradModeResult(name, None, None, faults[name])
        if name in faults
        else GradModeResult(name, median(seconds[name]) / images * 1e3, _peak(rig, forward, values, mode))
        for name, mode in ways.items()
    )


def _ways() -> dict[str, Callable[[], AbstractContextManager[Any]]]:
    import torch

    return dict(zip(_NAMES, (torch.enable_grad, torch.no_grad, torch.inference_mode), strict=True))


@contextmanager
def _wanting_gradients(module: torch.nn.Module) -> Iterator[None]:
    """As torch makes a module: loading has switched its gradients off."""
    changed = [one for one in module.parameters() if one.is_floating_point() and not one.requires_grad]
    usable = [one for one in changed if not one.is_inference()]
    for one in usable:
        one.requires_grad_(True)
    try:
        yield
    finally:
        for one in usable:
            one.requires_grad_(False)


def _clocked(forward: ForwardPass, values: Any, mode: Callable[[], AbstractContextManager[Any]]) -> float:
    import torch

    began = time.perf_counter()
    with mode():
        forward(values)
        if forward.device.type == "cuda":
            torch.cuda.synchronize(forward.device)
    return time.perf_counter() - began


def _peak(rig: BenchWorker, forward: ForwardPass, values: Any, mode: Callable[[], AbstractContextManager[Any]]) -> int:
    """Bytes of tensors at most, above what stood before."""
    import torch

    if forward.device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(forward.device)
        before = torch.cuda.memory_allocated(forward.device)
        _clocked(forward, values, mode)
        return torch.cuda.max_memory_allocated(forward.device) - before
    path = rig.folder / "memory.json"
    with torch_profiler(profile_memory=True) as profile:
        _clocked(forward, values, mode)
    profile.export_chrome_trace(str(path))
    return _most_held(path)


def _most_held(path: Path) -> int:
    """The highest sum of allocations and frees in a trace."""
    events = [event for event in json.loads(path.read_text())["traceEvents"] if event.get("name") == "[memory]"]
    path.unlink()
    steps = (int(event["args"]["Bytes"]) for event in sorted(events, key=lambda event: float(event["ts"])))
    return max(accumulate(steps), default=0)
