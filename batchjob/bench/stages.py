"""Each stage alone: what it takes of the clock, of the CPU and of the GPU, and what comes out of it."""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, replace
from itertools import cycle, islice
from typing import TYPE_CHECKING, Any

from batchjob.bench.bench_worker import Feed, Rig
from batchjob.bench.forward_loop import paced
from batchjob.bench.results import Stage
from batchjob.errors import ImageFault, InvalidJob
from batchjob.inference.device_transfer import Link
from batchjob.loader.fetch import Fetcher, together
from batchjob.loader.loader import Loader
from batchjob.preprocessing.jpeg import plain_jpeg_size
from batchjob.storage.objects import Blob
from batchjob.types import Batch, ImageFacts, Predicted, Prepared

if TYPE_CHECKING:
    import torch

__all__ = ["Clock", "Unseen", "alone", "disk_bytes_per_second", "fetched_by_all", "on_device", "whole"]

_SECONDS = 3.0  # that a stage is measured at most
_ROUNDS = 3  # at least
_DISK_BYTES = 64 << 20


@dataclass(frozen=True)
class Unseen:
    """In place of decode and geometry: takes an image's bytes and does nothing with them."""

    def __call__(self, data: bytes) -> Prepared:  # noqa: ARG002 - the face of `Prepare`
        import torch

        return Prepared(torch.ones((3, 1, 1), dtype=torch.uint8), 1, 1)


class Clock:
    """Adds up the time of what it is held around.

    Args:
        device: where CUDA events tell the GPU's time too.
        process: count the CPU time of all threads of this process, not of this thread alone.
    """

    def __init__(self, device: torch.device | None = None, *, process: bool = True) -> None:
        self._cuda = device if device is not None and device.type == "cuda" else None
        self._cpu = time.process_time if process else time.thread_time
        self.seconds = self.cpu = self.gpu = 0.0
        self.images = 0

    @contextmanager
    def of(self, images: int) -> Iterator[None]:
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
            self.gpu += before.elapsed_time(after)
        self.seconds += time.perf_counter() - began
        self.cpu += self._cpu() - cpu
        self.images += images

    def stage(self, name: str, size: float | None, note: str = "") -> Stage:
        """What came of it. Raises InvalidJob where nothing was measured."""
        if not self.images or self.seconds <= 0:
            raise InvalidJob(f"{name}: no image came that far, so there is nothing to measure; `batchjob run` says why")
        gpu = self.gpu / self.images if self._cuda is not None else None
        return Stage(name, self.images / self.seconds, self.cpu / self.images * 1e3, gpu, size, note)


def alone(rig: Rig, batches: Sequence[Batch]) -> list[Stage]:
    """Fetch to write, each by itself.

    Args:
        rig: whose parts are measured.
        batches: of its sample.

    Raises:
        InvalidJob: not one image can be read and decoded.
        BatchjobError: a store, the model or the disk fails.
    """
    facts = [fact for batch in batches for fact in batch.facts]
    fetch, blobs = _fetch(rig, facts)
    prepare = [*_prepare(rig, blobs), *_on_device(rig, blobs)]
    return [fetch, *prepare, *_through_the_model(rig, whole(rig, batches)), _write(rig, batches)]


def _fetch(rig: Rig, facts: Sequence[ImageFacts]) -> tuple[Stage, list[Blob]]:
    """The stage, and the images to go on with: those the loader has decoded, for a deadly one would end this process.

    Args:
        rig: whose sample is read.
        facts: what the loader learned of it.
    """
    fetcher = Fetcher(rig.parts.reader, rig.job.decode.max_bytes)
    clock, sizes, known, blobs = Clock(), list[int](), iter(facts), list[Blob]()
    for start in range(0, len(rig.sample.refs), rig.batch_size):
        for refs in together(rig.sample.refs[start : start + rig.batch_size]):
            with clock.of(len(refs)):
                found = fetcher.fetch(refs)
            read = [(one, next(known)) for one in found]
            sizes += [len(one.data) for one, _ in read if isinstance(one, Blob)]
            blobs += [one for one, fact in read if isinstance(one, Blob) and fact.fault is None]
        if clock.seconds > _SECONDS:
            break
    size = sum(sizes) / max(1, len(sizes))
    return clock.stage("fetch", size, "one process, a batch's objects at once"), blobs


def _prepare(rig: Rig, blobs: Sequence[Blob]) -> list[Stage]:
    """Decode, transform and collate, in one thread as in a loader process."""
    decode, transform, collate = (Clock(process=False) for _ in range(3))
    prepare, batch, sizes = rig.parts.engine.prepare, list["torch.Tensor"](), list[int]()
    with _one_thread():
        for blob in blobs:
            with suppress(ImageFault):
                with decode.of(1):
                    decoded = prepare.decoded(blob.data)
                with transform.of(1):
                    batch.append(prepare.transformed(decoded))
                sizes.append(decoded.pixels.nbytes)
            if len(batch) == rig.batch_size:
                _collate(rig, collate, batch)
            if decode.seconds + transform.seconds > 2 * _SECONDS:
                break
        if batch:
            _collate(rig, collate, batch)
    size = float(rig.parts.engine.example.nbytes)
    return [
        decode.stage("decode", sum(sizes) / max(1, len(sizes))),
        transform.stage("transform", size),
        collate.stage("collate", size),
    ]


def _on_device(rig: Rig, blobs: Sequence[Blob]) -> list[Stage]:
    """Decode and transform there, where the job has the device take a share of the images."""
    import torch

    device = rig.parts.on_device
    if device is None:
        return []
    sizes = ((blob.data, plain_jpeg_size(blob.data)) for blob in blobs)
    plain = list(islice(((data, size) for data, size in sizes if size is not None), rig.batch_size))
    files = [torch.frombuffer(bytearray(data), dtype=torch.uint8) for data, _ in plain]
    pixels = [height * width for _, (height, width) in plain]
    if not files or not device.tried(files, pixels):
        return [Stage("device decode", note="not measured: the device takes none of these images")]
    clock = Clock()
    while clock.seconds < _SECONDS / 2:
        with clock.of(len(files)):
            device.tried(files, pixels)
    return [replace(clock.stage("device decode", None, "and transform, for a share of the images"), cpu_ms=None)]


def _collate(rig: Rig, clock: Clock, images: list[torch.Tensor]) -> None:
    with clock.of(len(images)):
        rig.parts.loader.collated(images)
    images.clear()


def _through_the_model(rig: Rig, batches: Sequence[Batch]) -> list[Stage]:
    predictor = rig.parts.predictor
    moved = on_device(rig, batches)
    size = sum(pixels.nbytes for pixels, _ in moved) / sum(_count(batch) for batch in batches)
    forward = _repeated(rig, moved, lambda item: predictor(item[0], item[1].shapes).wait(), lambda item: item[1])
    ends = "post-processing on the device" + (" and D2H" if rig.parts.engine.device.type != "cpu" else "")
    stage = forward.stage("forward", None, f"batches of {rig.batch_size}, {ends} included")
    if (lanes := rig.parts.lanes.count) > 1:
        rate = paced(rig, [(pixels, batch.shapes) for pixels, batch in moved])
        stage = replace(stage, images_per_second=rate, note=f"{lanes} batches of {rig.batch_size} at once")
    elif (least := _least_cpu(rig, moved)) is not None and least < (stage.cpu_ms or 0.0):
        note = f"CPU ms are those of one thread: {stage.cpu_ms:,.1f} in {rig.cores}, which wait for each other"
        stage = replace(stage, cpu_ms=least, note=note)
    return [_copied_there(rig, batches, size), stage, _copied_back(rig, moved)]


def _copied_there(rig: Rig, batches: Sequence[Batch], size: float) -> Stage:
    device = rig.parts.engine.device
    if device.type == "cpu":
        return Stage("H2D", note="nothing to copy: the device is the CPU")
    link = Link(device)
    copied = _repeated(rig, batches, lambda batch: link.there(_pixels(batch)), lambda batch: batch)
    return copied.stage("H2D", size, "pinned" if _pixels(batches[0]).is_pinned() else "not pinned")


def _copied_back(rig: Rig, moved: Sequence[tuple[torch.Tensor, Batch]]) -> Stage:
    forward, post, device = rig.parts.predictor.forward, rig.parts.engine.post, rig.parts.engine.device
    if device.type == "cpu":
        return Stage("D2H", note="nothing to copy: the device is the CPU")
    if forward.takes == "list" or moved[0][1].shapes is not None:
        return Stage("D2H", note="not measured apart from forward: images differ in size")
    link, (pixels, batch) = Link(device), moved[0]
    with forward.modes():
        found = post.on_device(forward(pixels))
    clock = _repeated(rig, [batch], lambda _: link.back(found), lambda batch: batch)
    return clock.stage("D2H", sum(tensor.nbytes for tensor in found.values()) / len(pixels), "a part of forward")


def _least_cpu(rig: Rig, moved: Sequence[tuple[torch.Tensor, Batch]]) -> float | None:
    """CPU ms an image in one thread, which no other waits for: what a ceiling goes by. Compiled code stays as it is."""
    predictor, device = rig.parts.predictor, rig.parts.engine.device
    if device.type != "cpu" or rig.cores == 1 or predictor.forward.recipe.compile != "off":
        return None
    with _one_thread():
        clock = _repeated(rig, moved, lambda item: predictor(item[0], item[1].shapes), lambda item: item[1])
    return clock.cpu / clock.images * 1e3


def _write(rig: Rig, batches: Sequence[Batch]) -> Stage:
    """Rows, Parquet and commit, by the worker's own assembly, of batches that are predicted already."""
    predicted = [_predicted(rig, batch) for batch in batches]
    clock, size = Clock(), 0.0
    while not clock.images or (clock.seconds < _SECONDS / 3 and clock.images < rig.images):
        shard = rig.again(rig.sample)
        with clock.of(shard.key.rows):
            for batch, made in zip(batches, predicted, strict=True):
                rig.parts.assembly.add(shard, batch, made, seconds=0.0, last=batch is batches[-1])
            result = rig.settled()
        size = rig.part_bytes(result) / shard.key.rows
    return clock.stage("write", size, f"columns, Parquet and commit, {shard.key.rows} rows a part")


def _predicted(rig: Rig, batch: Batch) -> Predicted | None:
    return None if batch.pixels is None else rig.parts.predictor(batch.pixels, batch.shapes).wait()


def fetched_by_all(rig: Rig) -> float:
    """Images/s that the loader's processes together fetch when they do nothing else.

    Raises:
        BatchjobError: a store cannot be read.
    """
    given = rig.parts.loader.plan
    loader = Loader(
        reader=rig.parts.reader,
        prepare=Unseen(),
        batch_size=rig.batch_size,
        plan=replace(given, pin_memory=False),
        size=None,
        max_bytes=rig.job.decode.max_bytes,
    )
    try:
        list(loader.batches(Feed([rig.sample])))  # starts the processes and their connections
        began = time.perf_counter()
        shards = [rig.again(shard) for shard in rig.shards]
        images = sum(len(batch.facts) for batch in loader.batches(Feed(shards, began + _SECONDS)))
        return images / (time.perf_counter() - began)
    finally:
        loader.close()


def disk_bytes_per_second(rig: Rig) -> float:
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


def on_device(rig: Rig, batches: Sequence[Batch]) -> list[tuple[torch.Tensor, Batch]]:
    """Their pixels where the model runs."""
    import torch

    device = rig.parts.engine.device
    moved = [(_pixels(batch).to(device), batch) for batch in batches]
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return moved


def whole(rig: Rig, batches: Sequence[Batch]) -> list[Batch]:
    """Those without a gap; where there are none, those with any image. Raises InvalidJob where there are no images."""
    some = [batch for batch in batches if batch.pixels is not None]
    if not some:
        raise InvalidJob(f"none of the first {len(rig.sample.refs)} images can be decoded: nothing can be measured")
    return [batch for batch in some if _count(batch) == rig.batch_size] or some


def _repeated(rig: Rig, items: Sequence[Any], work: Callable[[Any], Any], batch_of: Callable[[Any], Batch]) -> Clock:
    """Work on one after the other, again and again, once before the clock runs."""
    work(items[0])
    clock = Clock(rig.parts.engine.device)
    for rounds, item in enumerate(cycle(items)):
        if rounds >= _ROUNDS and (clock.seconds > _SECONDS / 2 or clock.images >= rig.images):
            break
        with clock.of(_count(batch_of(item))):
            work(item)
    return clock


def _count(batch: Batch) -> int:
    """Images in its pixels."""
    return sum(fact.fault is None for fact in batch.facts)


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
