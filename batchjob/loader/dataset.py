"""A request in, a batch out: fetched, decoded and transformed; what is wrong with an image stays in its place."""

from __future__ import annotations

import contextlib
import os
import time
from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Protocol

from batchjob.errors import BatchjobError, ImageError, Unavailable, is_out_of_memory
from batchjob.loader.collate import GpuSplitBatch, RaggedBatch, StackedBatch
from batchjob.loader.fetch import Fetcher, check_file_size, group_refs
from batchjob.storage.objects import ObjectData
from batchjob.types import Batch, ErrorRecord, ImageInfo, ImageRef, PreparedImage, StageTiming

__all__ = ["BatchRequest", "ImageDataset", "TransformFn"]

TransformFn = Callable[[bytes], PreparedImage]
"""An encoded image to what goes into the batch. Raises ImageFault."""


@dataclass(frozen=True)
class BatchRequest:
    """One batch to load.

    Attributes:
        shard: index of the shard; `take` the number of the attempt at it.
        start: offset of its first row within the shard.
        refs: its images.
        known: rows that are not tried, and what is known of them.
        on_host: nothing is left for a device to decode.
    """

    shard_index: int
    attempt_number: int
    start: int
    refs: tuple[ImageRef, ...]
    known_errors: Mapping[int, ImageInfo] = field(default_factory=dict)
    decode_on_cpu: bool = False

    def with_known_error(self, row: int, facts: ImageInfo) -> BatchRequest:
        """The same, with that row not to be tried."""
        return replace(self, known_errors={**self.known_errors, row: facts})

    def select_rows(self, rows: range) -> BatchRequest:
        """The batch of these rows."""
        known = {row - rows.start: facts for row, facts in self.known_errors.items() if row in rows}
        return replace(self, start=self.start + rows.start, refs=self.refs[rows.start : rows.stop], known_errors=known)

    def split(self) -> tuple[BatchRequest, BatchRequest]:
        """Two batches in place of this one."""
        middle, end = len(self.refs) // 2, len(self.refs)
        return self.select_rows(range(middle)), self.select_rows(range(middle, end))


class LoadCallback(Protocol):
    """Told what is at work."""

    def on_fetch(self) -> None:
        """No image is in work; told again as each object arrives, from any thread."""

    def on_image(self, row: int, etag: str | None) -> None:
        """The image of this row of the request is in work."""

    def on_send(self) -> None:
        """All images are through."""


class _NoOpCallback:
    def on_fetch(self) -> None: ...

    def on_send(self) -> None: ...

    def on_image(self, row: int, etag: str | None) -> None: ...


@dataclass(frozen=True)
class ImageDataset:
    """Loads what is requested.

    Attributes:
        fetcher: reads encoded images.
        prepare: decode and geometry.
        size: the last dimensions every prepared image must have; None takes the first good image of each batch.
        varying: images may differ in size; `size` says nothing then.
        divided: in place of `prepare`, where a device decodes a part of the images; those come flat, `[bytes]`.
    """

    fetcher: Fetcher
    transform: TransformFn
    size: tuple[int, ...] | None
    variable_size: bool
    split_transform: TransformFn | None = None

    def make_collator(self, rows: int, shared: bool = False) -> StackedBatch | RaggedBatch:
        """Room for so many prepared images."""
        if self.variable_size:
            return RaggedBatch(shared)
        return (StackedBatch if self.split_transform is None else GpuSplitBatch)(rows, self.size, shared)

    def load_batch(
        self,
        request: BatchRequest,
        callback: LoadCallback | None = None,
        shared: bool = False,
    ) -> Batch | BatchjobError:
        """The batch, or what ends the job, given and not raised; `shared` where it travels to another process."""
        callback = callback or _NoOpCallback()
        spans: list[StageTiming] = []
        pixels = self.make_collator(len(request.refs), shared)
        prepare = self.transform if request.decode_on_cpu else self.split_transform or self.transform
        facts = dict(request.known_errors)
        rows = [row for row in range(len(request.refs)) if row not in facts]
        left = iter(rows)
        try:
            for refs in group_refs([request.refs[row] for row in rows]):
                callback.on_fetch()
                with _timed(spans, "fetch", len(refs)):
                    found = self.fetcher.fetch(refs, callback.on_fetch)[::-1]  # so that each can be let go once decoded
                with _timed(spans, "decode", len(refs)):
                    while found:
                        row = next(left)
                        facts[row] = self._prepared(row, found.pop(), prepare, pixels, callback)
        except Unavailable as trouble:
            return Batch(
                request.shard_index,
                request.start,
                (),
                None,
                trouble.message,
                _summed(spans),
                attempt_number=request.attempt_number,
            )
        except BatchjobError as error:
            return error
        callback.on_send()
        return Batch(
            shard_index=request.shard_index,
            start=request.start,
            image_infos=tuple(facts[row] for row in range(len(request.refs))),
            pixels=pixels.to_tensor(),
            stage_seconds=_summed(spans),
            shapes=pixels.shapes(),
            attempt_number=request.attempt_number,
            timings=tuple(spans),
            encoded=pixels.encoded(),
        )

    def _prepared(
        self,
        row: int,
        found: ObjectData | ErrorRecord,
        prepare: TransformFn,
        pixels: StackedBatch | RaggedBatch,
        progress: LoadCallback,
    ) -> ImageInfo:
        if isinstance(found, ErrorRecord):
            return ImageInfo(error=found)
        etag = found.etag
        fault = check_file_size(len(found.data), self.fetcher.max_bytes)
        if fault is not None:
            return ImageInfo(etag, error=fault)
        progress.on_image(row, etag)
        try:
            made = prepare(found.data)
            return ImageInfo(etag, made.width, made.height, pixels.add(made.pixels), made.axes_swapped)
        except ImageError as error:
            fault = ErrorRecord(error.stage, error.type, error.message)
        except BatchjobError:  # of the whole batch
            raise
        except Exception as error:  # noqa: BLE001 - one image's fault is that image's row
            fault = _fault(error)
        return ImageInfo(etag, error=fault)


def _fault(error: Exception) -> ErrorRecord:
    if isinstance(error, MemoryError) or (isinstance(error, RuntimeError) and is_out_of_memory(error)):
        return ErrorRecord("decode", "memory", "there was not enough memory to decode it (runtime.loader.memory_mib)")
    return ErrorRecord("transform", type(error).__name__, str(error) or type(error).__name__)


@contextlib.contextmanager
def _timed(spans: list[StageTiming], stage: str, images: int) -> Iterator[None]:
    begun = time.perf_counter()
    try:
        yield
    finally:
        spans.append(StageTiming(stage, begun, time.perf_counter(), os.getpid(), images))


def _summed(spans: Sequence[StageTiming]) -> dict[str, float]:
    seconds: dict[str, float] = defaultdict(float)
    for span in spans:
        seconds[span.stage] += span.ended - span.began
    return dict(seconds)
