"""Worker of a bench: as many images as its batches need, and batches of which the images make two."""

from __future__ import annotations

import tempfile
from pathlib import Path

import pytest

from batchjob.bench.bench_worker import open_bench_worker
from batchjob.bench.input_sample import DEFAULT_IMAGES, sample_input
from batchjob.errors import InvalidJob
from batchjob.job.job import Job
from tests.support.small_bench import IMAGES, write_small_job

AUTO = ["runtime.batch_size=auto"]


@pytest.fixture
def job_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    (tmp_path / "tmp").mkdir()
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path / "tmp"))
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    return write_small_job(tmp_path)


def choose_batch_size(monkeypatch: pytest.MonkeyPatch, batch_size: int) -> None:
    """Make `auto` choose so many images, as a GPU with room for them does."""
    monkeypatch.setattr("batchjob.worker.loader_setup._DEFAULT_BATCH_SIZE", batch_size)


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
    with open_bench_worker(job, given, 1, sample_input(job, given or DEFAULT_IMAGES)) as worker:
        assert (worker.batch_size, worker.images) == (batch_size, images)
        assert next(len(batch.image_infos) for batch in worker.load_batches(worker.sample_shard)) == batch_size


def test_run_has_four_batches_where_these_are_more_than_the_default(
    job_file: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("batchjob.bench.bench_worker.DEFAULT_IMAGES", 10)
    choose_batch_size(monkeypatch, 5)
    job = Job.from_file(job_file, overrides=AUTO)
    with open_bench_worker(job, None, 1, sample_input(job, 10)) as worker:
        assert (worker.batch_size, worker.images) == (5, 20)


def test_batch_size_of_the_job_is_never_changed(job_file: Path) -> None:
    job = Job.from_file(job_file, overrides=["runtime.batch_size=7"])
    with (
        pytest.raises(InvalidJob, match="lists 12: fewer than two batches of 7"),
        open_bench_worker(job, None, 1, sample_input(job, DEFAULT_IMAGES)),
    ):
        pass
