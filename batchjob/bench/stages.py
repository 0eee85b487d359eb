"""Each stage alone: its wall-clock, CPU and GPU time per image, and the bytes that it puts out."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import replace
from itertools import cycle
from typing import Any

import torch

from batchjob.bench.bench_worker import BenchWorker
from batchjob.bench.forward_loop import measure_forward_rate
from batchjob.bench.results import StageMeasurement
from batchjob.bench.sample_batches import count_good_images, move_to_device, require_pixels, select_full_batches
from batchjob.bench.stage_clock import StageClock
from batchjob.errors import ImageError
from batchjob.inference.device_transfer import DeviceTransfer
from batchjob.loader.fetch import Fetcher, group_refs
from batchjob.storage.objects import ObjectData
from batchjob.types import Batch, ImageInfo

__all__ = ["measure_stages"]

_MAX_SECONDS = 3.0  # per stage
_MIN_ROUNDS = 3


def measure_stages(worker: BenchWorker, batches: Sequence[Batch]) -> list[StageMeasurement]:
    """Measure the stages from fetch to write, each by itself.

    Args:
        worker: Worker whose components are measured.
        batches: Batches of its sample.

    Raises:
        InvalidJob: If no image can be read and decoded.
        BatchjobError: If a store, the model or the disk fails.
    """
    infos = [info for batch in batches for info in batch.image_infos]
    fetch, objects = _measure_fetch(worker, infos)
    preparing = _measure_preparing(worker, objects)
    full = select_full_batches(worker, batches)
    moved = move_to_device(worker, full)
    model = [_measure_h2d(worker, full), _measure_forward(worker, moved), _measure_d2h(worker, moved)]
    return [fetch, *preparing, *model, _measure_write(worker, batches)]


def _measure_fetch(worker: BenchWorker, infos: Sequence[ImageInfo]) -> tuple[StageMeasurement, list[ObjectData]]:
    """Measure fetching, and return the images for the next stages.

    These are the images that the loader has decoded: one that crashes the decoder would end this process.

    Args:
        worker: Worker whose sample is fetched.
        infos: Results of the loader for the images of the sample.
    """
    fetcher = Fetcher(worker.reader, worker.job.decode.max_bytes)
    refs, remaining_infos = worker.sample_shard.refs, iter(infos)
    clock, sizes, objects = StageClock(), list[int](), list[ObjectData]()
    for start in range(0, len(refs), worker.batch_size):
        for group in group_refs(refs[start : start + worker.batch_size]):
            with clock.measure(len(group)):
                results = fetcher.fetch(group)
            for result in results:
                info = next(remaining_infos)
                if isinstance(result, ObjectData):
                    sizes.append(len(result.data))
                    if info.error is None:
                        objects.append(result)
        if clock.seconds > _MAX_SECONDS:
            break
    size = sum(sizes) / max(1, len(sizes))
    return clock.to_measurement("fetch", size, "one process, a batch's objects at once"), objects


def _measure_preparing(worker: BenchWorker, objects: Sequence[ObjectData]) -> list[StageMeasurement]:
    """Measure decode, transform and collate in one thread, as in a loader process."""
    decode, transform, collate = (StageClock(process=False) for _ in range(3))
    engine, images, sizes = worker.engine, list[torch.Tensor](), list[int]()
    with _limit_threads():
        for item in objects:
            with suppress(ImageError):
                with decode.measure(1):
                    decoded = engine.image_transform.decode(item.data)
                with transform.measure(1):
                    images.append(engine.image_transform.transform(decoded))
                sizes.append(decoded.pixels.nbytes)
            if len(images) == worker.batch_size:
                _measure_collate(worker, collate, images)
            if decode.seconds + transform.seconds > 2 * _MAX_SECONDS:
                break
        if images:
            _measure_collate(worker, collate, images)
    size = float(engine.example_image.nbytes)
    return [
        decode.to_measurement("decode", sum(sizes) / max(1, len(sizes))),
        transform.to_measurement("transform", size),
        collate.to_measurement("collate", size),
    ]


def _measure_collate(worker: BenchWorker, clock: StageClock, images: list[torch.Tensor]) -> None:
    with clock.measure(len(images)):
        worker.loader.collate(images)
    images.clear()


def _measure_h2d(worker: BenchWorker, batches: Sequence[Batch]) -> StageMeasurement:
    device = worker.engine.device
    if device.type == "cpu":
        return StageMeasurement("H2D", note="nothing to copy: the device is the CPU")
    transfer = DeviceTransfer(device)
    clock = _measure_repeated(
        worker, batches, lambda batch: transfer.to_device(require_pixels(batch)), lambda batch: batch
    )
    size = sum(require_pixels(batch).nbytes for batch in batches) / sum(map(count_good_images, batches))
    return clock.to_measurement("H2D", size, "pinned" if require_pixels(batches[0]).is_pinned() else "not pinned")


def _measure_forward(worker: BenchWorker, moved: Sequence[tuple[torch.Tensor, Batch]]) -> StageMeasurement:
    predictor, batch_size = worker.predictor, worker.batch_size
    clock = _measure_repeated(
        worker, moved, lambda item: predictor(item[0], item[1].shapes).wait(), lambda item: item[1]
    )
    on_cpu = worker.engine.device.type == "cpu"
    end = "post-processing on the device" if on_cpu else "post-processing on the device and D2H"
    stage = clock.to_measurement("forward", None, f"batches of {batch_size}, {end} included")
    if (parallel := worker.cpu_parallelism.parallel_batches) > 1:
        rate = measure_forward_rate(worker, [(pixels, batch.shapes) for pixels, batch in moved])
        return replace(stage, images_per_second=rate, note=f"{parallel} batches of {batch_size} at once")
    single_thread_ms = _measure_single_thread_cpu(worker, moved)
    if single_thread_ms is not None and single_thread_ms < (stage.cpu_ms or 0.0):
        note = f"CPU ms are those of one thread: {stage.cpu_ms:,.1f} in {worker.cores}, which wait for each other"
        return replace(stage, cpu_ms=single_thread_ms, note=note)
    return stage


def _measure_d2h(worker: BenchWorker, moved: Sequence[tuple[torch.Tensor, Batch]]) -> StageMeasurement:
    engine, forward = worker.engine, worker.predictor.forward
    if engine.device.type == "cpu":
        return StageMeasurement("D2H", note="nothing to copy: the device is the CPU")
    if forward.input_kind == "list" or moved[0][1].shapes is not None:
        return StageMeasurement("D2H", note="not measured apart from forward: images differ in size")
    transfer, (pixels, batch) = DeviceTransfer(engine.device), moved[0]
    with forward.disable_gradients():
        tensors = engine.postprocess.on_device(forward(pixels))
    clock = _measure_repeated(worker, [batch], lambda _: transfer.to_host(tensors), lambda batch: batch)
    size = sum(tensor.nbytes for tensor in tensors.values()) / len(pixels)
    return clock.to_measurement("D2H", size, "a part of forward")


def _measure_single_thread_cpu(worker: BenchWorker, moved: Sequence[tuple[torch.Tensor, Batch]]) -> float | None:
    """Measure CPU milliseconds per image of the forward pass in one thread; None where it says nothing new.

    Several threads also spend CPU time waiting for each other, and a ceiling must not count that. Compiled code is left
    out, because it is compiled for a number of threads.
    """
    predictor, device = worker.predictor, worker.engine.device
    if device.type != "cpu" or worker.cores == 1 or predictor.forward.config.compile != "off":
        return None
    with _limit_threads():
        clock = _measure_repeated(worker, moved, lambda item: predictor(item[0], item[1].shapes), lambda item: item[1])
    return clock.cpu_seconds / clock.images * 1e3


def _measure_write(worker: BenchWorker, batches: Sequence[Batch]) -> StageMeasurement:
    """Measure columns, Parquet and commit with the worker's own part builder, from predictions made before."""
    predictions = [
        None if batch.pixels is None else worker.predictor(batch.pixels, batch.shapes).wait() for batch in batches
    ]
    clock, size, part_builder = StageClock(), 0.0, worker.part_builder
    while not clock.images or (clock.seconds < _MAX_SECONDS / 3 and clock.images < worker.images):
        shard = worker.clone_shard(worker.sample_shard)
        with clock.measure(shard.key.rows):
            for batch, prediction in zip(batches, predictions, strict=True):
                part_builder.add(shard, batch, prediction, forward_seconds=0.0, is_last=batch is batches[-1])
            result = worker.next_result()
        size = worker.part_bytes(result) / shard.key.rows
    return clock.to_measurement("write", size, f"columns, Parquet and commit, {shard.key.rows} rows a part")


def _measure_repeated(
    worker: BenchWorker, items: Sequence[Any], work: Callable[[Any], Any], batch_of: Callable[[Any], Batch]
) -> StageClock:
    """Measure work on one item after another, over and over; the first call warms up and is not measured.

    Args:
        worker: Worker whose device and number of images are used.
        items: Items to work on, at least one.
        work: Work on an item.
        batch_of: Returns the batch of an item, to count its images.
    """
    work(items[0])
    clock = StageClock(worker.engine.device)
    for count, item in enumerate(cycle(items)):
        if count >= _MIN_ROUNDS and (clock.seconds > _MAX_SECONDS / 2 or clock.images >= worker.images):
            break
        with clock.measure(count_good_images(batch_of(item))):
            work(item)
    return clock


@contextmanager
def _limit_threads() -> Iterator[None]:
    """Let torch use one thread within the `with` block."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(threads)
