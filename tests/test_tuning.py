"""Candidates, the table that trials make, and the choice: pure, on a subject that only pretends to compute."""

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


def asked(**given: Any) -> Acceleration:
    return Acceleration.model_validate(given)


@pytest.mark.parametrize("device", [CPU, CPU_BF16, GPU])
def test_auto_goes_no_lower_than_autocast(device: DeviceCapabilities) -> None:
    tried_there = list_candidates(asked(), device)
    assert tried_there[0] == EAGER
    assert len(set(tried_there)) == len(tried_there) > 3
    assert all(recipe.quantize == "none" and not recipe.half for recipe in tried_there)
    assert any(recipe.precision == "bf16" for recipe in tried_there) == device.bf16
    assert all(recipe.compile != "off" for recipe in tried_there if recipe.freeze)


def test_what_a_job_names_holds_for_every_candidate() -> None:
    for recipe in list_candidates(asked(compile="off", precision="bf16", channels_last="on"), GPU):
        assert (recipe.compile, recipe.precision, recipe.channels_last) == ("off", "bf16", True)
    assert list_candidates(asked(compile="off", channels_last="off", fold="off", precision="fp32"), CPU) == [EAGER]
    assert requested_config(asked(precision="fp16", half_weights="on")) == ExecutionConfig(precision="fp16", half=True)
    static = list_candidates(asked(quantize="int8-static"), CPU_BF16)
    assert all(recipe.quantize == "int8-static" and recipe.precision == "fp32" for recipe in static)
    assert {recipe.compile for recipe in static} == {"off", "default"}


@pytest.mark.parametrize(("word", "value"), [("on", True), ("off", False)])
def test_a_bare_on_or_off_is_understood(word: str, value: bool) -> None:
    for name in ("channels_last", "fold", "compile", "freeze", "tuning"):
        assert getattr(asked(**{name: value}), name) == word
    assert asked(quantize=False).quantize == "off"


class Pretended(TrialModel):
    """Takes the seconds it is told for a recipe, and gives the outputs it is told."""

    batch_size = 10
    argmax_is_class = True

    def __init__(
        self, seconds: dict[ExecutionConfig, float], outputs: dict[ExecutionConfig, Any] | None = None
    ) -> None:
        self.seconds, self.outputs = seconds, outputs or {}
        self.built: list[ExecutionConfig] = []

    def build(self, recipe: ExecutionConfig) -> Callable[[], Any]:
        self.built.append(recipe)
        given = self.outputs.get(recipe, torch.eye(4))
        if isinstance(given, Exception):
            raise given

        def run() -> Any:
            until = time.perf_counter() + self.seconds.get(recipe, 0.002)
            while time.perf_counter() < until:
                pass
            return given

        return run


def test_the_table_has_a_line_for_everything_that_was_tried() -> None:
    broken = ExecutionConfig(precision="bf16")
    wrong = ExecutionConfig(channels_last=True)
    subject = Pretended(
        {EAGER: 0.004, COMPILED: 0.001},
        {broken: RuntimeError("no kernel\nfor this"), wrong: torch.eye(4).flip(0)},
    )
    lines = list(run_trials(subject, [EAGER, broken, wrong, COMPILED]))
    assert [line.recipe for line in lines] == [EAGER, broken, wrong, COMPILED]
    assert [line.passed for line in lines] == [True, False, False, True]
    assert lines[1].verdict == "failed: RuntimeError: no kernel for this"
    assert "deviates by" in lines[2].verdict
    assert lines[3].speedup > 1.5
    assert lines[3].images_per_second > lines[0].images_per_second
    assert subject.built.count(EAGER) == 1


def line(recipe: ExecutionConfig, speedup: float, warm_up: float = 0.0, passed: bool = True) -> Trial:
    return Trial(recipe, "passed", passed, speedup, 100 * speedup, None, warm_up)


def test_the_fastest_that_passed_is_chosen() -> None:
    table = [
        line(EAGER, 1.0),
        line(FOLDED, 1.2),
        line(COMPILED, 1.6, 5.0),
        line(ExecutionConfig(precision="bf16"), 9, passed=False),
    ]
    assert choose_config(asked(), table, 1e6) == (COMPILED, "1.60 times eager fp32")
    assert choose_config(asked(), table, 500)[0] == FOLDED, "so few images do not pay for compiling"
    assert choose_config(asked(), table[:1], 1e6) == (EAGER, "nothing that passed is faster")
    assert choose_config(asked(), [line(EAGER, 1.0), line(FOLDED, 1.02)], 1e9)[0] == EAGER, "that is noise"
    assert choose_config(asked(), [], 1e9) == (EAGER, "as the job says")
    assert choose_config(asked(), table, 300, check_images=30)[0] == EAGER, "the check costs more than they gain"
    assert choose_config(asked(), table, 600, check_images=30)[0] == FOLDED


def test_what_a_job_names_is_kept_where_it_loses() -> None:
    named = ExecutionConfig(precision="bf16")
    table = [line(EAGER, 1.0), line(named, 0.2), line(replace(named, channels_last=True), 0.3)]
    assert choose_config(asked(precision="bf16"), table, 1e6)[0] == replace(named, channels_last=True)
    failed = [line(EAGER, 1.0), line(named, 0, passed=False)]
    assert choose_config(asked(precision="bf16"), failed, 1e6) == (named, "as the job says")


def test_a_decision_survives_its_file() -> None:
    subject = Pretended({EAGER: 0.001})
    made = TuningDecision(
        "cpu Intel(R) Xeon", "2.11.0+cu128", COMPILED, "1.60 times", tuple(run_trials(subject, [FOLDED])), 3.5
    )
    assert TuningDecision.parse(made.dump()) == made
    assert made.key == "tuning/cpu-Intel-R--Xeon-torch-2-11-0-cu128.json"
    with pytest.raises((ValueError, KeyError, TypeError)):
        TuningDecision.parse(b'{"device": "x"}')
