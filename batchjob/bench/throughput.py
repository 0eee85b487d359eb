"""Throughput of the path from four starting points: on the device, decoded, encoded in memory, and in storage."""

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
from batchjob.types import Batch, ImageRef, Shard

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
        shards = [_replace_refs(worker, shard, repeated) for shard in worker.shards]
        rate, _ = compute_steady_rate(worker.run(shards), worker.info.ahead)
    return ThroughputStep(name, rate, f"and decoding, rows and commits; {len(refs):,} images in {place}")


def _replace_refs(worker: BenchWorker, shard: Shard, refs: Iterator[ImageRef]) -> Shard:
    return worker.clone_shard(shard, [replace(next(refs), position=ref.position) for ref in shard.refs])


@contextmanager
def _images_in_memory(worker: BenchWorker) -> Iterator[tuple[list[ImageRef], str]]:
    """Write images of the run to files in memory, up to `_HELD_BYTES`; the files are removed at the end.

    Yields:
        Refs of the files, and the place in words: shared memory, or the page cache if that is too small.
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
<<<<<<< HEAD
=======


def _pixels(batch: Batch) -> torch.Tensor:
    assert batch.pixels is not None
    return batch.pixels


def compute_run_metrics(rig: BenchWorker, ran: RunRecord) -> RunMetrics:
    """The figures of a run."""
    rate, is_steady = compute_steady_rate(ran, rig.loaded.ahead)
    forward = ran.timings_of("forward")
    first, last = forward[0].ended, forward[-1].ended
    asked = [span for span in ran.timings_of("wait") if span.images and span.ended > first]
    between = last - first
    waited = sum(span.ended - span.started for span in asked)
    ready = [span.ended - span.started < _READY_SECONDS for span in asked]
    return RunMetrics(
        images=ran.images,
        failed=ran.failed,
        images_per_second=rate,
        steady=is_steady,
        load_s=rig.load_s,
        first_batch_s=rig.load_s + first - ran.began,
        total_s=rig.load_s + ran.ended - ran.began,
        starvation=_idle(forward[1:], rig.parts.cpu_parallelism.parallel_batches, between, waited)
        if between > 0
        else None,
        ready=sum(ready) / len(ready) if ready else None,
        cores_busy=None if ran.cpu_s is None else ran.cpu_s / (ran.ended - ran.began),
        services=_services(ran, rig.parts.cpu_parallelism.parallel_batches),
    )


def _idle(forward: Sequence[StageTiming], lanes: int, between: float, waited: float) -> float:
    """Share of the time that there were no pixels. Lanes, or a GPU, may be at work while they are waited for."""
    free = between - sum(span.ended - span.started for span in forward) / lanes
    return max(0.0, min(1.0, (free if lanes > 1 else min(waited, free)) / between))


def compute_steady_rate(ran: RunRecord, ahead: int) -> tuple[float, bool]:
    """Images/s between 10 % of the images (or what was loaded ahead) and 90 %; of the whole run where it is too short.

    Args:
        ran: the run.
        ahead: images that the loader keeps under way.
    """
    done = list(_summed(ran.timings_of("forward")))
    total = done[-1][1] if done else 0
    window = [(at, images) for at, images in done if max(ahead, total * 0.1) <= images <= total * 0.9]
    if len(window) >= 2 and window[-1][0] > window[0][0]:
        (began, before), (ended, after) = window[0], window[-1]
        return (after - before) / (ended - began), True
    return ran.images / (ran.ended - ran.began), False


def _summed(spans: Iterable[StageTiming]) -> Iterator[tuple[float, int]]:
    """When how many images were through."""
    images = 0
    for span in spans:
        images += span.images
        yield span.ended, images


def _services(ran: RunRecord, lanes: int) -> dict[str, StageUtilization]:
    found = {}
    for stage in ("fetch", "decode", "device decode", "forward", "write"):
        spans = ran.timings_of(stage)
        seconds = sum(span.ended - span.started for span in spans)
        if seconds > 0:
            hands = lanes if stage == "forward" else len({span.pid for span in spans})
            took = ran.ended - ran.began
            found[stage] = StageUtilization(
                sum(span.images for span in spans) / seconds, min(1.0, seconds / hands / took)
            )
    return found
>>>>>>> 860d635 (types and errors: plain docstrings, a worked example beside each layout, the tree of exceptions under today's names)
