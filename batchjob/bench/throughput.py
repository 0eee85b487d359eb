"""The same images from ever further away: on the device, decoded, encoded in memory, and in storage."""

from __future__ import annotations

import shutil
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from itertools import cycle
from pathlib import Path
from tempfile import mkdtemp
from typing import TYPE_CHECKING

from batchjob.bench.bench_worker import BenchWorker, RunRecord
from batchjob.bench.forward_loop import measure_forward_rate
from batchjob.bench.results import RunMetrics, StageUtilization, ThroughputStep
from batchjob.bench.stages import move_to_device, select_full_batches
from batchjob.inference.example_images import random_pixels
from batchjob.loader.fetch import Fetcher, group_refs
from batchjob.storage.objects import ObjectData
from batchjob.types import Batch, ImageRef, Shard, StageTiming

if TYPE_CHECKING:
    import torch

__all__ = ["compute_run_metrics", "compute_steady_rate", "measure_throughput_steps"]

_MEMORY = Path("/dev/shm")  # noqa: S108 - a file system in memory, where there is one
_MEMORY_SPARE = 512 << 20  # that loader processes may need of it
_HELD_BYTES = 256 << 20
_READY_SECONDS = 0.002


def measure_throughput_steps(
    rig: BenchWorker, batches: Sequence[Batch], full: RunMetrics
) -> tuple[ThroughputStep, ...]:
    """From the device up to storage.

    Args:
        rig: whose parts are measured.
        batches: of its sample.
        full: the topmost rung, which has been measured.

    Raises:
        BatchjobError: the model or the disk fails.
    """
    known = select_full_batches(rig, batches)
    return (
        ThroughputStep("synthetic batch on the device", _synthetic(rig), "forward pass and copy back"),
        ThroughputStep(
            "decoded pixels in memory",
            measure_forward_rate(rig, [(_pixels(one), one.shapes) for one in known]),
            "and copy there",
        ),
        _encoded(rig),
        ThroughputStep("full, from storage", full.images_per_second, "and fetching"),
    )


def _synthetic(rig: BenchWorker) -> float | None:
    engine = rig.parts.engine
    if engine.variable_size:
        pixels, batch = move_to_device(rig, select_full_batches(rig, rig.load_batches(rig.sample_shard)))[0]
        return measure_forward_rate(rig, [(pixels, batch.shapes)])
    pixels = random_pixels(tuple(engine.example_image.shape), rig.batch_size, engine.example_image.dtype)
    return measure_forward_rate(rig, [(pixels.to(engine.device), None)])


def _encoded(rig: BenchWorker) -> ThroughputStep:
    """The whole path, but the images lie in memory, as they are stored."""
    with _in_memory(rig) as (refs, where):
        if not refs:
            return ThroughputStep("encoded bytes in memory", None, "no image could be read")
        again = cycle(refs)
        shards = [_moved(rig, shard, again) for shard in rig.shards]
        rate, _ = compute_steady_rate(rig.run(shards), rig.loaded.ahead)
    return ThroughputStep(
        "encoded bytes in memory", rate, f"and decoding, rows and commits; {len(refs):,} images in {where}"
    )


def _moved(rig: BenchWorker, shard: Shard, refs: Iterator[ImageRef]) -> Shard:
    members = [replace(next(refs), position=ref.position) for ref in shard.refs]
    return rig.clone_shard(shard, members)


@contextmanager
def _in_memory(rig: BenchWorker) -> Iterator[tuple[list[ImageRef], str]]:
    """The run's images as files in memory, as many as may be held there; removed afterwards."""
    room = shutil.disk_usage(_MEMORY).free - _MEMORY_SPARE if _MEMORY.is_dir() else 0
    inside = room > 2 * _HELD_BYTES
    folder = Path(mkdtemp(prefix="batchjob-bench-", dir=_MEMORY if inside else rig.folder))
    try:
        made: list[ImageRef] = []
        for number, (ref, blob) in enumerate(_blobs(rig)):
            path = folder / f"{number}{Path(ref.location).suffix}"
            path.write_bytes(blob.data)
            made.append(replace(ref, location=str(path), size=len(blob.data), etag=None))
        yield made, str(_MEMORY) if inside else "the page cache"
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def _blobs(rig: BenchWorker) -> Iterator[tuple[ImageRef, ObjectData]]:
    """Distinct images of the run, up to the bytes that may be held."""
    fetcher, held, seen = Fetcher(rig.parts.reader, rig.job.decode.max_bytes), 0, set[str]()
    for shard in rig.shards:
        fresh = [ref for ref in {ref.location: ref for ref in shard.refs}.values() if ref.location not in seen]
        seen |= {ref.location for ref in fresh}
        for start in range(0, len(fresh), rig.batch_size):
            for refs in group_refs(fresh[start : start + rig.batch_size]):
                for ref, blob in zip(refs, fetcher.fetch(refs), strict=True):
                    if isinstance(blob, ObjectData):
                        held += len(blob.data)
                        yield ref, blob
            if held > _HELD_BYTES:
                return


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
    waited = sum(span.ended - span.began for span in asked)
    ready = [span.ended - span.began < _READY_SECONDS for span in asked]
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
    free = between - sum(span.ended - span.began for span in forward) / lanes
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
        seconds = sum(span.ended - span.began for span in spans)
        if seconds > 0:
            hands = lanes if stage == "forward" else len({span.pid for span in spans})
            took = ran.ended - ran.began
            found[stage] = StageUtilization(
                sum(span.images for span in spans) / seconds, min(1.0, seconds / hands / took)
            )
    return found
