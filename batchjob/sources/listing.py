"""The thread that turns a source into confirmed shards, so that listing never holds up the control loop."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import cached_property

import pyarrow as pa
import pyarrow.compute as pc

from batchjob.errors import InvalidJob, Temporary
from batchjob.job.job import Job
from batchjob.plan.head import PlanHead
from batchjob.storage.reader import Reader
from batchjob.types import Cursor

__all__ = [
    "DEFAULT_IMAGE_BYTES",
    "SMALL_INPUT_IMAGES",
    "InputPreview",
    "SourceListing",
    "encoded_bytes",
    "preview_listing",
]

_SAMPLE = 256  # locations


@dataclass(frozen=True)
class InputPreview:
    """A first look at the source.

    Attributes:
        rows: seen; all of them if `whole`.
        sample: the first locations.
        row_bytes: that a row's passthrough columns take on average.
        image_bytes: of the images seen, encoded, as listing or manifest said.
    """

    rows: int
    complete: bool
    sample: tuple[str, ...]
    row_bytes: int = 0
    image_bytes: int = 0


class SourceListing:
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
        for batch in self._source.refs(self._reader, after, excluded_folder=self._output):
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

    def check_requirements(self, note: Callable[[str], None] = lambda text: None) -> None:
        """Raises Temporary when `input.require` is not met: nothing is frozen then."""
        if reason := self._source.explain_missing(self._reader):
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

    def check_unchanged(self, head: PlanHead) -> None:
        """Raises InvalidJob when the manifest is no longer the one that `head` planned."""
        if head.source_version is not None and self.version != head.source_version:
            raise InvalidJob(
                f"input.uri {self._source.uri} changed while its plan was being written; restore it, or "
                f"`batchjob discard {self._output} --yes` and run again"
            )


def preview_listing(listing: SourceListing, min_rows: int) -> InputPreview:
    """Look at the source until more than `enough` rows have been seen, or all of it."""
    rows = size = image_bytes = 0
    sample: list[str] = []
    for batch in listing.refs(Cursor()):
        rows += batch.num_rows
        size += sum(batch.column(field.name).nbytes for field in listing.fields)
        image_bytes += encoded_bytes(batch.column("size"))
        if len(sample) < _SAMPLE:
            sample += batch.column("location").slice(0, _SAMPLE - len(sample)).to_pylist()
        if rows > min_rows:
            return InputPreview(rows, False, tuple(sample), size // rows, image_bytes)
    return InputPreview(rows, True, tuple(sample), size // max(1, rows), image_bytes)


def encoded_bytes(sizes: pa.Array | pa.ChunkedArray) -> int:
    """Of all images together; those of unknown size count as typical ones."""
    return (pc.sum(sizes).as_py() or 0) + int(sizes.null_count) * DEFAULT_IMAGE_BYTES


SMALL_INPUT_IMAGES = 256  # for so few, starting more processes than their bytes call for takes longer than decoding
DEFAULT_IMAGE_BYTES = 1 << 18  # what an encoded image counts for whose size nobody has said
