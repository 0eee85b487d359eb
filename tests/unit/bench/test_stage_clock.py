"""Stage clock: wall-clock and CPU time of a stage, and GPU time on the device that the clock is for."""

from __future__ import annotations

import threading
import time

import pytest
import torch

from batchjob.bench.stage_clock import StageClock
from batchjob.errors import InvalidJob

CPU_SECONDS = 0.05


def use_cpu() -> None:
    """Keep the calling thread busy for `CPU_SECONDS` of its CPU time."""
    started = time.thread_time()
    while time.thread_time() - started < CPU_SECONDS:
        pass


def use_cpu_in_another_thread() -> None:
    thread = threading.Thread(target=use_cpu)
    thread.start()
    thread.join()


@pytest.mark.parametrize("process", [True, False])
def test_cpu_time_of_the_calling_thread_is_counted(process: bool) -> None:
    clock = StageClock(process=process)
    with clock.measure(1):
        use_cpu()
    assert clock.cpu_seconds >= CPU_SECONDS


def test_cpu_time_of_other_threads_counts_for_a_whole_process() -> None:
    clock = StageClock(process=True)
    with clock.measure(1):
        use_cpu_in_another_thread()
    assert clock.cpu_seconds >= CPU_SECONDS


def test_cpu_time_of_other_threads_does_not_count_for_one_thread() -> None:
    clock = StageClock(process=False)
    with clock.measure(1):
        use_cpu_in_another_thread()
    assert clock.cpu_seconds < CPU_SECONDS <= clock.seconds


def test_figures_are_sums_over_all_blocks_per_image() -> None:
    clock = StageClock(process=False)
    for images in (2, 3):
        with clock.measure(images):
            use_cpu()
    measured = clock.to_measurement("decode", 10.0, "one thread")
    assert clock.images == 5
    assert measured.images_per_second == pytest.approx(5 / clock.seconds)
    assert measured.cpu_ms == pytest.approx(clock.cpu_seconds * 1000 / 5)
    assert clock.seconds >= 2 * CPU_SECONDS
    assert (measured.name, measured.bytes, measured.note) == ("decode", 10.0, "one thread")


@pytest.mark.parametrize("device", [None, torch.device("cpu")])
def test_stage_without_a_gpu_has_no_gpu_time(device: torch.device | None) -> None:
    clock = StageClock(device)
    with clock.measure(1):
        use_cpu()
    assert clock.to_measurement("forward", None).gpu_ms is None


def test_block_that_fails_is_not_counted() -> None:
    clock = StageClock()
    with pytest.raises(ValueError, match="no image"), clock.measure(1):
        raise ValueError("no image")
    assert (clock.images, clock.seconds, clock.cpu_seconds) == (0, 0.0, 0.0)


def test_stage_that_no_image_reached_has_no_figures() -> None:
    with pytest.raises(InvalidJob, match="decode: no image came that far"):
        StageClock().to_measurement("decode", None)


@pytest.mark.gpu
@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="no second CUDA device here")
def test_gpu_time_is_that_of_the_clock_s_own_device() -> None:
    clock = StageClock(torch.device("cuda:1"))
    with clock.measure(1), torch.cuda.device(1):
        torch.cuda._sleep(200_000_000)
    assert clock.gpu_ms > 10, "milliseconds"
    assert clock.to_measurement("forward", None).gpu_ms == pytest.approx(clock.gpu_ms)
