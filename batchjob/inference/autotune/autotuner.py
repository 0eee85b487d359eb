"""Autotuner: the execution config that all workers of a plan use on one kind of device, decided once and stored."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass, replace
from typing import Any

import torch

import batchjob
from batchjob.errors import InvalidJob, NotFound
from batchjob.inference.autotune.cache import TuningCache, use_compile_cache
from batchjob.inference.autotune.candidates import list_candidates
from batchjob.inference.autotune.decision import TuningDecision, choose_config
from batchjob.inference.autotune.engine_trial import EngineTrialModel
from batchjob.inference.autotune.trial_process import TIME_BUDGET_EXCEEDED, TrialSpec, run_isolated_trials
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

# Eager work, in seconds, below which compiling costs more than it gains.
_MIN_SECONDS_TO_COMPILE = 60.0
# Eager work, in seconds, below which even configs without compilation are not tried.
_MIN_SECONDS_TO_TRY = 25.0
# Seconds for configs without compilation; most of them are for the process to start and load the model.
_QUICK_BUDGET_SECONDS = 12.0
# Share of the estimated run that trials may take.
_BUDGET_SHARE = 0.25
# Trials that ran out of time are made again if the budget is now larger by this factor.
_RETRY_BUDGET_FACTOR = 1.5
# Checking a cached table decodes one batch; that is worth it from so many batches of a worker on.
_MIN_BATCHES_TO_CHECK = 8
_TOO_SHORT = "not tried, the job is too short to compile for"
# Settings that say whether there are trials, and do not change their results.
_NOT_IN_KEY = {"tuning", "tuning_budget_s"}


@dataclass(frozen=True)
class Autotuner:
    """Decision on the execution config of a worker.

    The first worker on a kind of device tries the candidates and stores its decision beside the plan; all others, and
    later runs, read it. A machine also caches the results of its trials for other plans.

    Example:
        decision = autotuner.decide()                             # read, or try the candidates and store
        decision, predictor = autotuner.build_predictor(decision) # checked and warmed up

    Args:
        store: Store of the output.
        plan_folder: Key prefix of the plan in the store; ends with `/`.
        task_fingerprint: Part of the job's fingerprint that describes the task.
        engine: Engine whose model has run once.
        trial_spec: Input of the trial process.
        expected_images: Estimate of the images that this worker will predict.
        seconds_per_image: Seconds that an image takes with the requested config.
        is_stopped: Polled during trials; True ends them.
        parallel_batches: Batches that the worker computes at once; a trial computes one.
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
        """Return the decision for this device and this torch.

        The first decision that is stored holds for all workers. What the job names today overrides it.
        """
        use_compile_cache()
        blank = TuningDecision(self.engine.capabilities.name, str(torch.__version__), ExecutionConfig(), "")
        key = f"{self.plan_folder}{blank.key}"
        with suppress(NotFound):
            return self._read_decision(self.store.read(key).data, blank)
        requested = replace(blank, config=self.engine.requested_config, reason="as the job says")
        settings = self.engine.acceleration
        # Trials compare with fp32, so modules with other weights run as they are, and as the job says.
        is_tunable = self.engine.model.eager and self.engine.loaded_config == ExecutionConfig()
        candidates = list_candidates(settings, self.engine.capabilities) if is_tunable else []
        if settings.tuning == "off" or len(candidates) < 2:
            return self._put_or_get(key, requested, blank)
        cache = TuningCache(self._cache_key_fields(blank))
        with cache.lock(self.is_stopped):
            # Another worker of this machine may have decided while this one waited for the lock.
            with suppress(NotFound):
                return self._read_decision(self.store.read(key).data, blank)
            return self._put_or_get(key, self._make_decision(requested, candidates, cache), blank)

    def build_predictor(self, decision: TuningDecision) -> tuple[TuningDecision, Predictor]:
        """Build and warm up the predictor of a decision, after a check of its config on the job's images here.

        Returns:
            The decision and the predictor; if its config fails here, a decision for the requested config in its place.

        Raises:
            InvalidJob: The requested config itself fails.
        """
        requested = self.engine.requested_config
        try:
            return decision, self._build_warm_predictor(decision.config)
        except InvalidJob:
            raise
        except Exception as error:
            if decision.config == requested:
                raise InvalidJob(
                    f"runtime: {requested.description} fails with this model: {_summarize(error)}"
                ) from error
            reason = f"{decision.config.description} fails here ({_summarize(error)})"
            _log.warning("%s; going on with %s", reason, requested.description)
            return replace(decision, config=requested, reason=reason), self._build_warm_predictor(requested)

    # -- stored decisions --------------------------------------------------------------------------------------

    def _put_or_get(self, key: str, decision: TuningDecision, blank: TuningDecision) -> TuningDecision:
        """Store a decision, unless its trials were interrupted, and return the one that holds."""
        if self.is_stopped():
            return decision
        return self._read_decision(put_or_get(self.store, key, decision.dump()), blank)

    def _read_decision(self, data: bytes, blank: TuningDecision) -> TuningDecision:
        """Return a stored decision, or the requested config if this version cannot read it or the job overrides it."""
        requested, settings = self.engine.requested_config, self.engine.acceleration
        try:
            stored = TuningDecision.parse(data)
        except (ValueError, KeyError, TypeError, AttributeError):
            _log.warning("the decision beside the plan is another version's; going on with %s", requested.description)
            return replace(blank, config=requested, reason="another version of batchjob decided")
        follows_settings = settings.tuning != "off" and with_overrides(stored.config, settings) == stored.config
        if stored.config == requested or follows_settings:
            return stored
        return replace(stored, config=requested, reason="as the job says by now")

    # -- a new decision ----------------------------------------------------------------------------------------

    def _make_decision(
        self, requested: TuningDecision, candidates: Sequence[ExecutionConfig], cache: TuningCache
    ) -> TuningDecision:
        """Decide by trials, or by the cached results of earlier trials on this machine."""
        started, cached = time.monotonic(), _read_cached_trials(cache, self._budget())
        is_forced = self.engine.acceleration.tuning == "on"
        if cached is None and not is_forced and self._eager_seconds <= _MIN_SECONDS_TO_TRY:
            return replace(requested, reason="the job is too short to try anything")
        batches = self.expected_images / self.trial_spec.batch_size
        if cached is not None and not is_forced and batches < _MIN_BATCHES_TO_CHECK:
            return replace(requested, reason="the job is too short to check what this machine found before")
        trials = cached or self._run_trials(candidates)
        if cached is None and trials[0].passed and not self.is_stopped():
            entry = replace(requested, config=ExecutionConfig(), reason="", trials=tuple(trials))
            cache.write(replace(entry, seconds=self._budget()).dump())
        if not trials[0].passed:
            return replace(requested, reason=f"eager fp32 could not be run in a trial: {trials[0].verdict}")
        settings, batch_size = self.engine.acceleration, self.trial_spec.batch_size
        config, reason = choose_config(settings, trials, self.expected_images / self.parallel_batches, batch_size)
        reason += ", as this machine found before" if cached else ""
        seconds = round(time.monotonic() - started, 2)
        return replace(requested, config=config, reason=reason, trials=tuple(trials), seconds=seconds)

    def _run_trials(self, candidates: Sequence[ExecutionConfig]) -> list[Trial]:
        """Run the trials in a process of their own, with as much of the device's memory free as possible."""
        if self.engine.device.type == "cuda":
            torch.cuda.empty_cache()
        configs = [config for config in candidates if not (self._is_short and config.compile != "off")]
        trials = run_isolated_trials(self.trial_spec, configs, self._budget(), self.is_stopped)
        return trials + [Trial(config, _TOO_SHORT) for config in candidates if config not in configs]

    def _budget(self) -> float:
        settings = self.engine.acceleration
        if settings.tuning == "on":
            return settings.tuning_budget_s
        budget = _QUICK_BUDGET_SECONDS if self._is_short else _BUDGET_SHARE * self._eager_seconds
        return min(settings.tuning_budget_s, budget)

    @property
    def _is_short(self) -> bool:
        """True if the job is too short for compilation."""
        return self.engine.acceleration.tuning != "on" and self._eager_seconds <= _MIN_SECONDS_TO_COMPILE

    @property
    def _eager_seconds(self) -> float:
        return self.expected_images * self.seconds_per_image

    def _cache_key_fields(self, blank: TuningDecision) -> dict[str, Any]:
        """Return everything on which the results of trials depend."""
        engine = self.engine
        return {
            "device": blank.device,
            "torch": blank.torch,
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
                if name not in _NOT_IN_KEY and getattr(engine.acceleration, name) == "auto"
            ],
        }

    # -- the predictor -----------------------------------------------------------------------------------------

    def _build_warm_predictor(self, config: ExecutionConfig) -> Predictor:
        engine, batch_size = self.engine, self.trial_spec.batch_size
        fixed_size = batch_size if config.fixed_batch and not engine.variable_size else None
        predictor = engine.build_predictor(self._build_checked_forward(config), fixed_size)
        if config != engine.loaded_config:
            predictor.warm_up(engine.example_image.shape, batch_size, engine.example_image.dtype)
        return predictor

    def _build_checked_forward(self, config: ExecutionConfig) -> ForwardPass:
        """Build a forward pass and compare its output on the job's images with that of eager fp32.

        Raises:
            ValueError: The outputs are too far apart, and the job does not name this config itself.
        """
        loaded_config = self.engine.loaded_config
        if config == loaded_config:
            return self.engine.build_forward(config)
        model = EngineTrialModel(self.engine, self.trial_spec.sample_locations, self.trial_spec.batch_size)
        forward = model.build_forward(config)
        reference = model.run(model.build_forward(loaded_config))
        comparison = compare_outputs(reference, model.run(forward), argmax_is_class=model.argmax_is_class)
        rejection = comparison.rejection(config)
        if rejection is not None and config != self.engine.requested_config:
            raise ValueError(rejection)
        if rejection is not None:
            message = "%s, as the job names it, %s (against eager fp32 on its own images)"
            _log.warning(message, config.description, rejection)
        return forward


def _read_cached_trials(cache: TuningCache, budget: float) -> list[Trial] | None:
    """Return the cached trials of this machine, None if a much smaller budget than this one cut them short."""
    data = cache.read()
    if data is None:
        return None
    try:
        cached = TuningDecision.parse(data)
    except (ValueError, KeyError, TypeError, AttributeError):
        return None
    cut_short = any(trial.verdict.endswith((TIME_BUDGET_EXCEEDED, _TOO_SHORT)) for trial in cached.trials)
    return None if cut_short and budget > _RETRY_BUDGET_FACTOR * cached.seconds else list(cached.trials)


def _summarize(error: Exception) -> str:
    return f"{type(error).__name__}: {' '.join(str(error).split())[:200]}"
