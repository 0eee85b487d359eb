"""Result of a bench: how steady the machine was, and the JSON object."""

from __future__ import annotations

import json
from dataclasses import replace

import pytest

from batchjob.bench.bottleneck import Ceiling
from batchjob.bench.results import BenchResult, Calibration, RunMetrics, StageMeasurement, StageUtilization

RUN = RunMetrics(24, 0, 10.0, False, 1.0, 2.0, 3.0, None, None, None, {"decode": StageUtilization(20.0, 0.5)})
RESULT = BenchResult(
    model="m", device="cpu", recipe="eager fp32", batch_size=3, cores=1, loader_processes=0, images=24, distinct=12,
    stages=(StageMeasurement("list", 5.0),), ceilings=(Ceiling("cpu", 20.0, ""), Ceiling("store", 40.0, "")), ladder=(),
    run=RUN, share=0.5, modes=(), memory=(), calibration=Calibration(10.0, 11.0), verdict="",
)  # fmt: skip


def test_drift_of_more_than_5_percent_is_noisy() -> None:
    assert not Calibration(10.0, 10.4).noisy
    assert Calibration(10.0, 10.6).noisy
    assert Calibration(10.0, 9.4).noisy


@pytest.mark.parametrize(("after_ms", "drift"), [(10.0, 0.0), (12.5, 0.25), (8.0, -0.2)])
def test_drift_is_relative_to_the_time_before(after_ms: float, drift: float) -> None:
    assert Calibration(10.0, after_ms).drift == pytest.approx(drift)


def test_json_holds_drift_and_noise_beside_the_two_times() -> None:
    calibration = json.loads(json.dumps(RESULT.to_json_dict()))["calibration"]
    assert calibration == {"before_ms": 10.0, "after_ms": 11.0, "drift": pytest.approx(0.1), "noisy": True}


def test_json_nests_the_figures_of_each_stage() -> None:
    document = json.loads(json.dumps(RESULT.to_json_dict()))
    assert document["run"]["services"] == {"decode": {"images_per_second": 20.0, "busy": 0.5}}
    assert document["stages"][0].items() >= {"name": "list", "images_per_second": 5.0, "cpu_ms": None}.items()


@pytest.mark.parametrize(("ceilings", "tightest"), [(RESULT.ceilings, "cpu"), ((), None)])
def test_json_names_the_tightest_ceiling(ceilings: tuple[Ceiling, ...], tightest: str | None) -> None:
    assert replace(RESULT, ceilings=ceilings).to_json_dict()["tightest"] == tightest
