"""Throughput of the store and of the disk: all loader processes only fetch, and one file is written."""

from __future__ import annotations

import os
import time
from dataclasses import dataclass, replace

import torch

from batchjob.bench.bench_worker import BenchWorker
from batchjob.loader.loader import Loader
from batchjob.loader.shard_queue import ShardQueue
from batchjob.types import PreparedImage

__all__ = ["NullTransform", "measure_disk_rate", "measure_fetch_rate"]

_MAX_SECONDS = 3.0
_DISK_BYTES = 64 << 20


@dataclass(frozen=True)
class NullTransform:
    """Image transform that ignores the image's bytes: a loader with it only fetches."""

    def __call__(self, data: bytes) -> PreparedImage:  # noqa: ARG002 - signature of an image transform
        return PreparedImage(torch.ones((3, 1, 1), dtype=torch.uint8), 1, 1)


def measure_fetch_rate(worker: BenchWorker) -> float:
    """Measure images/s that all loader processes together fetch if they do nothing else.

    Raises:
        BatchjobError: If a store cannot be read.
    """
    loader = Loader(
        reader=worker.reader,
        transform=NullTransform(),
        batch_size=worker.batch_size,
        config=replace(worker.loader.config, pin_memory=False),
        size=None,
        max_bytes=worker.job.decode.max_bytes,
    )
    try:
        # The first shard starts the processes and opens their connections; it is not measured.
        list(loader.batches(ShardQueue.of([worker.sample_shard])))
        started = time.perf_counter()
        shards = [worker.clone_shard(shard) for shard in worker.shards]
        queue = ShardQueue.of(shards, is_open=lambda: time.perf_counter() < started + _MAX_SECONDS)
        images = sum(len(batch.image_infos) for batch in loader.batches(queue))
        return images / (time.perf_counter() - started)
    finally:
        loader.close()


def measure_disk_rate(worker: BenchWorker) -> float:
    """Measure bytes/s of the disk of the temporary files, fsync included."""
    path, noise = worker.folder / "noise", os.urandom(_DISK_BYTES)
    try:
        started = time.perf_counter()
        with path.open("wb") as file:
            file.write(noise)
            file.flush()
            os.fsync(file.fileno())
        return _DISK_BYTES / (time.perf_counter() - started)
    finally:
        path.unlink(missing_ok=True)
