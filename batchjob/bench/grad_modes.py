"""Time and memory of the same forward pass with gradients on, under `no_grad` and under `inference_mode`."""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from itertools import accumulate
from statistics import median
from typing import Any

import torch

from batchjob.bench.bench_worker import BenchWorker
from batchjob.bench.profiler_trace import torch_profiler
from batchjob.bench.results import GradModeResult
from batchjob.bench.sample_batches import move_to_device, select_full_batches
from batchjob.inference.forward import ForwardPass
from batchjob.types import Batch

__all__ = ["measure_grad_modes"]

_MIN_ROUNDS, _MAX_ROUNDS = 3, 9
_MAX_SECONDS = 6.0

GradMode = Callable[[], AbstractContextManager[Any]]
_GRAD_MODES: dict[str, GradMode] = {
    "gradients on": torch.enable_grad,
    "no_grad": torch.no_grad,
    "inference_mode": torch.inference_mode,
}


def measure_grad_modes(worker: BenchWorker, batches: Sequence[Batch]) -> tuple[GradModeResult, ...]:
    """Measure the model in each grad mode: eager and in fp32, regardless of the execution config of the run.

    Args:
        worker: Worker whose model is measured.
        batches: Batches of its sample.
    """
    engine = worker.engine
    if not engine.model.eager:
        note = f"model.type {worker.job.model.type} runs as it was saved"
        return tuple(GradModeResult(name, None, None, note) for name in _GRAD_MODES)
    forward = engine.build_forward(engine.loaded_config)
    pixels, batch = move_to_device(worker, select_full_batches(worker, batches))[0]
    if batch.shapes is not None:
        return tuple(GradModeResult(name, None, None, "images differ in size") for name in _GRAD_MODES)
    inputs = list(pixels) if forward.input_kind == "list" else pixels
    with _parameters_require_grad(engine.model.module):
        return _measure_in_turn(worker, forward, inputs, len(pixels))


def _measure_in_turn(worker: BenchWorker, forward: ForwardPass, inputs: Any, images: int) -> tuple[GradModeResult, ...]:
    # The modes take turns, so that changes in the load of the machine affect all of them alike.
    seconds: dict[str, list[float]] = {name: [] for name in _GRAD_MODES}
    errors: dict[str, str] = {}
    started = time.perf_counter()
    for rounds in range(1, _MAX_ROUNDS + 1):
        for name, grad_mode in _GRAD_MODES.items():
            if name not in errors:
                try:
                    seconds[name].append(_time_forward(forward, inputs, grad_mode))
                except Exception as error:  # noqa: BLE001 - a model may not run in this mode; the report says so
                    errors[name] = f"fails: {type(error).__name__}: {' '.join(str(error).split())[:100]}"
        enough = rounds * images >= worker.images or time.perf_counter() - started > _MAX_SECONDS
        if rounds >= _MIN_ROUNDS and enough:
            break
    return tuple(
        GradModeResult(name, None, None, errors[name])
        if name in errors
        else GradModeResult(
            name, median(seconds[name]) / images * 1e3, _measure_peak_bytes(worker, forward, inputs, grad_mode)
        )
        for name, grad_mode in _GRAD_MODES.items()
    )


@contextmanager
def _parameters_require_grad(module: torch.nn.Module) -> Iterator[None]:
    """Switch the gradients of the parameters on, as in a new module: loading has switched them off."""
    frozen = [one for one in module.parameters() if one.is_floating_point() and not one.requires_grad]
    changed = [parameter for parameter in frozen if not parameter.is_inference()]
    for parameter in changed:
        parameter.requires_grad_(True)
    try:
        yield
    finally:
        for parameter in changed:
            parameter.requires_grad_(False)


def _time_forward(forward: ForwardPass, inputs: Any, grad_mode: GradMode) -> float:
    started = time.perf_counter()
    with grad_mode():
        forward(inputs)
        if forward.device.type == "cuda":
            torch.cuda.synchronize(forward.device)
    return time.perf_counter() - started


def _measure_peak_bytes(worker: BenchWorker, forward: ForwardPass, inputs: Any, grad_mode: GradMode) -> int:
    """Measure the peak bytes of tensors, beyond those that exist before the forward pass."""
    if forward.device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(forward.device)
        before = torch.cuda.memory_allocated(forward.device)
        _time_forward(forward, inputs, grad_mode)
        return torch.cuda.max_memory_allocated(forward.device) - before
    path = worker.folder / "memory.json"
    with torch_profiler(profile_memory=True) as profiler:
        _time_forward(forward, inputs, grad_mode)
    profiler.export_chrome_trace(str(path))
    trace = json.loads(path.read_text())
    path.unlink()
    return _find_peak(trace["traceEvents"])


def _find_peak(events: Sequence[dict[str, Any]]) -> int:
    """Return the highest running sum of the allocations in a trace.

    Example: +8, +4, -8, +2 bytes have the running sums 8, 12, 4, 6, and the peak 12.
    """
    allocations = [event for event in events if event.get("name") == "[memory]"]
    steps = (int(event["args"]["Bytes"]) for event in sorted(allocations, key=lambda event: float(event["ts"])))
    return max(accumulate(steps), default=0)
