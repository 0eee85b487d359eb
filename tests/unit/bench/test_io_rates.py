"""Throughput of the store and of the disk: images that are only fetched, and a file that is written and removed."""

from __future__ import annotations

import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from batchjob.bench.bench_worker import BenchWorker
from batchjob.bench.io_rates import NullTransform, measure_disk_rate, measure_fetch_rate
from tests.support.small_bench import IMAGES, open_small_bench_worker, write_small_job

RUN_IMAGES = 24


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_small_job(tmp_path_factory.mktemp("job")).parent


@pytest.fixture(scope="module")
def worker(folder: Path) -> Iterator[BenchWorker]:
    with open_small_bench_worker(folder, RUN_IMAGES) as opened:
        yield opened


def list_files(folder: Path) -> set[Path]:
    return set(folder.rglob("*"))


def test_fetch_rate_counts_all_images_of_a_run(worker: BenchWorker) -> None:
    started = time.perf_counter()
    rate = measure_fetch_rate(worker)
    # The call takes longer than the time from which it computes the rate.
    assert rate * (time.perf_counter() - started) >= RUN_IMAGES


def test_fetched_images_are_not_decoded(worker: BenchWorker) -> None:
    # Decoding and transforming are replaced by one pixel an image, whatever the bytes are.
    prepared = NullTransform()(b"no image")
    assert tuple(prepared.pixels.shape) == (3, 1, 1)
    assert (prepared.width, prepared.height) == (1, 1)


def test_measuring_the_fetch_rate_does_not_change_the_output_of_the_worker(worker: BenchWorker) -> None:
    before = list_files(worker.folder)
    measure_fetch_rate(worker)
    assert list_files(worker.folder) == before
    assert worker.load_batches(worker.sample_shard)[0].pixels is not None, "its own loader still works"


def test_disk_rate_is_in_bytes_a_second(worker: BenchWorker) -> None:
    started = time.perf_counter()
    rate = measure_disk_rate(worker)
    assert rate * (time.perf_counter() - started) >= 64 << 20


def test_file_of_the_disk_rate_is_removed(worker: BenchWorker) -> None:
    before = list_files(worker.folder)
    measure_disk_rate(worker)
    assert list_files(worker.folder) == before


def test_missing_images_count_in_the_fetch_rate(worker: BenchWorker, folder: Path) -> None:
    (folder / "images/05.png").rename(folder / "05.png")
    try:
        started = time.perf_counter()
        rate = measure_fetch_rate(worker)
        assert rate * (time.perf_counter() - started) >= RUN_IMAGES
    finally:
        (folder / "05.png").rename(folder / "images/05.png")
    assert len(list((folder / "images").iterdir())) == IMAGES
