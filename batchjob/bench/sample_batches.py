"""Batches of the sample as input of a measurement: the full ones, and their pixels on the device."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from batchjob.bench.bench_worker import BenchWorker
from batchjob.errors import InvalidJob
from batchjob.types import Batch

__all__ = ["count_good_images", "move_to_device", "require_pixels", "select_full_batches"]


def select_full_batches(worker: BenchWorker, batches: Sequence[Batch]) -> list[Batch]:
    """Return the batches in which all images are good; if there is none, those with at least one good image.

    Raises:
        InvalidJob: If no image is good.
    """
    usable = [batch for batch in batches if batch.pixels is not None]
    if not usable:
        count = len(worker.sample_shard.refs)
        raise InvalidJob(f"none of the first {count} images can be decoded: nothing can be measured")
    return [batch for batch in usable if count_good_images(batch) == worker.batch_size] or usable


def move_to_device(worker: BenchWorker, batches: Sequence[Batch]) -> list[tuple[torch.Tensor, Batch]]:
    """Return the pixels of each batch on the device of the model, beside the batch."""
    device = worker.engine.device
    moved = [(require_pixels(batch).to(device), batch) for batch in batches]
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return moved


def count_good_images(batch: Batch) -> int:
    """Return the number of images in the pixels of a batch."""
    return sum(info.error is None for info in batch.image_infos)


def require_pixels(batch: Batch) -> torch.Tensor:
    """Return the pixels of a batch that has a good image."""
    assert batch.pixels is not None
    return batch.pixels
