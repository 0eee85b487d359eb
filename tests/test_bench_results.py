"""Calibration of a bench."""

from __future__ import annotations

from batchjob.bench.results import Calibration


def test_drift_of_more_than_5_percent_is_noisy() -> None:
    assert not Calibration(10.0, 10.4).noisy
    assert Calibration(10.0, 10.6).noisy
    assert Calibration(10.0, 9.4).noisy
