"""JPEG files that the loader has left to the device, decoded there; what its decoder refuses is the CPU's."""

from __future__ import annotations

import io
import logging
import os
import queue
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass, replace
from functools import partial
from typing import TYPE_CHECKING

from batchjob.concurrency import parallel_map
from batchjob.errors import AttemptFailed, InvalidJob, as_batchjob_error, is_out_of_memory
from batchjob.inference.device_errors import classify_device_error
from batchjob.loader.gpu_share import GpuShareController
from batchjob.loader.loader import Loader
from batchjob.loader.shard_queue import ShardQueue
from batchjob.preprocessing.settings import Preprocess
from batchjob.preprocessing.transforms import ResizeCrop
from batchjob.types import Batch, EncodedImages, Shard, StageTiming, StepMonitor, no_monitor

if TYPE_CHECKING:
    import torch

__all__ = ["GpuDecodingLoader", "JpegDecoder", "check_gpu_decode_supported", "create_jpeg_decoder"]

JpegDecoder = Callable[[Sequence["torch.Tensor"]], Sequence["torch.Tensor"]]
"""JPEG files, uint8 `[bytes]` each, to uint8 `[3, h, w]` on the device; an exception where it cannot do them all."""
_log = logging.getLogger(__name__)
_AT_ONCE = 64 << 20  # pixels that lie decoded on the device, before they are made small
_THREADS = 2  # one batch is decoded while another is resized
_AHEAD = 3
_REFUSALS = 8  # one after the other: then it is not the files


def check_gpu_decode_supported(preprocess: Preprocess, geometry: ResizeCrop, input_kind: str) -> None:
    """Raises InvalidJob where images cannot be prepared on a device as the job wants them."""
    why = None
    if preprocess.transform is not None:
        why = "preprocess.transform gets its images on the CPU"
    elif preprocess.channels == "gray":
        why = "preprocess.channels is gray"
    elif input_kind == "list" or geometry.size is None or preprocess.sizes == "group":
        why = "images come out in different sizes (preprocess.resize and crop)"
    if why is not None:
        raise InvalidJob(
            f"decode.device: cuda makes batches of one size, in colour, but {why}; write decode.device: cpu"
        )


def create_jpeg_decoder(device: torch.device) -> JpegDecoder:
    """The GPU's JPEG decoder (nvJPEG), tried on a small file.

    Raises:
        InvalidJob: the model does not run on CUDA, or this torchvision cannot decode there.
    """
    import torch
    import torchvision

    if device.type != "cuda":
        raise InvalidJob(f"decode.device: cuda, but the model runs on {device}; write decode.device: cpu")

    def decode(files: Sequence[torch.Tensor]) -> Sequence[torch.Tensor]:
        # What `torchvision.io.decode_jpeg` calls for a list, since 0.19, without the warning that it is to go.
        found: list[torch.Tensor] = torch.ops.image.decode_jpegs_cuda(list(files), _rgb(), device)
        return found

    try:
        decode([_small_file()])
    except Exception as error:
        raise InvalidJob(
            f"decode.device: torchvision {torchvision.__version__} cannot decode JPEG on {device} "
            f"({type(error).__name__}: {' '.join(str(error).split())[:200]}); write decode.device: cpu"
        ) from error
    return decode


@dataclass(frozen=True)
class _EncodedFile:
    """An encoded image: its row in the batch, uint8 `[bytes]`, and its size in pixels."""

    row: int
    data: torch.Tensor
    pixels: int


@dataclass(frozen=True)
class _DecodedRows:
    """Prepared images of a batch: their rows, in order, and uint8 `[n, c, h, w]`."""

    rows: tuple[int, ...]
    pixels: torch.Tensor


class GpuDecodingLoader:
    """A loader's batches, with what it left encoded decoded on the device.

    What the decoder refuses is read again and decoded on the CPU, in a loader process as ever. A decoder that refuses
    everything is not asked again.

    Args:
        loader: divides its images by the share.
        host: a loader of the same images that leaves nothing to the device.
        decode: the device's decoder.
        geometry: on the device.
        device: where the batches that held files lie afterwards.
        balance: steers the share.
        step: Wraps each use of the device, so that a decoder that hangs is noticed.
    """

    def __init__(
        self,
        *,
        loader: Loader,
        cpu_loader: Loader,
        decode: JpegDecoder,
        geometry: ResizeCrop,
        device: torch.device,
        share_controller: GpuShareController,
        step: StepMonitor = no_monitor,
    ) -> None:
        self._loader, self._host, self._decode, self._geometry = loader, cpu_loader, decode, geometry
        self._device, self._balance, self._step = device, share_controller, step
        self._lock, self._ending, self._closed = threading.Lock(), threading.Lock(), threading.Event()
        self._streams: queue.SimpleQueue[torch.cuda.Stream] = queue.SimpleQueue()  # that nobody is on
        self.decoded = self.refused = self._in_vain = 0

    def batches(self, queue: ShardQueue) -> Iterator[Batch]:
        """Those of `Loader.batches`, a few of them ahead; raises what that raises."""
        self._host.quarantine = self._loader.quarantine
        given = self._balance.observe(self._loader.batches(queue))
        return parallel_map(partial(self._whole, queue), given, threads=_THREADS, prefetch=_AHEAD)

    def can_decode(self, files: Sequence[torch.Tensor], pixels: Sequence[int]) -> bool:
        """Whether the device decodes and prepares such files, as many at once as in a run; to see how long that takes.

        Args:
            files: uint8 `[bytes]` each.
            pixels: of each image.
        """
        each = [_EncodedFile(*file) for file in zip(range(len(files)), files, pixels, strict=True)]
        return all(self._tried(some) is not None for some in _together(each))

    def close(self) -> None:
        """End what belongs to it alone; a thread that is still at a batch starts nothing any more."""
        self._closed.set()
        if self.decoded or self.refused:
            _log.info("JPEG files decoded on %s: %d, refused there: %d", self._device, self.decoded, self.refused)
        self._end_host()

    def _whole(self, queue: ShardQueue, batch: Batch) -> Batch:
        """The batch with the pixels of all its good images. Raises AttemptFailed."""
        encoded, shard = batch.encoded, queue.find_shard(batch)
        if encoded is None or shard is None:  # nobody will look at a batch of a shard that has failed meanwhile
            return batch
        began = time.perf_counter()
        try:
            whole = self._completed(shard, batch, encoded)
        except Exception as error:
            raise as_batchjob_error(error) from error
        spent = StageTiming("device decode", began, time.perf_counter(), os.getpid(), len(encoded.indices))
        seconds = {**batch.stage_seconds, spent.stage: spent.ended - spent.began}
        return replace(whole, stage_seconds=seconds, timings=(*batch.timings, spent))

    def _completed(self, shard: Shard, batch: Batch, encoded: EncodedImages) -> Batch:
        good = [row for row, facts in enumerate(batch.image_infos) if facts.error is None]
        left = [good[place] for place in encoded.indices]
        sizes = [(batch.image_infos[row].width or 0) * (batch.image_infos[row].height or 0) for row in left]
        parts = self._decoded([_EncodedFile(*file) for file in zip(left, encoded.files(), sizes, strict=True)])
        if batch.pixels is not None:
            parts.append(_DecodedRows(tuple(sorted({*good} - {*left})), batch.pixels))
        facts = dict(enumerate(batch.image_infos))
        refused = sorted({*left} - {row for part in parts for row in part.rows})
        self._count(len(left), len(refused))
        for again in self._again(shard, batch, refused):
            if again.attempt_error is not None:
                return replace(batch, image_infos=(), pixels=None, encoded=None, attempt_error=again.attempt_error)
            rows, refused = refused[: len(again.image_infos)], refused[len(again.image_infos) :]
            facts.update(zip(rows, again.image_infos, strict=True))
            if again.pixels is not None:
                parts.append(_DecodedRows(tuple(row for row in rows if facts[row].error is None), again.pixels))
        return replace(batch, image_infos=tuple(facts.values()), pixels=self._joined(parts), encoded=None)

    # -- on the device -----------------------------------------------------------------------------------------

    def _decoded(self, files: Sequence[_EncodedFile]) -> list[_DecodedRows]:
        """What the device makes of them, as many at once as it has room for; those that it refuses are left out."""
        parts: list[_DecodedRows] = []
        for some in _together(files):
            parts += self._halved(some)
        return parts

    def _halved(self, files: Sequence[_EncodedFile]) -> list[_DecodedRows]:
        """All at once; where that is refused in halves, until those alone are left out that are to blame."""
        part = self._tried(files)
        if part is not None or len(files) == 1:
            return [] if part is None else [part]
        middle = len(files) // 2
        return [*self._halved(files[:middle]), *self._halved(files[middle:])]

    def _tried(self, files: Sequence[_EncodedFile]) -> _DecodedRows | None:
        """None where the decoder, or the device's memory, does not take them. Raises AttemptFailed."""
        try:
            with self._settled():
                decoded = self._decode([file.data for file in files])
                made = self._geometry.resize_on_device(decoded)
        except Exception as error:
            # Asked whether it still works, the device waits for the model too: done for one file, and not for many.
            if classify_device_error(error, self._device if len(files) == 1 else None):
                raise
            _log.debug("%d JPEG files refused on %s: %s", len(files), self._device, error)
            return None
        return _DecodedRows(tuple(file.row for file in files), made)

    def _joined(self, parts: Sequence[_DecodedRows]) -> torch.Tensor | None:
        """In the order of their rows; on the device if it has room."""
        import torch

        if not parts:
            return None
        rows = [row for part in parts for row in part.rows]
        order = torch.tensor(sorted(range(len(rows)), key=rows.__getitem__))
        for device in (self._device, torch.device("cpu")):  # the predictor takes what comes, and halves it if need be
            try:
                with self._settled():
                    pixels = torch.cat([part.pixels.to(device, non_blocking=device.type != "cpu") for part in parts])
                    return pixels[order.to(device, non_blocking=True)]
            except Exception as error:
                if not is_out_of_memory(error) or device.type == "cpu":
                    raise
        return None

    @contextmanager
    def _settled(self) -> Iterator[None]:
        """On a stream that nobody else is on, and all through at the end: what was decoded may be forgotten then."""
        import torch

        if self._device.type != "cuda":
            with self._on_the_clock():
                yield
            return
        try:
            stream = self._streams.get_nowait()  # torch keeps memory aside for each stream it has ever seen
        except queue.Empty:
            stream = torch.cuda.Stream(self._device)
        try:
            with self._on_the_clock(), torch.cuda.stream(stream):
                try:
                    yield
                finally:
                    through = torch.cuda.Event(blocking=True)  # who waits sleeps; the core is for decoding
                    through.record(stream)
                    through.synchronize()
        finally:
            self._streams.put(stream)

    def _on_the_clock(self) -> AbstractContextManager[None]:
        return self._step("JPEG decoding on the device")

    # -- on the CPU --------------------------------------------------------------------------------------------

    def _again(self, shard: Shard, batch: Batch, rows: Sequence[int]) -> list[Batch]:
        """Rows of a batch read and decoded on the CPU, in one batch or several. Raises AttemptFailed once closed."""
        if not rows:
            return []
        refs = tuple(shard.refs[batch.start + row] for row in rows)
        with self._lock:
            if self._closed.is_set():
                raise AttemptFailed("decoding on the device was closed")
            try:
                return list(self._host.batches(ShardQueue.of([replace(shard, refs=refs, decode_on_cpu=True)])))
            finally:
                if self._closed.is_set():  # meanwhile, and maybe before its processes were there
                    self._end_host()

    def _end_host(self) -> None:
        """Not under the lock that loading holds: this is what ends a wait for a batch that never comes."""
        with self._ending:
            self._host.close()

    def _count(self, asked: int, refused: int) -> None:
        with self._lock:
            self.decoded, self.refused = self.decoded + asked - refused, self.refused + refused
            before, self._in_vain = self._in_vain, self._in_vain + refused if refused == asked else 0
        if before < _REFUSALS <= self._in_vain:
            _log.warning(
                "the JPEG decoder of %s refuses one file after the other: the CPU does it all now", self._device
            )
            self._balance.disable()


def _together(files: Sequence[_EncodedFile]) -> Iterator[Sequence[_EncodedFile]]:
    """Runs of files that are decoded at once: as many as there is room for, at least one."""
    start, held = 0, 0
    for index, file in enumerate(files):
        held += file.pixels
        if held > _AT_ONCE and index > start:
            yield files[start:index]
            start, held = index, file.pixels
    if start < len(files):
        yield files[start:]


def _rgb() -> int:
    from torchvision.io import ImageReadMode

    return int(ImageReadMode.RGB.value)


def _small_file() -> torch.Tensor:
    import torch
    from PIL import Image

    out = io.BytesIO()
    Image.new("RGB", (64, 64), (90, 120, 150)).save(out, "JPEG")
    return torch.frombuffer(bytearray(out.getvalue()), dtype=torch.uint8)
