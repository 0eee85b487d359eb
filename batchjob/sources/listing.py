"""Listing of an input's images, without those of the output; a preview of the first ones."""

from __future__ import annotations

import random
import threading
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import cached_property

import pyarrow as pa
import pyarrow.compute as pc

from batchjob.errors import InvalidJob, Temporary
from batchjob.sources.skipped_files import SkippedFiles
from batchjob.sources.source import BATCH_ROWS, Source
from batchjob.storage.objects import ObjectInfo
from batchjob.storage.reader import Reader
from batchjob.text import format_count
from batchjob.types import Cursor

__all__ = [
    "DEFAULT_IMAGE_BYTES",
    "SMALL_INPUT_IMAGES",
    "InputPreview",
    "SourceListing",
    "draw_locations",
    "estimate_encoded_bytes",
    "preview_listing",
]

# For so few images, starting more processes than their bytes call for takes longer than decoding them.
SMALL_INPUT_IMAGES = 256
# Assumed size of an encoded image when neither the listing nor the manifest gives it.
DEFAULT_IMAGE_BYTES = 1 << 18
_SAMPLE_LOCATIONS = 256
_MAX_ROWS_TO_DRAW = 200_000


@dataclass(frozen=True)
class InputPreview:
    """The first images of an input, summed up.

    Attributes:
        rows: Images seen; all images of the input if `complete`.
        complete: True if the listing came to its end, as far as is known: it is not read on to find out after a full
            batch.
        sample: Locations of the first images, 256 at most.
        row_bytes: Bytes of the passthrough columns per row, on average; 0 if there are none.
        image_bytes: Encoded bytes of the images seen, as listing or manifest gives them; unknown sizes are estimated.
        skipped: Lines about files that were left out.
    """

    rows: int
    complete: bool
    sample: tuple[str, ...]
    row_bytes: int = 0
    image_bytes: int = 0
    skipped: tuple[str, ...] = ()

    def describe(self) -> str:
        """Return the number of images, such as `300 images`, or `at least 8,192 images` where more may follow."""
        return f"{'' if self.complete else 'at least '}{format_count(self.rows, 'image')}"


class SourceListing:
    """A source bound to a reader and to the output, which is never part of the input.

    Args:
        source: Source to list.
        reader: Reader with the job's storage options.
        output_uri: URI of the output folder; nothing below it is listed.

    Attributes:
        skipped: Files that the latest listing has left out so far.
    """

    def __init__(self, source: Source, reader: Reader, output_uri: str) -> None:
        self._source, self._reader, self._output_uri = source, reader, output_uri
        self._closed = threading.Event()
        self.skipped = SkippedFiles()

    @cached_property
    def fields(self) -> list[pa.Field]:
        """The columns after `REF_FIELDS`. Raises InvalidJob if there is no input to read them from."""
        return self._source.fields(self._reader, self._output_uri)

    @property
    def version(self) -> str | None:
        """Digest of the manifest; None for a source without a version."""
        return self._source.version(self._reader, self._output_uri)

    def count_images(self) -> int | None:
        """Return the number of images if it is known without listing them, else None."""
        return self._source.count_images(self._reader, self._output_uri)

    @property
    def files(self) -> list[ObjectInfo]:
        """Files that name the images: those of a manifest. Raises InvalidJob if they are not there."""
        return self._source.list_files(self._reader, self._output_uri)

    def refs(self, after: Cursor) -> Iterator[pa.RecordBatch]:
        """Yield the images after a cursor in batches; one empty batch if there are none. Raises Temporary if closed."""
        self.skipped = SkippedFiles()
        for batch in self._source.refs(self._reader, after, self._output_uri, self.skipped):
            if self._closed.is_set():
                raise Temporary(f"input.uri {self._source.uri}: nobody waits for the rest of the list any more")
            yield batch

    def close(self) -> None:
        """End listings that still run in other threads, at their next batch."""
        self._closed.set()

    def check_requirements(self, note: Callable[[str], None] = lambda text: None) -> None:
        """Raise Temporary if the input does not have what `input.require` asks for.

        Args:
            note: Called with a line for the user before images are counted, which may take long.
        """
        if reason := self._source.explain_missing(self._reader):
            raise Temporary(reason)
        min_images = self._source.require.min_images if self._source.require else None
        if min_images is None:
            return
        note(f"counting at least {min_images:,} images")
        rows = 0
        for batch in self.refs(Cursor()):
            rows += batch.num_rows
            if rows >= min_images:
                return
        raise Temporary(
            f"input.uri {self._source.uri} lists {rows:,} images, input.require.min_images asks for {min_images:,}; "
            "not there yet, nothing was planned: run again later"
        )

    def check_unchanged(self, planned_version: str | None) -> None:
        """Raise InvalidJob if the version is not the one that was planned; None is never compared."""
        if planned_version is not None and self.version != planned_version:
            raise InvalidJob(
                f"input.uri {self._source.uri} changed while its plan was being written; restore it, or "
                f"`batchjob discard {self._output_uri} --yes` and run again"
            )


def preview_listing(listing: SourceListing, min_rows: int) -> InputPreview:
    """List the input until more than `min_rows` images have been seen, or all of them."""
    rows = size = image_bytes = 0
    sample: list[str] = []
    complete = True
    for batch in listing.refs(Cursor()):
        # A batch that is not full is nearly always the last one: the next one is asked for, so that the count is true.
        if rows > min_rows:
            complete = False
            break
        rows += batch.num_rows
        size += sum(batch.column(field.name).nbytes for field in listing.fields)
        image_bytes += estimate_encoded_bytes(batch.column("size"))
        if len(sample) < _SAMPLE_LOCATIONS:
            sample += batch.column("location").slice(0, _SAMPLE_LOCATIONS - len(sample)).to_pylist()
        if rows > min_rows and batch.num_rows == BATCH_ROWS:
            complete = False
            break
    skipped = tuple(line if complete else f"{line}, so far" for line in listing.skipped.describe())
    return InputPreview(rows, complete, tuple(sample), size // max(1, rows), image_bytes, skipped)


def draw_locations(listing: SourceListing, count: int) -> list[str]:
    """Draw images at random from the whole listing, the same ones in each call, in random order.

    A reservoir keeps `count` of them: image number i takes the place of one of those with probability count / i. Of a
    long listing the first `_MAX_ROWS_TO_DRAW` are drawn from, which takes about half a minute on object storage.

    Args:
        listing: Listing of the input.
        count: Images to draw; all are returned if there are fewer.
    """
    generator, drawn, rows = random.Random(0), list[str](), 0
    for batch in listing.refs(Cursor()):
        places = ((row, generator.randrange(rows + row + 1)) for row in range(batch.num_rows))
        for row, place in places:
            if len(drawn) < count:
                drawn.append(batch.column("location")[row].as_py())
            elif place < count:
                drawn[place] = batch.column("location")[row].as_py()
        rows += batch.num_rows
        if rows >= _MAX_ROWS_TO_DRAW:
            break
    generator.shuffle(drawn)
    return drawn


def estimate_encoded_bytes(sizes: pa.Array | pa.ChunkedArray) -> int:
    """Return the sum of image sizes in bytes; a null counts as `DEFAULT_IMAGE_BYTES`."""
    return (pc.sum(sizes).as_py() or 0) + int(sizes.null_count) * DEFAULT_IMAGE_BYTES
