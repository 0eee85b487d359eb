"""Trials of execution configs: each is compared with eager fp32 on the same batch, then timed in turn with it."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

from batchjob.inference.execution_config import ExecutionConfig
from batchjob.inference.output_comparison import OutputComparison, compare_outputs

__all__ = ["Trial", "TrialModel", "measure_seconds", "run_trials"]

# Speed relative to eager fp32 in the first pair of timings, below which no second pair is taken.
_HOPELESS_SPEEDUP = 0.7
# Least number of pairs of timings, and the number at which they end.
_MIN_PAIRS, _MAX_PAIRS = 5, 30
# Time after which no further pair is taken, once there are enough.
_TIMING_SECONDS = 3.0


@dataclass(frozen=True)
class Trial:
    """Result of one trial.

    Attributes:
        config: Execution config that was tried.
        verdict: `passed`, or the reason why it is not used.
        passed: It ran, and its outputs are near enough to the reference.
        speedup: Speed relative to eager fp32, the median of paired timings; 0 if it was not timed.
        images_per_second: Images per second of the forward pass alone: that of eager fp32 times `speedup`.
        comparison: Comparison with the outputs of eager fp32; None if it did not run.
        warm_up_s: Seconds from the plain module to the first output, compilation included.
    """

    config: ExecutionConfig
    verdict: str
    passed: bool = False
    speedup: float = 0.0
    images_per_second: float = 0.0
    comparison: OutputComparison | None = None
    warm_up_s: float = 0.0


class TrialModel(Protocol):
    """A model on its device with a batch to run it on.

    Example: `run = model.build(config)` compiles, and each `run()` returns the outputs for the same 32 images.

    Attributes:
        batch_size: Images in the batch.
        argmax_is_class: See `compare_outputs`.
    """

    batch_size: int
    argmax_is_class: bool

    def build(self, config: ExecutionConfig) -> Callable[[], Any]:
        """Prepare the model for a config; each call of the result runs the batch and returns its complete output."""


def run_trials(model: TrialModel, configs: Sequence[ExecutionConfig]) -> Iterator[Trial]:
    """Try eager fp32, then each config against it, one for each `next()`; a config that fails gives a trial too."""
    run_eager = model.build(ExecutionConfig())
    reference = run_eager()
    seconds = min(measure_seconds(run_eager) for _ in range(3))
    yield Trial(
        config=ExecutionConfig(),
        verdict="the reference",
        passed=True,
        speedup=1.0,
        images_per_second=model.batch_size / seconds,
        comparison=OutputComparison(0.0, 1.0, 1.0),
        warm_up_s=seconds,
    )
    for config in configs:
        if config != ExecutionConfig():
            yield _try_config(model, config, run_eager, reference, model.batch_size / seconds)


def measure_seconds(run: Callable[[], Any]) -> float:
    """Return the wall-clock seconds of one call."""
    started = time.perf_counter()
    run()
    return time.perf_counter() - started


def _try_config(
    model: TrialModel, config: ExecutionConfig, run_eager: Callable[[], Any], reference: Any, images_per_second: float
) -> Trial:
    started = time.perf_counter()
    try:
        run = model.build(config)
        comparison = compare_outputs(reference, run(), argmax_is_class=model.argmax_is_class)
        warm_up = time.perf_counter() - started
        if (rejection := comparison.rejection(config)) is not None:
            return Trial(config, rejection, comparison=comparison, warm_up_s=warm_up)
        speedup = _measure_speedup(run_eager, run)
    except Exception as error:  # noqa: BLE001 - a config that fails is a line of the table, not a failed job
        return Trial(config, f"failed: {type(error).__name__}: {' '.join(str(error).split())[:300]}")
    return Trial(config, "passed", True, speedup, images_per_second * speedup, comparison, warm_up)


def _measure_speedup(run_eager: Callable[[], Any], run: Callable[[], Any]) -> float:
    """Return the median ratio of timings taken in turn: a change of the machine's speed affects both of a pair."""
    run()
    ratios: list[float] = []
    started = time.perf_counter()
    while len(ratios) < _MAX_PAIRS:
        ratios.append(measure_seconds(run_eager) / measure_seconds(run))
        enough = len(ratios) >= _MIN_PAIRS and time.perf_counter() - started > _TIMING_SECONDS
        if ratios[0] < _HOPELESS_SPEEDUP or enough:
            break
    return statistics.median(ratios)
