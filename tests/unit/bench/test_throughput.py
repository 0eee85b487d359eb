"""Throughput steps: images in memory stand in for those in storage, and the last step is the run itself."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from batchjob.bench.bench_worker import BenchWorker
from batchjob.bench.results import RunMetrics, ThroughputStep
from batchjob.bench.throughput import measure_throughput_steps
from tests.support.small_bench import IMAGES, open_small_bench_worker, write_small_job

RUN_IMAGES = 24  # each image twice
METRICS = RunMetrics(RUN_IMAGES, 0, 123.5, True, 1.0, 2.0, 3.0, None, None, None, {})


@pytest.fixture
def worker(tmp_path: Path) -> Iterator[BenchWorker]:
    write_small_job(tmp_path)
    with open_small_bench_worker(tmp_path, RUN_IMAGES) as opened:
        yield opened


def measure_steps(worker: BenchWorker) -> dict[str, ThroughputStep]:
    batches = worker.load_batches(worker.sample_shard)
    return {step.name: step for step in measure_throughput_steps(worker, batches, METRICS)}


def read_new_rows(worker: BenchWorker, before: list[Path]) -> pa.Table:
    """Read the rows of the parts that were committed since the given ones, in plan order."""
    parts = sorted(set(list_parts(worker)) - set(before))
    return pa.concat_tables([pq.read_table(part, columns=["position", "uri", "error_type"]) for part in parts])


def list_parts(worker: BenchWorker) -> list[Path]:
    return list((worker.folder / "out/predictions").glob("*.parquet"))


def test_four_steps_lead_from_the_device_to_the_rate_of_the_run(worker: BenchWorker) -> None:
    steps = measure_steps(worker)
    assert list(steps) == [
        "synthetic batch on the device",
        "decoded pixels in memory",
        "encoded bytes in memory",
        "full, from storage",
    ]
    assert steps.pop("full, from storage").images_per_second == 123.5
    assert all(step.images_per_second is not None and step.images_per_second > 0 for step in steps.values())


def test_images_that_the_run_repeats_are_held_in_memory_once(worker: BenchWorker) -> None:
    worker.shards = (*worker.shards, worker.clone_shard(worker.shards[0]))
    assert f"; {IMAGES} images in " in measure_steps(worker)["encoded bytes in memory"].note


def test_readable_images_replace_deleted_ones(worker: BenchWorker, tmp_path: Path) -> None:
    batches, before = worker.load_batches(worker.sample_shard), list_parts(worker)
    (tmp_path / "images/03.png").unlink()
    step = measure_throughput_steps(worker, batches, METRICS)[2]
    assert "; 11 images in " in step.note
    rows = read_new_rows(worker, before)
    # 24 rows of 11 images: twice each, and the first two a third time.
    readable = [number for number in range(IMAGES) if number != 3]
    assert [int(Path(uri).stem) for uri in rows["uri"].to_pylist()] == [*readable, *readable, *readable[:2]]
    assert rows["position"].to_pylist() == list(range(RUN_IMAGES))
    assert rows["error_type"].null_count == RUN_IMAGES


def test_step_of_encoded_images_is_not_measured_if_all_images_are_gone(worker: BenchWorker, tmp_path: Path) -> None:
    batches = worker.load_batches(worker.sample_shard)
    for path in (tmp_path / "images").iterdir():
        path.unlink()
    step = measure_throughput_steps(worker, batches, METRICS)[2]
    assert (step.images_per_second, step.note) == (None, "no image could be read")
