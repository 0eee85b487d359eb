"""The recipe that a plan's workers share on one kind of device: found once, put beside the plan, then only read."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass, replace
from typing import Any

import batchjob
from batchjob.errors import InvalidJob, NotFound
from batchjob.inference.autotune.cache import TuningCache, use_compile_cache
from batchjob.inference.autotune.candidates import list_candidates
from batchjob.inference.autotune.decision import TuningDecision, choose_config
from batchjob.inference.autotune.trial_process import (
    TIME_BUDGET_EXCEEDED,
    EngineTrialModel,
    TrialSpec,
    run_isolated_trials,
)
from batchjob.inference.autotune.trials import Trial
from batchjob.inference.engine import Engine
from batchjob.inference.execution_config import ExecutionConfig, requested_config, with_overrides
from batchjob.inference.forward import ForwardPass
from batchjob.inference.output_comparison import compare_outputs
from batchjob.inference.predictor import Predictor
from batchjob.job.acceleration import Acceleration
from batchjob.storage.store import Store, put_or_get

__all__ = ["Autotuner"]

_log = logging.getLogger(__name__)
_WORTH_SECONDS = 60.0  # of eager work; below that compiling costs more than it brings
_WORTH_QUICK_SECONDS = 25.0  # likewise, of recipes that are not compiled
_QUICK_BUDGET = 12.0  # seconds for those alone, most of them for a process to start and load the model
_SHARE = 0.25  # of the estimated run that a trial may take
_MUCH_MORE = 1.5
_WORTH_CHECKING = 8  # batches
_TOO_SHORT = "not tried, the job is too short to compile for"
_WHETHER = {"tuning", "tuning_budget_s"}  # say whether a table is made, not what is in it


@dataclass(frozen=True)
class Autotuner:
    """How a worker learns which recipe it works by.

    Args:
        store: of the output.
        plan_folder: Key prefix of the plan in the store; ends with `/`.
        task_fingerprint: Part of the job's fingerprint that describes the task.
        engine: with its model loaded and tried out.
        bench: what a trial needs.
        images: that this worker will see, about.
        pace: seconds an image takes eagerly, as the job names it.
        stopped: asked during trials; True ends them.
        lanes: batches at once, of which a trial has one.
    """

    store: Store
    plan_folder: str
    task_fingerprint: Any
    engine: Engine
    trial_spec: TrialSpec
    expected_images: float
    seconds_per_image: float
    is_stopped: Callable[[], bool]
    parallel_batches: int = 1

    def decide(self) -> TuningDecision:
        """The decision that stands for this device and this torch; the first one put does.

        What the job names by now is stronger.
        """
        import torch

        use_compile_cache()
        unknown = TuningDecision(self.engine.capabilities.name, str(torch.__version__), ExecutionConfig(), "")
        key = f"{self.plan_folder}{unknown.key}"
        with suppress(NotFound):
            return self._standing(self.store.read(key).data, unknown)
        named = replace(unknown, recipe=self.engine.requested_config, reason="as the job says")
        asked = self.engine.acceleration
        recipes = list_candidates(asked, self.engine.capabilities) if self.engine.model.eager else []
        if asked.tuning == "off" or len(recipes) < 2:
            return self._put(key, named, unknown)
        memory = TuningCache(self._facts(unknown))
        with memory.lock(self.is_stopped):
            with suppress(NotFound):  # another worker of this machine may have been at it meanwhile
                return self._standing(self.store.read(key).data, unknown)
            return self._put(key, self._decided(named, recipes, memory), unknown)

    def _put(self, key: str, ours: TuningDecision, unknown: TuningDecision) -> TuningDecision:
        """The one that stands then; ours alone where the trials were broken off."""
        if self.is_stopped():
            return ours
        return self._standing(put_or_get(self.store, key, ours.dump()), unknown)

    def _standing(self, data: bytes, unknown: TuningDecision) -> TuningDecision:
        """The decision that was put there, as far as this version, and what the job names by now, allow."""
        named, asked = self.engine.requested_config, self.engine.acceleration
        try:
            found = TuningDecision.parse(data)
        except (ValueError, KeyError, TypeError, AttributeError):
            _log.warning("the decision beside the plan is another version's; going on with %s", named.description)
            return replace(unknown, recipe=named, reason="another version of batchjob decided")
        if found.recipe == named or (asked.tuning != "off" and with_overrides(found.recipe, asked) == found.recipe):
            return found
        return replace(found, recipe=named, reason="as the job says by now")

    def _decided(
        self, named: TuningDecision, recipes: Sequence[ExecutionConfig], memory: TuningCache
    ) -> TuningDecision:
        """By what this machine remembers, or by trials."""
        began, known = time.monotonic(), _remembered(memory, self._budget())
        if known is None and not self._worth_a_trial():
            return replace(named, reason="the job is too short to try anything")
        if known is not None and not self._worth_a_check():
            return replace(named, reason="the job is too short to check what this machine found before")
        trials = known or self._tried(recipes)
        if known is None and trials[0].passed and not self.is_stopped():
            memory.write(
                replace(named, recipe=ExecutionConfig(), reason="", trials=tuple(trials), seconds=self._budget()).dump()
            )
        if not trials[0].passed:
            return replace(named, reason=f"eager fp32 could not be run in a trial: {trials[0].verdict}")
        recipe, reason = choose_config(
            self.engine.acceleration, trials, self.expected_images / self.parallel_batches, self.trial_spec.batch_size
        )
        reason += ", as this machine found before" if known else ""
        return replace(
            named, recipe=recipe, reason=reason, trials=tuple(trials), seconds=round(time.monotonic() - began, 2)
        )

    def _worth_a_trial(self) -> bool:
        return self.engine.acceleration.tuning == "on" or self._eager_seconds > _WORTH_QUICK_SECONDS

    def _worth_a_check(self) -> bool:
        """A batch of images is decoded once more for it."""
        return (
            self.engine.acceleration.tuning == "on"
            or self.expected_images >= _WORTH_CHECKING * self.trial_spec.batch_size
        )

    def _budget(self) -> float:
        asked = self.engine.acceleration
        if asked.tuning == "on":
            return asked.tuning_budget_s
        return min(asked.tuning_budget_s, _QUICK_BUDGET if self._short else _SHARE * self._eager_seconds)

    @property
    def _short(self) -> bool:
        """Whether the job is too short for anything to be compiled."""
        return self.engine.acceleration.tuning != "on" and self._eager_seconds <= _WORTH_SECONDS

    @property
    def _eager_seconds(self) -> float:
        return self.expected_images * self.seconds_per_image

    def _facts(self, unknown: TuningDecision) -> dict[str, Any]:
        """All that a table of trials hangs on."""
        engine = self.engine
        return {
            "device": unknown.device,
            "torch": unknown.torch,
            "batchjob": batchjob.__version__,
            "model": engine.model.digest,
            "task": self.task_fingerprint,
            "preprocess": engine.preprocess.model_dump(mode="json"),
            "input": [list(engine.example_image.shape), str(engine.example_image.dtype)],
            "batch_size": self.trial_spec.batch_size,
            "threads": self.trial_spec.threads,
            "asked": asdict(requested_config(engine.acceleration)),
            "open": [
                name
                for name in Acceleration.model_fields
                if name not in _WHETHER and getattr(engine.acceleration, name) == "auto"
            ],
        }

    def _tried(self, recipes: Sequence[ExecutionConfig]) -> list[Trial]:
        """The table, made with as much of the device's memory free as there can be."""
        import torch

        if self.engine.device.type == "cuda":
            torch.cuda.empty_cache()
        tried = [recipe for recipe in recipes if not (self._short and recipe.compile != "off")]
        made = run_isolated_trials(self.trial_spec, tried, self._budget(), self.is_stopped)
        return made + [Trial(recipe, _TOO_SHORT) for recipe in recipes if recipe not in tried]

    def build_predictor(self, decision: TuningDecision) -> tuple[TuningDecision, Predictor]:
        """A predictor by that recipe, warmed up, once it has run here on the job's images near enough to eager fp32.

        Falls back to what the job names, and says so, where the recipe fails here.

        Raises:
            InvalidJob: the recipe is what the job itself names.
        """
        named = self.engine.requested_config
        try:
            return decision, self._warm(decision.recipe)
        except InvalidJob:
            raise
        except Exception as error:
            if decision.recipe == named:
                raise InvalidJob(f"runtime: {named.description} fails with this model: {_brief(error)}") from error
            reason = f"{decision.recipe.description} fails here ({_brief(error)})"
            _log.warning("%s; going on with %s", reason, named.description)
            return replace(decision, recipe=named, reason=reason), self._warm(named)

    def _warm(self, recipe: ExecutionConfig) -> Predictor:
        engine, batch_size = self.engine, self.trial_spec.batch_size
        fixed = batch_size if recipe.fixed_batch and not engine.variable_size else None
        predictor = engine.build_predictor(self._checked(recipe), fixed)
        if recipe != ExecutionConfig():
            predictor.warm_up(engine.example_image.shape, batch_size, engine.example_image.dtype)
        return predictor

    def _checked(self, recipe: ExecutionConfig) -> ForwardPass:
        if recipe == ExecutionConfig():
            return self.engine.build_forward(recipe)
        subject = EngineTrialModel(self.engine, self.trial_spec.sample_locations, self.trial_spec.batch_size)
        forward = subject.build_forward(recipe)
        found = compare_outputs(
            subject.run(subject.build_forward(ExecutionConfig())),
            subject.run(forward),
            argmax_is_class=subject.argmax_is_class,
        )
        fault = found.rejection(recipe)
        if fault is not None and recipe != self.engine.requested_config:
            raise ValueError(fault)
        if fault is not None:
            _log.warning(
                "%s, as the job names it, %s (against eager fp32 on its own images)", recipe.description, fault
            )
        return forward


def _remembered(memory: TuningCache, budget: float) -> list[Trial] | None:
    """The table that this machine has made; not one that was cut short by much less time than there is now."""
    data = memory.read()
    if data is None:
        return None
    try:
        found = TuningDecision.parse(data)
    except (ValueError, KeyError, TypeError, AttributeError):
        return None
    cut_short = any(trial.verdict.endswith((TIME_BUDGET_EXCEEDED, _TOO_SHORT)) for trial in found.trials)
    return None if cut_short and budget > _MUCH_MORE * found.seconds else list(found.trials)


def _brief(error: Exception) -> str:
    return f"{type(error).__name__}: {' '.join(str(error).split())[:200]}"
