"""Stages of a bench, each by itself: what is timed, and the images that stand in for all."""

from __future__ import annotations

import threading
import time
from collections.abc import Sequence
from pathlib import Path

import pytest
import torch

from batchjob.bench import stages
from batchjob.bench.bench_worker import count_images
from batchjob.bench.stages import measure_fetch_rate, measure_stages, time_stage
from batchjob.errors import InvalidJob
from tests.support.small_bench import BATCH_SIZE, IMAGES, open_small_bench_worker, write_small_job

CPU_SECONDS = 0.03
RUN_IMAGES = 24  # each image twice


def use_cpu(item: object = None) -> None:
    """Keep the calling thread busy for `CPU_SECONDS` of its CPU time."""
    started = time.thread_time()
    while time.thread_time() - started < CPU_SECONDS:
        pass


def use_cpu_in_another_thread(item: object) -> None:
    thread = threading.Thread(target=use_cpu)
    thread.start()
    thread.join()


@pytest.fixture(autouse=True)
def short(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(stages, "_STAGE_SECONDS", 0.05)


def test_figures_are_sums_over_all_rounds_per_image() -> None:
    calls: list[int] = []

    def work(item: int) -> None:
        calls.append(item)
        use_cpu()

    measured = time_stage("decode", [2, 3], work, count=lambda item: item)
    images = sum(calls[1:])  # the first call warms up
    assert len(calls) >= 4
    assert measured.cpu_ms is not None
    assert measured.cpu_ms >= CPU_SECONDS * len(calls[1:]) / images * 1e3
    assert measured.images_per_second is not None
    assert measured.images_per_second <= images / (CPU_SECONDS * len(calls[1:]))
    assert (measured.name, measured.gpu_ms) == ("decode", None)


def test_cpu_time_of_other_threads_counts_for_a_process_but_not_for_a_thread() -> None:
    of_process = time_stage("forward", [1], use_cpu_in_another_thread)
    of_thread = time_stage("decode", [1], use_cpu_in_another_thread, cpu_clock=time.thread_time)
    assert of_process.cpu_ms is not None
    assert of_thread.cpu_ms is not None
    assert of_thread.cpu_ms < CPU_SECONDS * 1e3 <= of_process.cpu_ms


@pytest.mark.gpu
@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="no second CUDA device here")
def test_gpu_time_is_that_of_the_device_that_is_measured() -> None:
    def work(item: int) -> None:
        with torch.cuda.device(1):
            torch.cuda._sleep(200_000_000)

    gpu_ms = time_stage("forward", [1], work, device=torch.device("cuda:1")).gpu_ms
    assert gpu_ms is not None
    assert gpu_ms > 10


@pytest.mark.parametrize(
    ("broken", "good"),
    [
        # Batches of three images begin at 0, 3, 6 and 9.
        ((), [3, 3, 3, 3]),
        # One image of the second batch and all images of the third one are broken.
        ((4, 6, 7, 8), [3, 3]),
        # No batch is full: all that have a good image are used.
        ((0, 4, 6, 7, 8, 9, 10), [2, 2, 1]),
    ],
    ids=["all good", "some full", "none full"],
)
def test_full_batches_are_measured_before_others(tmp_path: Path, broken: Sequence[int], good: list[int]) -> None:
    write_small_job(tmp_path)
    for number in broken:
        (tmp_path / f"images/{number:02}.png").write_bytes(b"no image")
    with open_small_bench_worker(tmp_path, IMAGES) as worker:
        batches = worker.load_sample()
        pixels = worker.select_pixels(batches)
        assert [count_images(batch) for batch in pixels] == good
        measured = {stage.name: stage for stage in measure_stages(worker, batches, pixels)}
    assert list(measured) == ["fetch", "decode", "transform", "collate", "H2D", "forward", "D2H", "write"]
    for name in set(measured) - {"H2D", "D2H"}:
        rate = measured[name].images_per_second
        assert rate is not None
        assert rate > 0
    assert measured["decode"].bytes == 10 * 8 * 3
    assert measured["transform"].bytes == 8 * 8 * 3
    assert measured["write"].note.endswith(f"{IMAGES} rows a part")


def test_sample_without_a_good_image_is_refused(tmp_path: Path) -> None:
    write_small_job(tmp_path)
    for number in range(BATCH_SIZE, IMAGES):
        (tmp_path / f"images/{number:02}.png").write_bytes(b"no image")
    with open_small_bench_worker(tmp_path, IMAGES) as worker:
        batches = worker.load_sample()
        with pytest.raises(InvalidJob, match=r"none of the first 9 images can be decoded"):
            worker.select_pixels(batches[1:])
        for path in (tmp_path / "images").iterdir():
            path.unlink()
        with pytest.raises(InvalidJob, match="fetch: no image can be read any more"):
            measure_stages(worker, batches, worker.select_pixels(batches))


def test_fetch_rate_counts_all_images_of_a_run_and_leaves_no_file(tmp_path: Path) -> None:
    write_small_job(tmp_path)
    (tmp_path / "images/05.png").write_bytes(b"no image")
    with open_small_bench_worker(tmp_path, RUN_IMAGES) as worker:
        before = set(worker.folder.rglob("*"))
        started = time.perf_counter()
        rate = measure_fetch_rate(worker)
        # The call takes longer than the time from which it computes the rate.
        assert rate * (time.perf_counter() - started) >= RUN_IMAGES
        assert set(worker.folder.rglob("*")) == before
        assert worker.load_sample()[0].pixels is not None, "its own loader still works"
