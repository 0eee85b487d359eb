"""Which recipe a device gains by: candidates, the check against eager fp32, paired timings, the decision."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from batchjob.inference.execution_config import ExecutionConfig
from batchjob.inference.output_comparison import OutputComparison, compare_outputs

__all__ = ["Trial", "TrialModel", "run_trials"]

_GAIN = 1.03  # below that it is noise, and eager is simpler
_HOPELESS = 0.7  # a first pair of timings below that needs no second
_PAIRS = range(5, 31)  # timings: so many at least and at most
_PAIRS_SECONDS = 3.0


@dataclass(frozen=True)
class Trial:
    """A line of the table.

    Attributes:
        recipe: what was tried.
        verdict: `passed`, or why not.
        passed: it ran, and its outputs are near enough.
        speedup: over eager fp32, median of paired timings; 0 where it was not timed.
        images_per_second: of the forward pass alone: eager fp32's, times `speedup`.
        likeness: None where it did not run.
        warm_up_s: from the module to the first output, compiling included.
    """

    recipe: ExecutionConfig
    verdict: str
    passed: bool = False
    speedup: float = 0.0
    images_per_second: float = 0.0
    likeness: OutputComparison | None = None
    warm_up_s: float = 0.0


class TrialModel:
    """What is tuned, on its device.

    Attributes:
        images: in the batch that `run` sees.
        classes: see `compare`.
    """

    batch_size: int
    argmax_is_class: bool = True

    def build(self, config: ExecutionConfig) -> Callable[[], Any]:
        """The model so prepared: each call runs it on the batch, and returns its output once that is there."""
        raise NotImplementedError


def run_trials(model: TrialModel, configs: Sequence[ExecutionConfig]) -> Iterator[Trial]:
    """Eager fp32, then each recipe against it, one at a time, as they are asked for. What fails is a line as well."""
    eager = model.build(ExecutionConfig())
    reference = eager()
    seconds = min(_clocked(eager) for _ in range(3))
    yield Trial(
        ExecutionConfig(),
        "the reference",
        True,
        1.0,
        model.batch_size / seconds,
        OutputComparison(0.0, 1.0, 1.0),
        warm_up_s=seconds,
    )
    for recipe in configs:
        if recipe != ExecutionConfig():
            yield _tried(model, recipe, eager, reference, model.batch_size / seconds)


def _tried(
    subject: TrialModel, recipe: ExecutionConfig, eager: Callable[[], Any], reference: Any, pace: float
) -> Trial:
    began = time.perf_counter()
    try:
        fast = subject.build(recipe)
        likeness = compare_outputs(reference, fast(), argmax_is_class=subject.argmax_is_class)
        warm_up = time.perf_counter() - began
        if (fault := likeness.rejection(recipe)) is not None:
            return Trial(recipe, fault, likeness=likeness, warm_up_s=warm_up)
        speedup = _paired(eager, fast)
    except Exception as error:  # noqa: BLE001 - a candidate that fails is a line in the table, not a failed job
        return Trial(recipe, f"failed: {type(error).__name__}: {' '.join(str(error).split())[:300]}")
    return Trial(recipe, "passed", True, speedup, pace * speedup, likeness, warm_up)


def _paired(eager: Callable[[], Any], fast: Callable[[], Any]) -> float:
    """Median ratio of timings taken in turn, which a noisy machine cannot tilt."""
    fast()
    ratios: list[float] = []
    began = time.perf_counter()
    while len(ratios) < _PAIRS.stop - 1:
        ratios.append(_clocked(eager) / _clocked(fast))
        if ratios[0] < _HOPELESS or (len(ratios) >= _PAIRS.start and time.perf_counter() - began > _PAIRS_SECONDS):
            break
    return statistics.median(ratios)


def _clocked(run: Callable[[], Any]) -> float:
    began = time.perf_counter()
    run()
    return time.perf_counter() - began
