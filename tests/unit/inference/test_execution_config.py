"""Execution configs: their description, and the options of a job that override those of a config."""

from __future__ import annotations

from typing import Any

import pytest

from batchjob.inference.execution_config import ExecutionConfig, requested_config, with_overrides
from batchjob.job.acceleration import Acceleration

TUNED = ExecutionConfig(precision="bf16", channels_last=True, fold=True, compile="max-autotune", freeze=True)


@pytest.mark.parametrize(
    ("config", "text"),
    [
        (ExecutionConfig(), "eager fp32"),
        (ExecutionConfig(precision="tf32"), "tf32"),
        (ExecutionConfig(precision="fp16", half=True), "fp16 weights"),
        (ExecutionConfig(fold=True), "fp32 fold"),
        (ExecutionConfig(compile="default", freeze=True), "fp32 freeze compile"),
        (ExecutionConfig(compile="regional"), "fp32 compile=regional"),
        (ExecutionConfig(quantize="int8-static", cudnn_benchmark=True), "fp32 int8-static cudnn_benchmark"),
        (TUNED, "bf16 channels_last fold freeze compile=max-autotune"),
    ],
)
def test_description_lists_the_options_that_differ_from_the_default(config: ExecutionConfig, text: str) -> None:
    assert config.description == text


@pytest.mark.parametrize("mode", ["off", "default", "regional", "reduce-overhead"])
def test_compiled_modules_need_batches_of_one_shape(mode: Any) -> None:
    assert ExecutionConfig(compile=mode).fixed_batch == (mode != "off")


@pytest.mark.parametrize(
    ("settings", "expected"),
    [
        ({}, ExecutionConfig()),
        ({"precision": "tf32", "cudnn_benchmark": "on"}, ExecutionConfig(precision="tf32", cudnn_benchmark=True)),
        ({"compile": "on", "freeze": "on"}, ExecutionConfig(compile="default", freeze=True)),
        ({"compile": "max-autotune"}, ExecutionConfig(compile="max-autotune")),
        ({"quantize": "fp8"}, ExecutionConfig(quantize="fp8")),
        ({"precision": "bf16", "half_weights": "on"}, ExecutionConfig(precision="bf16", half=True)),
    ],
)
def test_job_gets_exactly_the_options_that_it_names(settings: dict[str, Any], expected: ExecutionConfig) -> None:
    assert requested_config(Acceleration.model_validate(settings)) == expected


def test_options_at_auto_keep_those_of_the_config() -> None:
    assert with_overrides(TUNED, Acceleration()) == TUNED


@pytest.mark.parametrize(
    ("settings", "changed"),
    [
        ({"precision": "fp32"}, {"precision": "fp32"}),
        ({"channels_last": "off", "fold": "off"}, {"channels_last": False, "fold": False}),
        ({"compile": "off"}, {"compile": "off"}),
        ({"half_weights": "on"}, {"half": True}),
    ],
)
def test_named_options_replace_those_of_the_config(settings: dict[str, Any], changed: dict[str, Any]) -> None:
    config = with_overrides(TUNED, Acceleration.model_validate(settings))
    assert {name: value for name, value in vars(config).items() if value != getattr(TUNED, name)} == changed


@pytest.mark.parametrize("precision", ["fp32", "tf32"])
def test_half_weights_are_ignored_with_a_precision_of_32_bits(precision: Any) -> None:
    config = with_overrides(ExecutionConfig(precision=precision), Acceleration(half_weights="on"))
    assert not config.half


def test_quantization_that_the_job_does_not_name_is_removed() -> None:
    assert with_overrides(ExecutionConfig(quantize="fp8"), Acceleration()).quantize == "none"
