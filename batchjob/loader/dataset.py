"""A request in, a batch out: fetched, decoded and transformed; what is wrong with an image stays in its place."""

from __future__ import annotations

import contextlib
import os
import time
from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Protocol

from batchjob.errors import BatchjobError, ImageFault, Unavailable, out_of_memory
from batchjob.loader.collate import Mixed, Pixels, Ragged
from batchjob.loader.fetch import Fetcher, oversized, together
from batchjob.storage.objects import Blob
from batchjob.types import Batch, Fault, ImageFacts, ImageRef, Prepared, Span

__all__ = ["Images", "Prepare", "Request"]

Prepare = Callable[[bytes], Prepared]
"""An encoded image to what goes into the batch. Raises ImageFault."""


@dataclass(frozen=True)
class Request:
    """One batch to load.

    Attributes:
        shard: index of the shard; `take` the number of the attempt at it.
        start: offset of its first row within the shard.
        refs: its images.
        known: rows that are not tried, and what is known of them.
        on_host: nothing is left for a device to decode.
    """

    shard: int
    take: int
    start: int
    refs: tuple[ImageRef, ...]
    known: Mapping[int, ImageFacts] = field(default_factory=dict)
    on_host: bool = False

    def knowing(self, row: int, facts: ImageFacts) -> Request:
        """The same, with that row not to be tried."""
        return replace(self, known={**self.known, row: facts})

    def only(self, rows: range) -> Request:
        """The batch of these rows."""
        known = {row - rows.start: facts for row, facts in self.known.items() if row in rows}
        return replace(self, start=self.start + rows.start, refs=self.refs[rows.start : rows.stop], known=known)

    def halves(self) -> tuple[Request, Request]:
        """Two batches in place of this one."""
        middle, end = len(self.refs) // 2, len(self.refs)
        return self.only(range(middle)), self.only(range(middle, end))


class Progress(Protocol):
    """Told what is at work."""

    def fetch(self) -> None:
        """No image is in work; told again as each object arrives, from any thread."""

    def image(self, row: int, etag: str | None) -> None:
        """The image of this row of the request is in work."""

    def send(self) -> None:
        """All images are through."""


class _Unwatched:
    def fetch(self) -> None: ...

    def send(self) -> None: ...

    def image(self, row: int, etag: str | None) -> None: ...


@dataclass(frozen=True)
class Images:
    """Loads what is requested.

    Attributes:
        fetcher: reads encoded images.
        prepare: decode and geometry.
        size: the last dimensions every prepared image must have; None takes the first good image of each batch.
        varying: images may differ in size; `size` says nothing then.
        divided: in place of `prepare`, where a device decodes a part of the images; those come flat, `[bytes]`.
    """

    fetcher: Fetcher
    prepare: Prepare
    size: tuple[int, ...] | None
    varying: bool
    divided: Prepare | None = None

    def collation(self, rows: int, shared: bool = False) -> Pixels | Ragged:
        """Room for so many prepared images."""
        if self.varying:
            return Ragged(shared)
        return (Pixels if self.divided is None else Mixed)(rows, self.size, shared)

    def load(
        self,
        request: Request,
        progress: Progress | None = None,
        shared: bool = False,
    ) -> Batch | BatchjobError:
        """The batch, or what ends the job, given and not raised; `shared` where it travels to another process."""
        progress = progress or _Unwatched()
        spans: list[Span] = []
        pixels = self.collation(len(request.refs), shared)
        prepare = self.prepare if request.on_host else self.divided or self.prepare
        facts = dict(request.known)
        rows = [row for row in range(len(request.refs)) if row not in facts]
        left = iter(rows)
        try:
            for refs in together([request.refs[row] for row in rows]):
                progress.fetch()
                with _timed(spans, "fetch", len(refs)):
                    found = self.fetcher.fetch(refs, progress.fetch)[::-1]  # so that each can be let go once decoded
                with _timed(spans, "decode", len(refs)):
                    while found:
                        row = next(left)
                        facts[row] = self._prepared(row, found.pop(), prepare, pixels, progress)
        except Unavailable as trouble:
            return Batch(request.shard, request.start, (), None, trouble.message, _summed(spans), take=request.take)
        except BatchjobError as error:
            return error
        progress.send()
        return Batch(
            shard=request.shard,
            start=request.start,
            facts=tuple(facts[row] for row in range(len(request.refs))),
            pixels=pixels.filled(),
            seconds=_summed(spans),
            shapes=pixels.shapes(),
            take=request.take,
            spans=tuple(spans),
            encoded=pixels.encoded(),
        )

    def _prepared(
        self, row: int, found: Blob | Fault, prepare: Prepare, pixels: Pixels | Ragged, progress: Progress
    ) -> ImageFacts:
        if isinstance(found, Fault):
            return ImageFacts(fault=found)
        etag = found.etag
        fault = oversized(len(found.data), self.fetcher.max_bytes)
        if fault is not None:
            return ImageFacts(etag, fault=fault)
        progress.image(row, etag)
        try:
            made = prepare(found.data)
            return ImageFacts(etag, made.width, made.height, pixels.add(made.pixels), made.turned)
        except ImageFault as error:
            fault = Fault(error.stage, error.type, error.message)
        except BatchjobError:  # of the whole batch
            raise
        except Exception as error:  # noqa: BLE001 - one image's fault is that image's row
            fault = _fault(error)
        return ImageFacts(etag, fault=fault)


def _fault(error: Exception) -> Fault:
    if isinstance(error, MemoryError) or (isinstance(error, RuntimeError) and out_of_memory(error)):
        return Fault("decode", "memory", "there was not enough memory to decode it (runtime.loader.memory_mib)")
    return Fault("transform", type(error).__name__, str(error) or type(error).__name__)


@contextlib.contextmanager
def _timed(spans: list[Span], stage: str, images: int) -> Iterator[None]:
    begun = time.perf_counter()
    try:
        yield
    finally:
        spans.append(Span(stage, begun, time.perf_counter(), os.getpid(), images))


def _summed(spans: Sequence[Span]) -> dict[str, float]:
    seconds: dict[str, float] = defaultdict(float)
    for span in spans:
        seconds[span.stage] += span.ended - span.began
    return dict(seconds)
