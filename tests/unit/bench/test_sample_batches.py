"""Batches of the sample: the full ones are measured, or the others if there is no full one."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import pytest
import torch

from batchjob.bench.sample_batches import count_good_images, move_to_device, require_pixels, select_full_batches
from batchjob.errors import InvalidJob
from tests.support.small_bench import IMAGES, open_small_bench_worker, write_small_job


def write_job_with_broken_images(folder: Path, broken: Sequence[int]) -> Path:
    job = write_small_job(folder)
    for number in broken:
        (folder / f"images/{number:02}.png").write_bytes(b"no image")
    return job.parent


@pytest.mark.parametrize(
    ("broken", "starts", "good"),
    [
        # Batches of three images begin at 0, 3, 6 and 9.
        ((), [0, 3, 6, 9], [3, 3, 3, 3]),
        # One image of the second batch and all images of the third one are broken.
        ((4, 6, 7, 8), [0, 9], [3, 3]),
        # No batch is full: all that have a good image are used.
        ((0, 4, 6, 7, 8, 9, 10), [0, 3, 9], [2, 2, 1]),
    ],
    ids=["all good", "some full", "none full"],
)
def test_full_batches_are_selected_before_others(
    tmp_path: Path, broken: tuple[int, ...], starts: list[int], good: list[int]
) -> None:
    folder = write_job_with_broken_images(tmp_path, broken)
    with open_small_bench_worker(folder, IMAGES) as worker:
        selected = select_full_batches(worker, worker.load_batches(worker.sample_shard))
    assert [batch.start for batch in selected] == starts
    assert [count_good_images(batch) for batch in selected] == good
    assert [len(require_pixels(batch)) for batch in selected] == good


def test_sample_without_a_good_image_is_refused(tmp_path: Path) -> None:
    folder = write_job_with_broken_images(tmp_path, range(1, IMAGES))
    with open_small_bench_worker(folder, IMAGES) as worker:
        batches = worker.load_batches(worker.sample_shard)
        with pytest.raises(InvalidJob, match=f"none of the first {IMAGES} images can be decoded"):
            select_full_batches(worker, batches[1:])


def test_pixels_on_the_device_stay_beside_their_batch(tmp_path: Path) -> None:
    write_small_job(tmp_path)
    with open_small_bench_worker(tmp_path, IMAGES) as worker:
        batches = worker.load_batches(worker.sample_shard)
        moved = move_to_device(worker, batches)
        assert [batch for _, batch in moved] == batches
        for pixels, batch in moved:
            assert pixels.device == worker.engine.device
            torch.testing.assert_close(pixels.cpu(), require_pixels(batch), rtol=0, atol=0)
