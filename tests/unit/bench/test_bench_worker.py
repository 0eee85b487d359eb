"""Worker of a bench: as many images as its batches need, and batches of which the images make two."""

from __future__ import annotations

import tempfile
from pathlib import Path

import pyarrow.parquet as pq
import pytest

from batchjob.bench.bench_worker import BenchWorker, open_bench_worker
from batchjob.errors import InvalidJob
from batchjob.job.job import Job
from batchjob.plan import chunks
from tests.support.small_bench import IMAGES, write_small_job

AUTO = ["runtime.batch_size=auto"]
DEFAULT_IMAGES = 1000


@pytest.fixture
def job_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    (tmp_path / "tmp").mkdir()
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path / "tmp"))
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    return write_small_job(tmp_path)


def choose_batch_size(monkeypatch: pytest.MonkeyPatch, batch_size: int) -> None:
    """Make `auto` choose so many images, as a GPU with room for them does."""
    monkeypatch.setattr("batchjob.worker.loader_setup._CPU_BATCH_SIZE", batch_size)


def count_rows(worker: BenchWorker) -> int:
    return sum(shard.key.rows for shard in worker.shards)


@pytest.mark.parametrize(
    ("chosen", "given", "batch_size", "images"),
    [
        (1024, None, IMAGES // 2, DEFAULT_IMAGES),  # the job lists 12 images
        (1024, 8, 4, 8),
        (1024, 2000, IMAGES // 2, 2000),
        (5, None, 5, DEFAULT_IMAGES),
    ],
)
def test_batch_size_that_is_chosen_leaves_two_batches_to_measure(
    job_file: Path,
    monkeypatch: pytest.MonkeyPatch,
    chosen: int,
    given: int | None,
    batch_size: int,
    images: int,
) -> None:
    choose_batch_size(monkeypatch, chosen)
    job = Job.from_file(job_file, overrides=AUTO)
    with open_bench_worker(job, given) as worker:
        assert (worker.batch_size, count_rows(worker)) == (batch_size, images)
        assert len(worker.load_sample()[0].image_infos) == batch_size


def test_run_has_four_batches_where_these_are_more_than_the_default(
    job_file: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("batchjob.bench.bench_worker._DEFAULT_IMAGES", 10)
    choose_batch_size(monkeypatch, 5)
    job = Job.from_file(job_file, overrides=AUTO)
    with open_bench_worker(job, None) as worker:
        assert (worker.batch_size, count_rows(worker)) == (5, 20)


def test_batch_size_of_the_job_is_never_changed(job_file: Path) -> None:
    job = Job.from_file(job_file, overrides=["runtime.batch_size=7"])
    with (
        pytest.raises(InvalidJob, match="lists 12: fewer than two batches of 7"),
        open_bench_worker(job, None),
    ):
        pass


def test_images_of_the_job_come_again_until_there_are_enough(job_file: Path) -> None:
    with open_bench_worker(Job.from_file(job_file), 2 * IMAGES + 2) as worker:
        run = worker.run(worker.shards)
        parts = sorted((worker.folder / "out/predictions").glob("*.parquet"))
        uris = [uri for part in parts for uri in pq.read_table(part, columns=["uri"])["uri"].to_pylist()]
    assert (run.images, run.failed) == (2 * IMAGES + 2, 0)
    numbers = list(range(IMAGES))
    assert [int(Path(uri).stem) for uri in uris] == [*numbers, *numbers, 0, 1]
    assert 0 < run.load_s < run.first_batch_s < run.total_s


def test_listing_is_measured_and_ends_with_as_many_images_as_are_needed(
    job_file: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    # The listing comes in batches of 2 images, of which the last one needed is taken whole.
    monkeypatch.setattr(chunks, "CHUNK_ROWS", 4)
    monkeypatch.setattr("batchjob.sources.prefix.BATCH_ROWS", 2)
    with open_bench_worker(Job.from_file(job_file), 7) as worker:
        assert worker.listed == 8
        assert worker.listing.name == "list"
        assert worker.listing.images_per_second is not None


def test_input_without_images_is_refused(job_file: Path) -> None:
    job = Job.from_file(job_file, {}, ["input.include=[none]"])
    with pytest.raises(InvalidJob, match="no images there, so there is nothing to measure"), open_bench_worker(job, 1):
        pass
