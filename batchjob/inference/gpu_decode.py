"""JPEG decoding on the GPU for its share of the images; files that it refuses are decoded on the CPU."""

from __future__ import annotations

import io
import logging
import os
import queue
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import partial

import torch
from PIL import Image

from batchjob.concurrency import parallel_map
from batchjob.errors import AttemptFailed, InvalidJob, as_batchjob_error, is_out_of_memory
from batchjob.inference.device_errors import classify_device_error
from batchjob.loader.gpu_share import GpuShareController
from batchjob.loader.loader import Loader
from batchjob.loader.shard_queue import ShardQueue
from batchjob.preprocessing.settings import Preprocess
from batchjob.preprocessing.transforms import ResizeCrop
from batchjob.types import Batch, EncodedImages, Shard, StageTiming, StepMonitor, no_monitor

__all__ = ["GpuDecodingLoader", "JpegDecoder", "check_gpu_decode_supported", "create_jpeg_decoder"]

JpegDecoder = Callable[[Sequence[torch.Tensor]], Sequence[torch.Tensor]]
"""Function from JPEG files, uint8 `[bytes]` each, to images on the device, uint8 `[3, h, w]` each.

It raises if it cannot decode all of them.
"""

_log = logging.getLogger(__name__)

# Decoded pixels that may lie on the device at once, before they are resized.
_MAX_DECODED_PIXELS = 64 << 20
# While one batch is decoded, another one is resized.
_THREADS = 2
_BATCHES_AHEAD = 3
# Refused files in a row after which the decoder itself is taken to be the cause.
_MAX_REFUSALS = 8
# Name of the step in the message on a worker that has stalled.
_STEP = "JPEG decoding on the device"


def check_gpu_decode_supported(preprocess: Preprocess, geometry: ResizeCrop, input_kind: str) -> None:
    """Raise InvalidJob if the job's preprocessing cannot be done on a device."""
    reason = None
    if preprocess.transform is not None:
        reason = "preprocess.transform gets its images on the CPU"
    elif preprocess.channels == "gray":
        reason = "preprocess.channels is gray"
    elif input_kind == "list" or geometry.size is None or preprocess.sizes == "group":
        reason = "images come out in different sizes (preprocess.resize and crop)"
    if reason is not None:
        raise InvalidJob(
            f"decode.device: cuda makes batches of one size, in colour, but {reason}; write decode.device: cpu"
        )


def create_jpeg_decoder(device: torch.device) -> JpegDecoder:
    """Return the GPU's JPEG decoder (nvJPEG) after a trial on a small file.

    Raises:
        InvalidJob: The model does not run on CUDA, or this torchvision cannot decode on the device.
    """
    # Imported after the engine has done so by `import_torchvision`, which takes a second less.
    import torchvision

    if device.type != "cuda":
        raise InvalidJob(f"decode.device: cuda, but the model runs on {device}; write decode.device: cpu")
    rgb = int(torchvision.io.ImageReadMode.RGB.value)

    def decode(files: Sequence[torch.Tensor]) -> Sequence[torch.Tensor]:
        # `torchvision.io.decode_jpeg` calls this for a list since 0.19, but warns that it will be removed.
        images: list[torch.Tensor] = torch.ops.image.decode_jpegs_cuda(list(files), rgb, device)
        return images

    try:
        decode([_encode_small_jpeg()])
    except Exception as error:
        raise InvalidJob(
            f"decode.device: torchvision {torchvision.__version__} cannot decode JPEG on {device} "
            f"({type(error).__name__}: {' '.join(str(error).split())[:200]}); write decode.device: cpu"
        ) from error
    return decode


@dataclass(frozen=True)
class _EncodedFile:
    """An encoded image.

    Attributes:
        row: Row in the batch.
        data: The file, uint8 `[bytes]`.
        pixels: Width times height.
    """

    row: int
    data: torch.Tensor
    pixels: int


@dataclass(frozen=True)
class _DecodedRows:
    """Prepared images of a batch.

    Attributes:
        rows: Rows of the batch, in order.
        pixels: Their pixels, uint8 `[n, c, h, w]`.
    """

    rows: tuple[int, ...]
    pixels: torch.Tensor


class GpuDecodingLoader:
    """Batches of a loader, completed on the GPU with the images that the loader left encoded.

    A file that the GPU refuses is read again and decoded on the CPU, by a loader process. If the GPU refuses one file
    after the other, it gets no more of them.

    Example: of a batch of 8 images the loader has decoded 5 and left rows 1, 4 and 6 encoded. The GPU decodes and
    resizes 1 and 6 and refuses 4, which the CPU loader decodes; the batch is put together in the order of its rows.

    Args:
        loader: Loader that leaves a share of its images encoded.
        cpu_loader: Loader of the same images that decodes all of them.
        decode: Decoder of the device.
        geometry: Resize and crop, which run on the device.
        device: Device on which images are decoded, and on which completed batches lie.
        share_controller: Adjusts the share of images that are left encoded.
        step: Wraps each use of the device, so that a decoder that hangs is noticed.

    Attributes:
        decoded: Files decoded on the device so far.
        refused: Files refused by the device so far.
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
        self._loader, self._cpu_loader, self._decode, self._geometry = loader, cpu_loader, decode, geometry
        self._device, self._share_controller, self._step = device, share_controller, step
        self._lock, self._close_lock, self._closed = threading.Lock(), threading.Lock(), threading.Event()
        # Streams that no thread uses now: torch keeps memory reserved for each stream it has ever used.
        self._idle_streams: queue.SimpleQueue[torch.cuda.Stream] = queue.SimpleQueue()
        self.decoded = self.refused = self._refused_in_a_row = 0

    def batches(self, queue: ShardQueue) -> Iterator[Batch]:
        """Yield the batches of the loader, completed, a few of them ahead of their use; raises the loader's errors."""
        self._cpu_loader.quarantine = self._loader.quarantine
        batches = self._share_controller.observe(self._loader.batches(queue))
        return parallel_map(partial(self._complete, queue), batches, threads=_THREADS, prefetch=_BATCHES_AHEAD)

    def can_decode(self, files: Sequence[torch.Tensor], pixels: Sequence[int]) -> bool:
        """Return True if the device decodes and resizes these files, in the groups of a run. Used to measure its speed.

        Args:
            files: Encoded files, uint8 `[bytes]` each.
            pixels: Width times height of each image.
        """
        encoded = [_EncodedFile(*file) for file in zip(range(len(files)), files, pixels, strict=True)]
        return all(self._try_decode(group) is not None for group in _group_by_pixels(encoded))

    def close(self) -> None:
        """Stop the CPU loader; a thread that still works on a batch starts nothing more."""
        self._closed.set()
        if self.decoded or self.refused:
            _log.info("JPEG files decoded on %s: %d, refused there: %d", self._device, self.decoded, self.refused)
        self._close_cpu_loader()

    # -- one batch ---------------------------------------------------------------------------------------------

    def _complete(self, queue: ShardQueue, batch: Batch) -> Batch:
        """Return the batch with the pixels of all its good images. Raises AttemptFailed."""
        encoded, shard = batch.encoded, queue.find_shard(batch)
        # The batch of a shard that has failed in the meantime is not used.
        if encoded is None or shard is None:
            return batch
        started = time.perf_counter()
        try:
            complete = self._decode_encoded(shard, batch, encoded)
        except Exception as error:
            raise as_batchjob_error(error) from error
        timing = StageTiming("device decode", started, time.perf_counter(), os.getpid(), len(encoded.indices))
        seconds = {**batch.stage_seconds, timing.stage: timing.seconds}
        return replace(complete, stage_seconds=seconds, timings=(*batch.timings, timing))

    def _decode_encoded(self, shard: Shard, batch: Batch, encoded: EncodedImages) -> Batch:
        good_rows = [row for row, info in enumerate(batch.image_infos) if info.error is None]
        encoded_rows = [good_rows[index] for index in encoded.indices]
        sizes = [(batch.image_infos[row].width or 0) * (batch.image_infos[row].height or 0) for row in encoded_rows]
        files = [_EncodedFile(*file) for file in zip(encoded_rows, encoded.files(), sizes, strict=True)]
        parts = [part for group in _group_by_pixels(files) for part in self._decode_group(group)]
        if batch.pixels is not None:
            parts.append(_DecodedRows(tuple(sorted({*good_rows} - {*encoded_rows})), batch.pixels))
        infos = dict(enumerate(batch.image_infos))
        refused = sorted({*encoded_rows} - {row for part in parts for row in part.rows})
        self._count(len(encoded_rows), len(refused))
        for reloaded in self._reload_on_cpu(shard, batch, refused):
            if reloaded.attempt_error is not None:
                return replace(batch, image_infos=(), pixels=None, encoded=None, attempt_error=reloaded.attempt_error)
            rows, refused = refused[: len(reloaded.image_infos)], refused[len(reloaded.image_infos) :]
            infos.update(zip(rows, reloaded.image_infos, strict=True))
            if reloaded.pixels is not None:
                parts.append(_DecodedRows(tuple(row for row in rows if infos[row].error is None), reloaded.pixels))
        return replace(batch, image_infos=tuple(infos.values()), pixels=self._join(parts), encoded=None)

    def _count(self, encoded: int, refused: int) -> None:
        with self._lock:
            self.decoded, self.refused = self.decoded + encoded - refused, self.refused + refused
            before = self._refused_in_a_row
            self._refused_in_a_row = before + refused if refused == encoded else 0
        if before < _MAX_REFUSALS <= self._refused_in_a_row:
            _log.warning(
                "the JPEG decoder of %s refuses one file after the other: the CPU does it all now", self._device
            )
            self._share_controller.disable()

    # -- on the device -----------------------------------------------------------------------------------------

    def _decode_group(self, files: Sequence[_EncodedFile]) -> list[_DecodedRows]:
        """Decode files together; if they are refused, in halves, until only the refused ones are left out.

        Example: if the third of four files is refused, the calls are `[0, 1, 2, 3]`, `[0, 1]`, `[2, 3]`, `[2]`, `[3]`.
        """
        part = self._try_decode(files)
        if part is not None or len(files) == 1:
            return [] if part is None else [part]
        middle = len(files) // 2
        return [*self._decode_group(files[:middle]), *self._decode_group(files[middle:])]

    def _try_decode(self, files: Sequence[_EncodedFile]) -> _DecodedRows | None:
        """Decode and resize files together; return None if the decoder or the device's memory refuses them."""
        try:
            with self._synchronized_stream():
                images = self._decode([file.data for file in files])
                pixels = self._geometry.resize_on_device(images)
        except Exception as error:
            # A probe of the device waits for the model too, so it is done for a single file only.
            if classify_device_error(error, self._device if len(files) == 1 else None):
                raise
            _log.debug("%d JPEG files refused on %s: %s", len(files), self._device, error)
            return None
        return _DecodedRows(tuple(file.row for file in files), pixels)

    def _join(self, parts: Sequence[_DecodedRows]) -> torch.Tensor | None:
        """Concatenate parts in the order of their rows; on the CPU if the device has no room for the whole batch.

        Example: parts with the rows `(1, 6)` and `(0, 4)` are concatenated as 1, 6, 0, 4 and reordered by the indices
        `[2, 0, 3, 1]` to 0, 1, 4, 6.
        """
        if not parts:
            return None
        rows = [row for part in parts for row in part.rows]
        order = torch.tensor(sorted(range(len(rows)), key=rows.__getitem__))
        # The predictor accepts batches on either device, and halves one that does not fit.
        for device in (self._device, torch.device("cpu")):
            try:
                with self._synchronized_stream():
                    pixels = torch.cat([part.pixels.to(device, non_blocking=device.type != "cpu") for part in parts])
                    return pixels[order.to(device, non_blocking=True)]
            except Exception as error:
                if not is_out_of_memory(error) or device.type == "cpu":
                    raise
        return None

    @contextmanager
    def _synchronized_stream(self) -> Iterator[None]:
        """Run on a stream that no other thread uses, and wait for it at the end, so that inputs may be freed."""
        if self._device.type != "cuda":
            with self._step(_STEP):
                yield
            return
        try:
            stream = self._idle_streams.get_nowait()
        except queue.Empty:
            stream = torch.cuda.Stream(self._device)
        try:
            with self._step(_STEP), torch.cuda.stream(stream):
                try:
                    yield
                finally:
                    # A blocking event lets this thread sleep: the core is needed for decoding.
                    event = torch.cuda.Event(blocking=True)
                    event.record(stream)
                    event.synchronize()
        finally:
            self._idle_streams.put(stream)

    # -- on the CPU --------------------------------------------------------------------------------------------

    def _reload_on_cpu(self, shard: Shard, batch: Batch, rows: Sequence[int]) -> list[Batch]:
        """Read and decode rows of a batch on the CPU, as one or more batches. Raises AttemptFailed once closed."""
        if not rows:
            return []
        refs = tuple(shard.refs[batch.start + row] for row in rows)
        with self._lock:
            if self._closed.is_set():
                raise AttemptFailed("decoding on the device was closed")
            try:
                return list(self._cpu_loader.batches(ShardQueue.of([replace(shard, refs=refs, decode_on_cpu=True)])))
            finally:
                # Closed in the meantime, maybe before the processes had been started.
                if self._closed.is_set():
                    self._close_cpu_loader()

    def _close_cpu_loader(self) -> None:
        """Close the CPU loader without the lock that loading holds: closing ends a wait for a batch."""
        with self._close_lock:
            self._cpu_loader.close()


def _group_by_pixels(files: Sequence[_EncodedFile]) -> Iterator[Sequence[_EncodedFile]]:
    """Yield groups of consecutive files that fit on the device together; a file that is too large comes alone.

    Example: with a limit of 10, files of 4, 5, 3 and 12 pixels come as `[4, 5]`, `[3]` and `[12]`.
    """
    start, total = 0, 0
    for index, file in enumerate(files):
        total += file.pixels
        if total > _MAX_DECODED_PIXELS and index > start:
            yield files[start:index]
            start, total = index, file.pixels
    if start < len(files):
        yield files[start:]


def _encode_small_jpeg() -> torch.Tensor:
    out = io.BytesIO()
    Image.new("RGB", (64, 64), (90, 120, 150)).save(out, "JPEG")
    return torch.frombuffer(bytearray(out.getvalue()), dtype=torch.uint8)
