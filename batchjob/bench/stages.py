"""Each stage alone: what it takes of the clock, of the CPU and of the GPU, and what comes out of it."""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, replace
from itertools import cycle, islice
from typing import TYPE_CHECKING, Any

from batchjob.bench.bench_worker import BenchWorker
from batchjob.bench.forward_loop import measure_forward_rate
from batchjob.bench.results import StageMeasurement
from batchjob.errors import ImageError, InvalidJob
from batchjob.inference.device_transfer import DeviceTransfer
from batchjob.loader.fetch import Fetcher, group_refs
from batchjob.loader.loader import Loader
from batchjob.loader.shard_queue import ShardQueue
from batchjob.preprocessing.jpeg import read_baseline_jpeg_size
from batchjob.storage.objects import ObjectData
from batchjob.types import Batch, ImageInfo, Prediction, PreparedImage

if TYPE_CHECKING:
    import torch

__all__ = [
    "NullTransform",
    "StageClock",
    "measure_disk_rate",
    "measure_fetch_rate",
    "measure_stages",
    "move_to_device",
    "select_full_batches",
]

_SECONDS = 3.0  # that a stage is measured at most
_ROUNDS = 3  # at least
_DISK_BYTES = 64 << 20


@dataclass(frozen=True)
class NullTransform:
    """In place of decode and geometry: takes an image's bytes and does nothing with them."""

    def __call__(self, data: bytes) -> PreparedImage:  # noqa: ARG002 - the face of `Prepare`
        import torch

        return PreparedImage(torch.ones((3, 1, 1), dtype=torch.uint8), 1, 1)


class StageClock:
    """Adds up the time of what it is held around.

    Args:
        device: where CUDA events tell the GPU's time too.
        process: count the CPU time of all threads of this process, not of this thread alone.
    """

    def __init__(self, device: torch.device | None = None, *, process: bool = True) -> None:
        self._cuda = device if device is not None and device.type == "cuda" else None
        self._cpu = time.process_time if process else time.thread_time
        self.seconds = self.cpu_seconds = self.gpu_ms = 0.0
        self.images = 0

    @contextmanager
    def measure(self, images: int) -> Iterator[None]:
        """Around work for so many images; on CUDA until the device is through with it."""
        import torch

        if self._cuda is not None:
            before, after = (torch.cuda.Event(enable_timing=True, blocking=True) for _ in range(2))
            before.record(torch.cuda.current_stream(self._cuda))
        began, cpu = time.perf_counter(), self._cpu()
        yield
        if self._cuda is not None:
            after.record(torch.cuda.current_stream(self._cuda))
            after.synchronize()  # asleep: what this process computes meanwhile is counted, and waiting is not to be
            self.gpu_ms += before.elapsed_time(after)
        self.seconds += time.perf_counter() - began
        self.cpu_seconds += self._cpu() - cpu
        self.images += images

    def to_measurement(self, name: str, size: float | None, note: str = "") -> StageMeasurement:
        """What came of it. Raises InvalidJob where nothing was measured."""
        if not self.images or self.seconds <= 0:
            raise InvalidJob(f"{name}: no image came that far, so there is nothing to measure; `batchjob run` says why")
        gpu = self.gpu_ms / self.images if self._cuda is not None else None
        return StageMeasurement(name, self.images / self.seconds, self.cpu_seconds / self.images * 1e3, gpu, size, note)


def measure_stages(rig: BenchWorker, batches: Sequence[Batch]) -> list[StageMeasurement]:
    """Fetch to write, each by itself.

    Args:
        rig: whose parts are measured.
        batches: of its sample.

    Raises:
        InvalidJob: not one image can be read and decoded.
        BatchjobError: a store, the model or the disk fails.
    """
    facts = [fact for batch in batches for fact in batch.image_infos]
    fetch, blobs = _fetch(rig, facts)
    prepare = [*_prepare(rig, blobs), *_on_device(rig, blobs)]
    return [fetch, *prepare, *_through_the_model(rig, select_full_batches(rig, batches)), _write(rig, batches)]


def _fetch(rig: BenchWorker, facts: Sequence[ImageInfo]) -> tuple[StageMeasurement, list[ObjectData]]:
    """The stage, and the images to go on with: those the loader has decoded, for a deadly one would end this process.

    Args:
        rig: whose sample is read.
        facts: what the loader learned of it.
    """
    fetcher = Fetcher(rig.parts.reader, rig.job.decode.max_bytes)
    clock, sizes, known, blobs = StageClock(), list[int](), iter(facts), list[ObjectData]()
    for start in range(0, len(rig.sample_shard.refs), rig.batch_size):
        for refs in group_refs(rig.sample_shard.refs[start : start + rig.batch_size]):
            with clock.measure(len(refs)):
                found = fetcher.fetch(refs)
            read = [(one, next(known)) for one in found]
            sizes += [len(one.data) for one, _ in read if isinstance(one, ObjectData)]
            blobs += [one for one, fact in read if isinstance(one, ObjectData) and fact.error is None]
        if clock.seconds > _SECONDS:
            break
    size = sum(sizes) / max(1, len(sizes))
    return clock.to_measurement("fetch", size, "one process, a batch's objects at once"), blobs


def _prepare(rig: BenchWorker, blobs: Sequence[ObjectData]) -> list[StageMeasurement]:
    """Decode, transform and collate, in one thread as in a loader process."""
    decode, transform, collate = (StageClock(process=False) for _ in range(3))
    prepare, batch, sizes = rig.parts.engine.image_transform, list["torch.Tensor"](), list[int]()
    with _one_thread():
        for blob in blobs:
            with suppress(ImageError):
                with decode.measure(1):
                    decoded = prepare.decode(blob.data)
                with transform.measure(1):
                    batch.append(prepare.transform(decoded))
                sizes.append(decoded.pixels.nbytes)
            if len(batch) == rig.batch_size:
                _collate(rig, collate, batch)
            if decode.seconds + transform.seconds > 2 * _SECONDS:
                break
        if batch:
            _collate(rig, collate, batch)
    size = float(rig.parts.engine.example_image.nbytes)
    return [
        decode.to_measurement("decode", sum(sizes) / max(1, len(sizes))),
        transform.to_measurement("transform", size),
        collate.to_measurement("collate", size),
    ]


def _on_device(rig: BenchWorker, blobs: Sequence[ObjectData]) -> list[StageMeasurement]:
    """Decode and transform there, where the job has the device take a share of the images."""
    import torch

    device = rig.parts.gpu_decoding
    if device is None:
        return []
    sizes = ((blob.data, read_baseline_jpeg_size(blob.data)) for blob in blobs)
    plain = list(islice(((data, size) for data, size in sizes if size is not None), rig.batch_size))
    files = [torch.frombuffer(bytearray(data), dtype=torch.uint8) for data, _ in plain]
    pixels = [height * width for _, (height, width) in plain]
    if not files or not device.can_decode(files, pixels):
        return [StageMeasurement("device decode", note="not measured: the device takes none of these images")]
    clock = StageClock()
    while clock.seconds < _SECONDS / 2:
        with clock.measure(len(files)):
            device.can_decode(files, pixels)
    return [
        replace(clock.to_measurement("device decode", None, "and transform, for a share of the images"), cpu_ms=None)
    ]


def _collate(rig: BenchWorker, clock: StageClock, images: list[torch.Tensor]) -> None:
    with clock.measure(len(images)):
        rig.parts.loader.collate(images)
    images.clear()


def _through_the_model(rig: BenchWorker, batches: Sequence[Batch]) -> list[StageMeasurement]:
    predictor = rig.parts.predictor
    moved = move_to_device(rig, batches)
    size = sum(pixels.nbytes for pixels, _ in moved) / sum(_count(batch) for batch in batches)
    forward = _repeated(rig, moved, lambda item: predictor(item[0], item[1].shapes).wait(), lambda item: item[1])
    ends = "post-processing on the device" + (" and D2H" if rig.parts.engine.device.type != "cpu" else "")
    stage = forward.to_measurement("forward", None, f"batches of {rig.batch_size}, {ends} included")
    if (lanes := rig.parts.cpu_parallelism.parallel_batches) > 1:
        rate = measure_forward_rate(rig, [(pixels, batch.shapes) for pixels, batch in moved])
        stage = replace(stage, images_per_second=rate, note=f"{lanes} batches of {rig.batch_size} at once")
    elif (least := _least_cpu(rig, moved)) is not None and least < (stage.cpu_ms or 0.0):
        note = f"CPU ms are those of one thread: {stage.cpu_ms:,.1f} in {rig.cores}, which wait for each other"
        stage = replace(stage, cpu_ms=least, note=note)
    return [_copied_there(rig, batches, size), stage, _copied_back(rig, moved)]


def _copied_there(rig: BenchWorker, batches: Sequence[Batch], size: float) -> StageMeasurement:
    device = rig.parts.engine.device
    if device.type == "cpu":
        return StageMeasurement("H2D", note="nothing to copy: the device is the CPU")
    link = DeviceTransfer(device)
    copied = _repeated(rig, batches, lambda batch: link.to_device(_pixels(batch)), lambda batch: batch)
    return copied.to_measurement("H2D", size, "pinned" if _pixels(batches[0]).is_pinned() else "not pinned")


def _copied_back(rig: BenchWorker, moved: Sequence[tuple[torch.Tensor, Batch]]) -> StageMeasurement:
    forward, post, device = rig.parts.predictor.forward, rig.parts.engine.postprocess, rig.parts.engine.device
    if device.type == "cpu":
        return StageMeasurement("D2H", note="nothing to copy: the device is the CPU")
    if forward.input_kind == "list" or moved[0][1].shapes is not None:
        return StageMeasurement("D2H", note="not measured apart from forward: images differ in size")
    link, (pixels, batch) = DeviceTransfer(device), moved[0]
    with forward.disable_gradients():
        found = post.on_device(forward(pixels))
    clock = _repeated(rig, [batch], lambda _: link.to_host(found), lambda batch: batch)
    return clock.to_measurement(
        "D2H", sum(tensor.nbytes for tensor in found.values()) / len(pixels), "a part of forward"
    )


def _least_cpu(rig: BenchWorker, moved: Sequence[tuple[torch.Tensor, Batch]]) -> float | None:
    """CPU ms an image in one thread, which no other waits for: what a ceiling goes by. Compiled code stays as it is."""
    predictor, device = rig.parts.predictor, rig.parts.engine.device
    if device.type != "cpu" or rig.cores == 1 or predictor.forward.config.compile != "off":
        return None
    with _one_thread():
        clock = _repeated(rig, moved, lambda item: predictor(item[0], item[1].shapes), lambda item: item[1])
    return clock.cpu_seconds / clock.images * 1e3


def _write(rig: BenchWorker, batches: Sequence[Batch]) -> StageMeasurement:
    """Rows, Parquet and commit, by the worker's own assembly, of batches that are predicted already."""
    predicted = [_predicted(rig, batch) for batch in batches]
    clock, size = StageClock(), 0.0
    while not clock.images or (clock.seconds < _SECONDS / 3 and clock.images < rig.images):
        shard = rig.clone_shard(rig.sample_shard)
        with clock.measure(shard.key.rows):
            for batch, made in zip(batches, predicted, strict=True):
                rig.parts.part_builder.add(shard, batch, made, forward_seconds=0.0, is_last=batch is batches[-1])
            result = rig.next_result()
        size = rig.part_bytes(result) / shard.key.rows
    return clock.to_measurement("write", size, f"columns, Parquet and commit, {shard.key.rows} rows a part")


def _predicted(rig: BenchWorker, batch: Batch) -> Prediction | None:
    return None if batch.pixels is None else rig.parts.predictor(batch.pixels, batch.shapes).wait()


def measure_fetch_rate(rig: BenchWorker) -> float:
    """Images/s that the loader's processes together fetch when they do nothing else.

    Raises:
        BatchjobError: a store cannot be read.
    """
    given = rig.parts.loader.config
    loader = Loader(
        reader=rig.parts.reader,
        transform=NullTransform(),
        batch_size=rig.batch_size,
        config=replace(given, pin_memory=False),
        size=None,
        max_bytes=rig.job.decode.max_bytes,
    )
    try:
        list(loader.batches(ShardQueue.of([rig.sample_shard])))  # starts the processes and their connections
        began = time.perf_counter()
        shards = [rig.clone_shard(shard) for shard in rig.shards]
        queue = ShardQueue.of(shards, is_open=lambda: time.perf_counter() < began + _SECONDS)
        images = sum(len(batch.image_infos) for batch in loader.batches(queue))
        return images / (time.perf_counter() - began)
    finally:
        loader.close()


def measure_disk_rate(rig: BenchWorker) -> float:
    """What the folder of temporary files takes, fsync included."""
    path, noise = rig.folder / "noise", os.urandom(_DISK_BYTES)
    try:
        began = time.perf_counter()
        with path.open("wb") as file:
            file.write(noise)
            file.flush()
            os.fsync(file.fileno())
        return _DISK_BYTES / (time.perf_counter() - began)
    finally:
        path.unlink(missing_ok=True)


def move_to_device(rig: BenchWorker, batches: Sequence[Batch]) -> list[tuple[torch.Tensor, Batch]]:
    """Their pixels where the model runs."""
    import torch

    device = rig.parts.engine.device
    moved = [(_pixels(batch).to(device), batch) for batch in batches]
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return moved


def select_full_batches(rig: BenchWorker, batches: Sequence[Batch]) -> list[Batch]:
    """Those without a gap; where there are none, those with any image. Raises InvalidJob where there are no images."""
    some = [batch for batch in batches if batch.pixels is not None]
    if not some:
        raise InvalidJob(
            f"none of the first {len(rig.sample_shard.refs)} images can be decoded: nothing can be measured"
        )
    return [batch for batch in some if _count(batch) == rig.batch_size] or some


def _repeated(
    rig: BenchWorker, items: Sequence[Any], work: Callable[[Any], Any], batch_of: Callable[[Any], Batch]
) -> StageClock:
    """Work on one after the other, again and again, once before the clock runs."""
    work(items[0])
    clock = StageClock(rig.parts.engine.device)
    for rounds, item in enumerate(cycle(items)):
        if rounds >= _ROUNDS and (clock.seconds > _SECONDS / 2 or clock.images >= rig.images):
            break
        with clock.measure(_count(batch_of(item))):
            work(item)
    return clock


def _count(batch: Batch) -> int:
    """Images in its pixels."""
    return sum(fact.error is None for fact in batch.image_infos)


def _pixels(batch: Batch) -> torch.Tensor:
    assert batch.pixels is not None
    return batch.pixels


@contextmanager
def _one_thread() -> Iterator[None]:
    import torch

    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(before)
