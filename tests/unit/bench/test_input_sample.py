"""The first images of a job, listed and repeated."""

from __future__ import annotations

from pathlib import Path

import pyarrow as pa
import pytest

from batchjob.bench.input_sample import repeat_rows, sample_input
from batchjob.errors import InvalidJob
from batchjob.job.job import Job
from batchjob.plan import chunks
from tests.support.small_bench import IMAGES, write_small_job


def make_batches(*sizes: int) -> list[pa.RecordBatch]:
    """Make record batches of these sizes; the rows of all of them are numbered from 0."""
    starts = [sum(sizes[:count]) for count in range(len(sizes))]
    rows = [list(range(start, start + size)) for start, size in zip(starts, sizes, strict=True)]
    return [pa.record_batch({"row": pa.array(numbers, pa.int64())}) for numbers in rows]


@pytest.mark.parametrize(
    ("sizes", "rows", "repeated"),
    [
        ((3, 2), 5, [[0, 1, 2], [3, 4]]),
        ((3, 2), 4, [[0, 1, 2], [3]]),
        ((3, 2), 2, [[0, 1]]),
        # After the last batch comes the first one again.
        ((3, 2), 9, [[0, 1, 2], [3, 4], [0, 1, 2], [3]]),
        ((2,), 5, [[0, 1], [0, 1], [0]]),
        # A listing may hold batches without rows.
        ((0, 2, 0), 3, [[0, 1], [0]]),
    ],
)
def test_rows_are_repeated_up_to_their_number(sizes: tuple[int, ...], rows: int, repeated: list[list[int]]) -> None:
    found = [batch.column("row").to_pylist() for batch in repeat_rows(make_batches(*sizes), rows)]
    assert found == repeated


def test_nothing_is_repeated_if_there_are_no_rows() -> None:
    assert list(repeat_rows(make_batches(0, 0), 5)) == []


def test_sample_holds_all_images_of_a_small_input(tmp_path: Path) -> None:
    sample = sample_input(Job.from_file(write_small_job(tmp_path)), 1)
    locations = [location for batch in sample.batches for location in batch.column("location").to_pylist()]
    assert [Path(location).name for location in locations] == [f"{number:02}.png" for number in range(IMAGES)]
    assert sample.rows == IMAGES


def test_listing_is_measured_as_a_stage(tmp_path: Path) -> None:
    stage = sample_input(Job.from_file(write_small_job(tmp_path)), 1).stage
    assert stage.name == "list"
    assert stage.images_per_second is not None
    assert stage.images_per_second > 0
    assert stage.cpu_ms is not None
    assert (stage.gpu_ms, stage.bytes) == (None, None)


@pytest.mark.parametrize(("images", "rows"), [(1, 4), (5, 6), (100, 12)])
def test_listing_ends_with_as_many_images_as_a_run_and_its_tuning_need(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, images: int, rows: int
) -> None:
    # Tuning needs 4 images. The listing comes in batches of 2 images, of which the last one needed is taken whole.
    monkeypatch.setattr(chunks, "CHUNK_ROWS", 4)
    monkeypatch.setattr("batchjob.sources.prefix.BATCH_ROWS", 2)
    assert sample_input(Job.from_file(write_small_job(tmp_path)), images).rows == rows


def test_input_without_images_is_refused(tmp_path: Path) -> None:
    job = Job.from_file(write_small_job(tmp_path), {}, ["input.include=[none]"])
    with pytest.raises(InvalidJob, match="no images there, so there is nothing to measure"):
        sample_input(job, 1)
