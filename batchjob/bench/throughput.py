"""Throughput of the path from four starting points: on the device, decoded, encoded in memory, in storage."""

from __future__ import annotations

import shutil
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from itertools import cycle
from pathlib import Path
from tempfile import mkdtemp

from batchjob.bench.bench_worker import BenchWorker
from batchjob.bench.forward_loop import measure_forward_rate
from batchjob.bench.results import RunMetrics, ThroughputStep
from batchjob.bench.run_metrics import compute_steady_rate
from batchjob.bench.sample_batches import move_to_device, require_pixels, select_full_batches
from batchjob.inference.example_images import random_pixels
from batchjob.loader.fetch import Fetcher, group_refs
from batchjob.storage.objects import ObjectData
from batchjob.types import Batch, ImageRef

__all__ = ["measure_throughput_steps"]

_SHARED_MEMORY = Path("/dev/shm")  # noqa: S108 - a file system in memory, where there is one
_RESERVED_BYTES = 512 << 20  # of shared memory, for loader processes
_HELD_BYTES = 256 << 20  # of encoded images


def measure_throughput_steps(
    worker: BenchWorker, batches: Sequence[Batch], full: RunMetrics
) -> tuple[ThroughputStep, ...]:
    """Measure throughput from each starting point, from the device up to storage.

    Args:
        worker: Worker whose components are measured.
        batches: Batches of its sample.
        full: Metrics of the run, which is the last step.

    Raises:
        BatchjobError: If the model or the disk fails.
    """
    decoded = [(require_pixels(batch), batch.shapes) for batch in select_full_batches(worker, batches)]
    return (
        ThroughputStep("synthetic batch on the device", _measure_synthetic(worker), "forward pass and copy back"),
        ThroughputStep("decoded pixels in memory", measure_forward_rate(worker, decoded), "and copy there"),
        _measure_encoded(worker),
        ThroughputStep("full, from storage", full.images_per_second, "and fetching"),
    )


def _measure_synthetic(worker: BenchWorker) -> float | None:
    engine = worker.engine
    if engine.variable_size:
        batches = select_full_batches(worker, worker.load_batches(worker.sample_shard))
        pixels, batch = move_to_device(worker, batches)[0]
        return measure_forward_rate(worker, [(pixels, batch.shapes)])
    pixels = random_pixels(tuple(engine.example_image.shape), worker.batch_size, engine.example_image.dtype)
    return measure_forward_rate(worker, [(pixels.to(engine.device), None)])


def _measure_encoded(worker: BenchWorker) -> ThroughputStep:
    """Measure a whole run whose images lie in memory, encoded as in storage."""
    name = "encoded bytes in memory"
    with _images_in_memory(worker) as (refs, place):
        if not refs:
            return ThroughputStep(name, None, "no image could be read")
        repeated = cycle(refs)
        shards = [
            worker.clone_shard(shard, [replace(next(repeated), position=ref.position) for ref in shard.refs])
            for shard in worker.shards
        ]
        rate, _ = compute_steady_rate(worker.run(shards), worker.info.ahead)
    return ThroughputStep(name, rate, f"and decoding, rows and commits; {len(refs):,} images in {place}")


@contextmanager
def _images_in_memory(worker: BenchWorker) -> Iterator[tuple[list[ImageRef], str]]:
    """Write images of the run to files in memory, up to `_HELD_BYTES`; the files are removed at the end.

    Yields:
        Refs of the files, and the place in words: shared memory, or the page cache if shared memory is too small.
    """
    free = shutil.disk_usage(_SHARED_MEMORY).free - _RESERVED_BYTES if _SHARED_MEMORY.is_dir() else 0
    fits = free > 2 * _HELD_BYTES
    folder = Path(mkdtemp(prefix="batchjob-bench-", dir=_SHARED_MEMORY if fits else worker.folder))
    try:
        refs: list[ImageRef] = []
        for number, (ref, item) in enumerate(_fetch_distinct_images(worker)):
            path = folder / f"{number}{Path(ref.location).suffix}"
            path.write_bytes(item.data)
            refs.append(replace(ref, location=str(path), size=len(item.data), etag=None))
        yield refs, str(_SHARED_MEMORY) if fits else "the page cache"
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def _fetch_distinct_images(worker: BenchWorker) -> Iterator[tuple[ImageRef, ObjectData]]:
    """Yield distinct images of the run, up to `_HELD_BYTES`."""
    fetcher, held, seen = Fetcher(worker.reader, worker.job.decode.max_bytes), 0, set[str]()
    for shard in worker.shards:
        fresh = [ref for ref in {ref.location: ref for ref in shard.refs}.values() if ref.location not in seen]
        seen |= {ref.location for ref in fresh}
        for start in range(0, len(fresh), worker.batch_size):
            for refs in group_refs(fresh[start : start + worker.batch_size]):
                for ref, item in zip(refs, fetcher.fetch(refs), strict=True):
                    if isinstance(item, ObjectData):
                        held += len(item.data)
                        yield ref, item
            if held > _HELD_BYTES:
                return
