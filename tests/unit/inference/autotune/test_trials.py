"""Candidates, trials and the choice of a config, with a model that only simulates its computation."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch

from batchjob.inference.autotune.candidates import list_candidates
from batchjob.inference.autotune.decision import TuningDecision, choose_config
from batchjob.inference.autotune.trials import Trial, TrialModel, run_trials
from batchjob.inference.devices import DeviceCapabilities
from batchjob.inference.execution_config import ExecutionConfig, requested_config
from batchjob.job.acceleration import Acceleration

CPU, CPU_BF16 = DeviceCapabilities("cpu", "cpu"), DeviceCapabilities("cpu", "cpu", bf16=True)
GPU = DeviceCapabilities("NVIDIA H100", "cuda", bf16=True, fp16=True)
EAGER = ExecutionConfig()
COMPILED = ExecutionConfig(compile="default", freeze=True)
FOLDED = ExecutionConfig(channels_last=True, fold=True)


def make_settings(**output: Any) -> Acceleration:
    return Acceleration.model_validate(output)


@pytest.mark.parametrize("device", [CPU, CPU_BF16, GPU])
def test_auto_tries_nothing_below_autocast(device: DeviceCapabilities) -> None:
    candidates = list_candidates(make_settings(), device)
    assert candidates[0] == EAGER
    assert len(set(candidates)) == len(candidates) > 3
    assert all(config.quantize == "none" and not config.half for config in candidates)
    assert any(config.precision == "bf16" for config in candidates) == device.bf16
    assert all(config.compile != "off" for config in candidates if config.freeze)


def test_named_options_hold_for_all_candidates() -> None:
    for config in list_candidates(make_settings(compile="off", precision="bf16", channels_last="on"), GPU):
        assert (config.compile, config.precision, config.channels_last) == ("off", "bf16", True)
    assert list_candidates(make_settings(compile="off", channels_last="off", fold="off", precision="fp32"), CPU) == [
        EAGER
    ]
    assert requested_config(make_settings(precision="fp16", half_weights="on")) == ExecutionConfig(
        precision="fp16", half=True
    )
    static = list_candidates(make_settings(quantize="int8-static"), CPU_BF16)
    assert all(config.quantize == "int8-static" and config.precision == "fp32" for config in static)
    assert {config.compile for config in static} == {"off", "default"}


@pytest.mark.parametrize(("word", "value"), [("on", True), ("off", False)])
def test_yaml_booleans_are_read_as_on_and_off(word: str, value: bool) -> None:
    for name in ("channels_last", "fold", "compile", "freeze", "tuning"):
        assert getattr(make_settings(**{name: value}), name) == word
    assert make_settings(quantize=False).quantize == "off"


class SimulatedModel(TrialModel):
    """Model with a given duration and output for each config."""

    batch_size = 10
    argmax_is_class = True

    def __init__(
        self, seconds: dict[ExecutionConfig, float], outputs: dict[ExecutionConfig, Any] | None = None
    ) -> None:
        self.seconds, self.outputs = seconds, outputs or {}
        self.built: list[ExecutionConfig] = []

    def build(self, config: ExecutionConfig) -> Callable[[], Any]:
        self.built.append(config)
        output = self.outputs.get(config, torch.eye(4))
        if isinstance(output, Exception):
            raise output

        def run() -> Any:
            until = time.perf_counter() + self.seconds.get(config, 0.002)
            while time.perf_counter() < until:
                pass
            return output

        return run


def test_each_config_gives_a_trial() -> None:
    broken = ExecutionConfig(precision="bf16")
    wrong = ExecutionConfig(channels_last=True)
    model = SimulatedModel(
        {EAGER: 0.004, COMPILED: 0.001},
        {broken: RuntimeError("no kernel\nfor this"), wrong: torch.eye(4).flip(0)},
    )
    lines = list(run_trials(model, [EAGER, broken, wrong, COMPILED]))
    assert [make_trial.config for make_trial in lines] == [EAGER, broken, wrong, COMPILED]
    assert [make_trial.passed for make_trial in lines] == [True, False, False, True]
    assert lines[1].verdict == "failed: RuntimeError: no kernel for this"
    assert "deviates by" in lines[2].verdict
    assert lines[3].speedup > 1.5
    assert lines[3].images_per_second > lines[0].images_per_second
    assert model.built.count(EAGER) == 1


def make_trial(config: ExecutionConfig, speedup: float, warm_up: float = 0.0, passed: bool = True) -> Trial:
    return Trial(config, "passed", passed, speedup, 100 * speedup, None, warm_up)


def test_fastest_passed_config_is_chosen() -> None:
    table = [
        make_trial(EAGER, 1.0),
        make_trial(FOLDED, 1.2),
        make_trial(COMPILED, 1.6, 5.0),
        make_trial(ExecutionConfig(precision="bf16"), 9, passed=False),
    ]
    assert choose_config(make_settings(), table, 1e6) == (COMPILED, "1.60 times eager fp32")
    assert choose_config(make_settings(), table, 500)[0] == FOLDED, "too few images to compile for"
    assert choose_config(make_settings(), table[:1], 1e6) == (EAGER, "nothing that passed is faster")
    assert choose_config(make_settings(), [make_trial(EAGER, 1.0), make_trial(FOLDED, 1.02)], 1e9)[0] == EAGER, (
        "a gain of 2 % is noise"
    )
    assert choose_config(make_settings(), [], 1e9) == (EAGER, "as the job says")
    assert choose_config(make_settings(), table, 300, check_images=30)[0] == EAGER, "the check costs more than the gain"
    assert choose_config(make_settings(), table, 600, check_images=30)[0] == FOLDED


def test_named_option_is_kept_even_if_slower() -> None:
    named = ExecutionConfig(precision="bf16")
    table = [make_trial(EAGER, 1.0), make_trial(named, 0.2), make_trial(replace(named, channels_last=True), 0.3)]
    assert choose_config(make_settings(precision="bf16"), table, 1e6)[0] == replace(named, channels_last=True)
    failed = [make_trial(EAGER, 1.0), make_trial(named, 0, passed=False)]
    assert choose_config(make_settings(precision="bf16"), failed, 1e6) == (named, "as the job says")


def test_decision_round_trips_through_json() -> None:
    model = SimulatedModel({EAGER: 0.001})
    decision = TuningDecision(
        "cpu Intel(R) Xeon", "2.11.0+cu128", COMPILED, "1.60 times", tuple(run_trials(model, [FOLDED])), 3.5
    )
    assert TuningDecision.parse(decision.dump()) == decision
    assert decision.key == "tuning/cpu-Intel-R--Xeon-torch-2-11-0-cu128.json"
    with pytest.raises((ValueError, KeyError, TypeError)):
        TuningDecision.parse(b'{"device": "x"}')
