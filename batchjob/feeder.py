"""The thread that turns a source into confirmed shards, so that listing never holds up the control loop."""

from __future__ import annotations

import queue
import threading
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from functools import cached_property

import pyarrow as pa
import pyarrow.compute as pc

from batchjob.errors import InvalidJob, Temporary
from batchjob.job import Job
from batchjob.loader import TYPICAL_BYTES
from batchjob.plan import Chunk, Head
from batchjob.records import Cursor
from batchjob.storage import Reader

__all__ = ["Feeder", "Input", "Peek", "encoded_bytes", "peek"]

_CHUNKS_AHEAD = 4
_SAMPLE = 256  # locations


@dataclass(frozen=True)
class Peek:
    """A first look at the source.

    Attributes:
        rows: seen; all of them if `whole`.
        sample: the first locations.
        row_bytes: that a row's passthrough columns take on average.
        image_bytes: of the images seen, encoded, as listing or manifest said.
    """

    rows: int
    whole: bool
    sample: tuple[str, ...]
    row_bytes: int = 0
    image_bytes: int = 0


class Input:
    """A job's source bound to its reader and its output, which is never part of it."""

    def __init__(self, job: Job, reader: Reader) -> None:
        self._source, self._reader, self._output = job.input, reader, job.output.uri
        self._closed = threading.Event()

    @cached_property
    def fields(self) -> list[pa.Field]:
        """The passthrough columns. Raises InvalidJob where there is nothing to read them from."""
        found: list[pa.Field] = self._source.fields(self._reader, self._output)
        return found

    def refs(self, after: Cursor) -> Iterator[pa.RecordBatch]:
        """The images after a cursor, in batches; one empty batch when there is none. Raises Temporary once closed."""
        for batch in self._source.refs(self._reader, after, outside=self._output):
            if self._closed.is_set():
                raise Temporary(f"input.uri {self._source.uri}: nobody waits for the rest of the list any more")
            yield batch

    def close(self) -> None:
        """End what another thread may still be listing."""
        self._closed.set()

    @property
    def version(self) -> str | None:
        """Digest of the manifest, None where there is none."""
        return self._source.version(self._reader, self._output)

    def require(self, note: Callable[[str], None] = lambda text: None) -> None:
        """Raises Temporary when `input.require` is not met: nothing is frozen then."""
        if reason := self._source.missing(self._reader):
            raise Temporary(reason)
        least = self._source.require.min_images if self._source.require else None
        if least is None:
            return
        note(f"counting at least {least:,} images")
        rows = 0
        for batch in self.refs(Cursor()):
            rows += batch.num_rows
            if rows >= least:
                return
        raise Temporary(
            f"input.uri {self._source.uri} lists {rows:,} images, input.require.min_images asks for {least:,}; "
            "not there yet, nothing was planned: run again later"
        )

    def check_unchanged(self, head: Head) -> None:
        """Raises InvalidJob when the manifest is no longer the one that `head` planned."""
        if head.source_version is not None and self.version != head.source_version:
            raise InvalidJob(
                f"input.uri {self._source.uri} changed while its plan was being written; restore it, or "
                f"`batchjob discard {self._output} --yes` and run again"
            )


def peek(source: Input, enough: int) -> Peek:
    """Look at the source until more than `enough` rows have been seen, or all of it."""
    rows = size = image_bytes = 0
    sample: list[str] = []
    for batch in source.refs(Cursor()):
        rows += batch.num_rows
        size += sum(batch.column(field.name).nbytes for field in source.fields)
        image_bytes += encoded_bytes(batch.column("size"))
        if len(sample) < _SAMPLE:
            sample += batch.column("location").slice(0, _SAMPLE - len(sample)).to_pylist()
        if rows > enough:
            return Peek(rows, False, tuple(sample), size // rows, image_bytes)
    return Peek(rows, True, tuple(sample), size // max(1, rows), image_bytes)


def encoded_bytes(sizes: pa.Array | pa.ChunkedArray) -> int:
    """Of all images together; those of unknown size count as typical ones."""
    return (pc.sum(sizes).as_py() or 0) + int(sizes.null_count) * TYPICAL_BYTES


class Feeder:
    """Yields confirmed chunks of the plan, read or written a few ahead in a thread of its own."""

    def __init__(self, chunks: Iterable[Chunk]) -> None:
        self._chunks = chunks
        self._queue: queue.Queue[Chunk | BaseException | None] = queue.Queue(_CHUNKS_AHEAD)
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._fill, name="feeder", daemon=True)
        self._thread.start()
        self.finished = False

    def take(self, seconds: float = 0.0) -> Chunk | None:
        """The next confirmed chunk if one comes that soon; `finished` is set after the last. Raises what stopped it."""
        try:
            item = self._queue.get(timeout=seconds) if seconds and not self.finished else self._queue.get_nowait()
        except queue.Empty:
            return None
        if isinstance(item, BaseException):
            raise item
        self.finished = item is None
        return item

    def close(self) -> None:
        """Stop after the chunk at hand."""
        self._stop.set()

    def _fill(self) -> None:
        try:
            for chunk in self._chunks:
                self._put(chunk)
                if self._stop.is_set():  # going on would list and plan the whole input for nobody
                    return
            self._put(None)
        except BaseException as error:  # noqa: BLE001 - carried to the control loop, which raises it
            self._put(error)

    def _put(self, item: Chunk | BaseException | None) -> None:
        while not self._stop.is_set():
            try:
                self._queue.put(item, timeout=0.2)
                return
            except queue.Full:
                continue
