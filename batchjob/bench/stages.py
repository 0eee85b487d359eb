"""Each stage alone: its wall-clock, CPU and GPU time per image, and the bytes that it puts out."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import closing, contextmanager, nullcontext
from dataclasses import replace
from itertools import chain, cycle, islice, pairwise
from typing import Any

import torch

from batchjob.bench.bench_worker import BenchWorker, PixelBatch, count_images
from batchjob.bench.results import StageMeasurement
from batchjob.concurrency import parallel_map
from batchjob.errors import InvalidJob
from batchjob.inference.autotune.trials import measure_seconds
from batchjob.inference.device_transfer import DeviceTransfer
from batchjob.loader.fetch import Fetcher, group_refs
from batchjob.loader.loader import Loader
from batchjob.loader.shard_queue import ShardQueue
from batchjob.storage.objects import ObjectData
from batchjob.types import Batch, PreparedImage

__all__ = ["measure_fetch_rate", "measure_stages", "time_stage"]

_STAGE_SECONDS = 1.5
_FETCH_SECONDS = 3.0
_MIN_ROUNDS = 3
_MAX_DECODED = 256  # images held as they were decoded
_NO_COPY = "nothing to copy: the device is the CPU"


def time_stage(
    name: str,
    items: Sequence[Any],
    work: Callable[[Any], Any],
    *,
    count: Callable[[Any], int] = lambda item: 1,
    device: torch.device | None = None,
    cpu_clock: Callable[[], float] = time.process_time,
) -> StageMeasurement:
    """Time work on one item after another, over and over; the first call warms up and is not counted.

    Args:
        name: Name of the stage.
        items: Items to work on, at least one.
        work: Work on an item.
        count: Returns the number of images of an item.
        device: Device whose time is measured with CUDA events, if it is a CUDA device.
        cpu_clock: Clock of CPU time: that of all threads of this process, or `time.thread_time`.
    """
    cuda = device if device is not None and device.type == "cuda" else None
    work(items[0])
    images, rounds, gpu_ms = 0, 0, 0.0
    started, cpu_started = time.perf_counter(), cpu_clock()
    for item in cycle(items):
        if cuda is not None:
            # Blocking events let the thread sleep while it waits: other work of this process counts, waiting does not.
            before, after = (torch.cuda.Event(enable_timing=True, blocking=True) for _ in range(2))
            before.record(torch.cuda.current_stream(cuda))
        work(item)
        if cuda is not None:
            after.record(torch.cuda.current_stream(cuda))
            after.synchronize()
            gpu_ms += before.elapsed_time(after)
        images, rounds = images + count(item), rounds + 1
        seconds = time.perf_counter() - started
        if rounds >= _MIN_ROUNDS and seconds > _STAGE_SECONDS:
            break
    cpu_ms = (cpu_clock() - cpu_started) / images * 1e3
    return StageMeasurement(name, images / seconds, cpu_ms, gpu_ms / images if cuda is not None else None)


def measure_stages(
    worker: BenchWorker, batches: Sequence[Batch], pixels: Sequence[PixelBatch]
) -> list[StageMeasurement]:
    """Measure the stages from fetch to write, each by itself.

    Args:
        worker: Worker whose components are measured.
        batches: Batches of its sample.
        pixels: The full ones among them.

    Raises:
        BatchjobError: If a store, the model or the disk fails.
    """
    moved = [(values.to(worker.engine.device), shapes) for values, shapes in pixels]
    to_device, to_host = _measure_copies(worker, pixels, moved[0])
    fetch, fetched = _measure_fetch(worker, batches)
    prepare = _measure_preparing(worker, fetched)
    return [fetch, *prepare, to_device, _measure_forward(worker, moved), to_host, _measure_write(worker, batches)]


def _measure_fetch(worker: BenchWorker, batches: Sequence[Batch]) -> tuple[StageMeasurement, list[bytes]]:
    """Measure fetching; also return images that the loader has decoded, since others may crash the decoder."""
    fetcher, refs = Fetcher(worker.reader, worker.job.decode.max_bytes), worker.sample_shard.refs
    rows = worker.batch_size
    groups = [group for start in range(0, len(refs), rows) for group in group_refs(refs[start : start + rows])]
    stage = time_stage("fetch", groups, fetcher.fetch, count=len)
    objects = [one for group in groups for one in fetcher.fetch(group)]
    infos = [info for batch in batches for info in batch.image_infos]
    sizes = [len(one.data) for one in objects if isinstance(one, ObjectData)]
    pairs = zip(objects, infos, strict=True)
    good = [one.data for one, info in pairs if isinstance(one, ObjectData) and info.error is None]
    if not good:
        raise InvalidJob("fetch: no image can be read any more, so nothing can be measured; `batchjob run` says why")
    return replace(stage, bytes=sum(sizes) / len(sizes), note="one process, a batch's objects at once"), good


def _measure_preparing(worker: BenchWorker, fetched: Sequence[bytes]) -> list[StageMeasurement]:
    """Measure decode, transform and collate in one thread, as in a loader process."""
    image_transform, fetched = worker.engine.image_transform, fetched[:_MAX_DECODED]
    with _one_thread():
        decoded = [image_transform.decode(data) for data in fetched]
        images = [image_transform.transform(one) for one in decoded][: worker.batch_size]
        stages = [
            time_stage("decode", fetched, image_transform.decode, cpu_clock=time.thread_time),
            time_stage("transform", decoded, image_transform.transform, cpu_clock=time.thread_time),
            time_stage("collate", [images], worker.loader.collate, count=len, cpu_clock=time.thread_time),
        ]
    sizes = (sum(one.pixels.nbytes for one in decoded) / len(decoded), *[float(worker.engine.example_image.nbytes)] * 2)
    return [replace(stage, bytes=size) for stage, size in zip(stages, sizes, strict=True)]


def _measure_forward(worker: BenchWorker, moved: Sequence[PixelBatch]) -> StageMeasurement:
    predictor, device = worker.predictor, worker.engine.device
    on_cpu = device.type == "cpu"
    # Several threads also spend CPU time waiting for each other, and a ceiling must not count that. Compiled code keeps
    # the number of threads that it was compiled for.
    with _one_thread() if on_cpu and predictor.forward.config.compile == "off" else nullcontext():
        stage = time_stage("forward", moved, lambda batch: predictor(*batch).wait(), count=count_images, device=device)
    at_once = f"{worker.parallel_batches} of them at once, " if worker.parallel_batches > 1 else ""
    note = f"batches of {worker.batch_size}, {at_once}post-processing{'' if on_cpu else ' and D2H'} included"
    return replace(stage, images_per_second=_measure_forward_rate(worker, moved), note=note)


def _measure_forward_rate(worker: BenchWorker, batches: Sequence[PixelBatch]) -> float:
    """Measure images/s of batches through the predictor: as many at once as in a run, the next begun in advance."""
    predictor, parallel = worker.predictor, worker.parallel_batches
    predictor(*batches[0]).wait()
    seconds = measure_seconds(lambda: predictor(*batches[0]).wait())
    inputs = list(islice(cycle(batches), parallel * max(_MIN_ROUNDS, int(_STAGE_SECONDS / seconds))))
    started = time.perf_counter()
    if parallel > 1:
        list(parallel_map(lambda one: predictor(*one).wait(), inputs, threads=parallel, prefetch=parallel + 1))
    else:
        # `pairwise` starts each batch before the one before it is waited for, so that a GPU always has work.
        for prediction, _ in pairwise(chain((predictor(*one) for one in inputs), [None])):
            assert prediction is not None
            prediction.wait()
    return sum(map(count_images, inputs)) / (time.perf_counter() - started)


def _measure_copies(
    worker: BenchWorker, batches: Sequence[PixelBatch], moved: PixelBatch
) -> tuple[StageMeasurement, StageMeasurement]:
    """Measure the copies of pixels to the device, and of outputs back."""
    engine, forward, (pixels, shapes) = worker.engine, worker.predictor.forward, moved
    if engine.device.type == "cpu":
        return StageMeasurement("H2D", note=_NO_COPY), StageMeasurement("D2H", note=_NO_COPY)
    transfer, device, images = DeviceTransfer(engine.device), engine.device, len(pixels)
    to_device = time_stage("H2D", batches, lambda one: transfer.to_device(one[0]), count=count_images, device=device)
    size = sum(pixels.nbytes for pixels, _ in batches) / sum(map(count_images, batches))
    to_device = replace(to_device, bytes=size, note="pinned" if batches[0][0].is_pinned() else "not pinned")
    if forward.input_kind == "list" or shapes is not None:
        return to_device, StageMeasurement("D2H", note="not measured apart from forward: images differ in size")
    with forward.disable_gradients():
        tensors = engine.postprocess.on_device(forward(pixels))
    to_host = time_stage("D2H", [tensors], transfer.to_host, count=lambda _: images, device=device)
    size = sum(tensor.nbytes for tensor in tensors.values()) / images
    return to_device, replace(to_host, bytes=size, note="a part of forward")


def _measure_write(worker: BenchWorker, batches: Sequence[Batch]) -> StageMeasurement:
    """Measure columns, Parquet and commit with the worker's own part builder, from predictions made before."""
    predictions = [
        None if batch.pixels is None else worker.predictor(batch.pixels, batch.shapes).wait() for batch in batches
    ]
    rows, sizes = len(worker.sample_shard.refs), list[int]()

    def write_part(_: None) -> None:
        shard = worker.sample_shard
        for batch, prediction in zip(batches, predictions, strict=True):
            is_last = batch is batches[-1]
            worker.part_builder.add(shard, batch, prediction, forward_seconds=0.0, is_last=is_last)
        result = worker.next_result()
        sizes.append((worker.folder / "out" / result.key.part_key).stat().st_size)

    stage = time_stage("write", [None], write_part, count=lambda _: rows)
    return replace(stage, bytes=sizes[-1] / rows, note=f"columns, Parquet and commit, {rows:,} rows a part")


@contextmanager
def _one_thread() -> Iterator[None]:
    """Let torch use one thread within the `with` block."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(threads)


def _skip_decoding(data: bytes) -> PreparedImage:  # noqa: ARG001 - signature of an image transform
    """Return one pixel, whatever the bytes are: a loader with this transform only fetches."""
    return PreparedImage(torch.ones((3, 1, 1), dtype=torch.uint8), 1, 1)


def measure_fetch_rate(worker: BenchWorker) -> float:
    """Measure images/s that all loader processes together fetch if they do nothing else."""
    loader = Loader(
        reader=worker.reader,
        transform=_skip_decoding,
        batch_size=worker.batch_size,
        config=replace(worker.loader.config, pin_memory=False),
        size=None,
        max_bytes=worker.job.decode.max_bytes,
    )
    with closing(loader):
        # The first shard starts the processes and opens their connections; it is not measured.
        list(loader.batches(ShardQueue.of([worker.sample_shard])))
        started = time.perf_counter()
        queue = ShardQueue.of(worker.shards, is_open=lambda: time.perf_counter() < started + _FETCH_SECONDS)
        images = sum(len(batch.image_infos) for batch in loader.batches(queue))
        return images / (time.perf_counter() - started)
