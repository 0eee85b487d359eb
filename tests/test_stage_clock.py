"""Stage clock: GPU time is measured on the device that the clock is for."""

from __future__ import annotations

import pytest
import torch

from batchjob.bench.stage_clock import StageClock


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="no second CUDA device here")
def test_gpu_time_is_that_of_the_clock_s_own_device() -> None:
    clock = StageClock(torch.device("cuda:1"))
    with clock.measure(1), torch.cuda.device(1):
        torch.cuda._sleep(200_000_000)
    assert clock.gpu_ms > 10, "milliseconds"
    assert clock.to_measurement("forward", None).gpu_ms == pytest.approx(clock.gpu_ms)
