"""Dataset of torch's DataLoader: fetch, decode, transform, collate of a batch. A bad image keeps its row."""

from __future__ import annotations

import contextlib
import os
import signal
import time
from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Protocol

from torch.utils.data import Dataset, get_worker_info

from batchjob.errors import AttemptFailed, BatchjobError, ImageError, Unavailable, is_out_of_memory
from batchjob.loader.collate import RaggedBatch, StackedBatch
from batchjob.loader.fetch import Fetcher, check_file_size, group_refs
from batchjob.loader.worker_context import get_progress
from batchjob.loader.worker_limits import SkippedRequests, WorkerCallback, WorkerProgress, limit_process
from batchjob.loader.worker_process import OUT_OF_MEMORY_CODE
from batchjob.storage.objects import ObjectData
from batchjob.types import Batch, ErrorRecord, ImageInfo, ImageRef, PreparedImage, StageTiming

__all__ = [
    "BatchRequest",
    "ImageDataset",
    "IsolatedDataset",
    "LoadCallback",
    "LoadResult",
    "LoadedBatch",
    "NumberedRequest",
    "TransformFn",
    "load_or_fail",
    "start_worker",
]

LoadResult = Batch | BatchjobError

TransformFn = Callable[[bytes], PreparedImage]
"""Function from an encoded image to its tensor. Raises ImageError."""


@dataclass(frozen=True)
class BatchRequest:
    """Request for one batch.

    Attributes:
        shard_index: Index of the shard.
        attempt_number: Number of the attempt at the shard.
        start: Offset of the first row within the shard.
        refs: Images of the batch.
        known_errors: Rows that are not loaded, and the errors known of them.
    """

    shard_index: int
    attempt_number: int
    start: int
    refs: tuple[ImageRef, ...]
    known_errors: Mapping[int, ImageInfo] = field(default_factory=dict)

    def with_known_error(self, row: int, info: ImageInfo) -> BatchRequest:
        """Return the request with one row that is not loaded any more."""
        return replace(self, known_errors={**self.known_errors, row: info})

    def select_rows(self, rows: range) -> BatchRequest:
        """Return a request for some of the rows.

        Example: of a request with `start` 64, rows 16 to 31 are a request with `start` 80; row 20 becomes row 4.
        """
        known_errors = {row - rows.start: info for row, info in self.known_errors.items() if row in rows}
        return replace(
            self, start=self.start + rows.start, refs=self.refs[rows.start : rows.stop], known_errors=known_errors
        )

    def split(self) -> tuple[BatchRequest, BatchRequest]:
        """Return two requests with half of the rows each."""
        middle, end = len(self.refs) // 2, len(self.refs)
        return self.select_rows(range(middle)), self.select_rows(range(middle, end))


class LoadCallback(Protocol):
    """Callback for the steps of `ImageDataset.load_batch`.

    Example: a batch of two images calls `on_fetch()` when it begins, `on_fetch()` as each object arrives,
    `on_image(0, etag)`, `on_image(1, etag)`, and `on_send()`.
    """

    def on_fetch(self) -> None:
        """Handle the start of a fetch, or the arrival of an object; called from any thread."""

    def on_image(self, row: int, etag: str | None) -> None:
        """Handle the start of decoding the image of this row."""

    def on_send(self) -> None:
        """Handle the end of the last image."""


class _NoOpCallback:
    def on_fetch(self) -> None: ...

    def on_send(self) -> None: ...

    def on_image(self, row: int, etag: str | None) -> None: ...


@dataclass(frozen=True)
class ImageDataset:
    """Dataset of images by request. Picklable: each loader process has a copy.

    Attributes:
        fetcher: Reader of encoded images.
        transform: Decode, resize and crop of one image.
        size: Last dimensions that every prepared image must have; None takes those of each batch's first good image.
        variable_size: True if images may differ in size; `size` is then ignored.
    """

    fetcher: Fetcher
    transform: TransformFn
    size: tuple[int, ...] | None
    variable_size: bool

    def make_collator(self, rows: int, shared: bool = False) -> StackedBatch | RaggedBatch:
        """Make an empty batch for so many prepared images, in shared memory if it travels to another process."""
        return RaggedBatch(shared) if self.variable_size else StackedBatch(rows, self.size, shared)

    def load_batch(
        self, request: BatchRequest, callback: LoadCallback | None = None, shared: bool = False
    ) -> LoadResult:
        """Load one batch.

        Args:
            request: Images to load.
            callback: Callback for each step.
            shared: True if the batch travels to another process.

        Returns:
            The batch, with the error of each bad image in its row; or an error that ends the job, not raised.
        """
        callback = callback or _NoOpCallback()
        make_batch = partial(
            Batch, shard_index=request.shard_index, start=request.start, attempt_number=request.attempt_number
        )
        timings: list[StageTiming] = []
        collator = self.make_collator(len(request.refs), shared)
        infos = dict(request.known_errors)
        rows = [row for row in range(len(request.refs)) if row not in infos]
        next_row = iter(rows)
        try:
            for refs in group_refs([request.refs[row] for row in rows]):
                callback.on_fetch()
                with _record_stage(timings, "fetch", len(refs)):
                    # Reversed, so that `pop` lets go of each image's bytes once it is decoded.
                    objects = self.fetcher.fetch(refs, callback.on_fetch)[::-1]
                with _record_stage(timings, "decode", len(refs)):
                    while objects:
                        row = next(next_row)
                        infos[row] = self._prepare_image(row, objects.pop(), collator, callback)
        except Unavailable as error:
            return make_batch(
                image_infos=(), pixels=None, attempt_error=error.message, stage_seconds=_sum_stages(timings)
            )
        except BatchjobError as error:
            return error
        callback.on_send()
        return make_batch(
            image_infos=tuple(infos[row] for row in range(len(request.refs))),
            pixels=collator.to_tensor(),
            stage_seconds=_sum_stages(timings),
            shapes=collator.shapes(),
            timings=tuple(timings),
        )

    def _prepare_image(
        self,
        row: int,
        answer: ObjectData | ErrorRecord,
        collator: StackedBatch | RaggedBatch,
        callback: LoadCallback,
    ) -> ImageInfo:
        """Decode and transform one image and add it to the batch; its info holds the error if that fails."""
        if isinstance(answer, ErrorRecord):
            return ImageInfo(error=answer)
        etag = answer.etag
        error_record = check_file_size(len(answer.data), self.fetcher.max_bytes)
        if error_record is not None:
            return ImageInfo(etag, error=error_record)
        callback.on_image(row, etag)
        try:
            image = self.transform(answer.data)
            return ImageInfo(etag, image.width, image.height, collator.add(image.pixels), image.axes_swapped)
        except ImageError as error:
            error_record = ErrorRecord(error.stage, error.type, error.message)
        except BatchjobError:  # the fault of the whole batch
            raise
        except Exception as error:  # noqa: BLE001 - a fault of one image becomes the error of its row
            error_record = _convert_image_error(error)
        return ImageInfo(etag, error=error_record)


@dataclass(frozen=True)
class NumberedRequest:
    """Index into `IsolatedDataset`.

    Attributes:
        number: Number of the request, unique in its loader.
        request: Images to load.
    """

    number: int
    request: BatchRequest


@dataclass(frozen=True)
class LoadedBatch:
    """Item of `IsolatedDataset`.

    Attributes:
        number: Number of the request.
        result: Batch or error; None if the request was skipped.
    """

    number: int
    result: LoadResult | None

    def pin_memory(self) -> LoadedBatch:
        """Return the batch in page-locked memory; called by DataLoader."""
        return replace(self, result=self.result.pin_memory()) if isinstance(self.result, Batch) else self


class IsolatedDataset(Dataset[LoadedBatch]):
    """Map-style dataset of whole batches: an index is a numbered request.

    Args:
        images: Dataset that loads the batches.
        skipped: Requests that are not loaded any more.
        memory_bytes: Memory of each process in bytes; None without a limit.
        image_seconds: CPU seconds that one image may take.
    """

    def __init__(
        self, images: ImageDataset, skipped: SkippedRequests, memory_bytes: int | None, image_seconds: float
    ) -> None:
        self.images, self._skipped = images, skipped
        self._memory_bytes, self._image_seconds = memory_bytes, image_seconds
        self._progress: WorkerProgress | None = None
        self._callback: WorkerCallback | None = None

    def start(self, progress: WorkerProgress) -> None:
        """Set the limits of this process, and record from now on what it does."""
        self._progress = progress
        self._callback = limit_process(progress, self._memory_bytes, self._image_seconds)

    def __getitems__(self, requests: Sequence[NumberedRequest]) -> list[LoadedBatch]:
        """Load a batch for each request; DataLoader calls this once for each list of its batch sampler."""
        return [self._load(request.number, request.request) for request in requests]

    def _load(self, number: int, request: BatchRequest) -> LoadedBatch:
        assert self._progress is not None, "the process has been started"
        if number in self._skipped:
            return LoadedBatch(number, None)
        self._progress.start_request(number)
        result = load_or_fail(self.images, request, self._callback)
        self._progress.set_idle()
        return LoadedBatch(number, result)


def load_or_fail(images: ImageDataset, request: BatchRequest, callback: LoadCallback | None) -> LoadResult:
    """Load a batch for another process, without raising anything."""
    try:
        return images.load_batch(request, callback, shared=True)
    except MemoryError:  # not one image's fault: a new process, and smaller batches, get further than this one
        os._exit(OUT_OF_MEMORY_CODE)
    except Exception as error:  # noqa: BLE001 - fails the attempt, at the place of the batch
        text = " ".join(str(error).split())[:500]
        return AttemptFailed(f"the loader failed: {type(error).__name__}: {text}")


def start_worker(_: int) -> None:
    """Prepare a process that a DataLoader has started: the `worker_init_fn`."""
    info = get_worker_info()
    assert info is not None
    assert isinstance(info.dataset, IsolatedDataset)
    # DataLoader's handlers print a line about each crash, which the worker reports anyway.
    for kind in (signal.SIGSEGV, signal.SIGBUS, signal.SIGFPE):
        signal.signal(kind, signal.SIG_DFL)
    info.dataset.start(get_progress())


def _convert_image_error(error: Exception) -> ErrorRecord:
    if isinstance(error, MemoryError) or (isinstance(error, RuntimeError) and is_out_of_memory(error)):
        return ErrorRecord("decode", "memory", "there was not enough memory to decode it (runtime.loader.memory_mib)")
    return ErrorRecord("transform", type(error).__name__, str(error) or type(error).__name__)


@contextlib.contextmanager
def _record_stage(timings: list[StageTiming], stage: str, images: int) -> Iterator[None]:
    started = time.perf_counter()
    try:
        yield
    finally:
        timings.append(StageTiming(stage, started, time.perf_counter(), os.getpid(), images))


def _sum_stages(timings: Sequence[StageTiming]) -> dict[str, float]:
    seconds: dict[str, float] = defaultdict(float)
    for timing in timings:
        seconds[timing.stage] += timing.seconds
    return dict(seconds)
