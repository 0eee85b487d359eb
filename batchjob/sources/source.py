"""Base of every source: an ordered, resumable listing of images in Arrow batches."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Generator, Iterator
from typing import TYPE_CHECKING

import pyarrow as pa
from pydantic import Field

from batchjob.settings import Settings
from batchjob.sources.locations import explain_missing_input

if TYPE_CHECKING:
    from batchjob.sources.skipped_files import SkippedFiles
    from batchjob.storage.objects import ObjectInfo
    from batchjob.storage.reader import Reader
    from batchjob.types import Cursor

__all__ = ["BATCH_ROWS", "IMAGE_EXTENSIONS", "REF_FIELDS", "Require", "RowBatches", "Source", "skip_empty_batches"]

BATCH_ROWS = 8192  # rows in a batch of image refs, at most
RowBatches = Generator[tuple[int, pa.RecordBatch], None, int]
"""Batches of a table file, each with its first row in the file, from 0; returns the number of rows of the file."""
IMAGE_EXTENSIONS = (".jpg", ".jpeg", ".png", ".webp", ".gif", ".bmp", ".tif", ".tiff")
REF_FIELDS: tuple[pa.Field, ...] = (
    pa.field("uri", pa.string(), nullable=False),
    pa.field("location", pa.string(), nullable=False),
    pa.field("size", pa.int64()),
    pa.field("etag", pa.string()),
)
"""First columns of every batch of image refs; `id` and the passthrough columns follow."""


class Require(Settings):
    """Conditions under which an input is planned. Until they hold, the job ends with exit 75.

    Attributes:
        marker: Name of an object that must exist in the input's folder, such as `_SUCCESS`.
        min_images: Smallest number of images.
    """

    marker: str | None = Field(default=None, min_length=1)
    min_images: int | None = Field(default=None, ge=1)


class Source(Settings):
    """An ordered list of images that can be resumed after any row. Here are the answers of a source without columns.

    For example, a folder with `a.jpg` and `b.jpg`: `refs(reader, Cursor())` yields one batch of two rows. The cursor
    after its first row is `Cursor(rows=1, last="…/a.jpg")`; `refs` from there yields one batch with `b.jpg` only.
    """

    if TYPE_CHECKING:  # fields of each source

        @property
        def uri(self) -> str:
            """URI of the input, as the job names it."""

        @property
        def require(self) -> Require | None:
            """Conditions under which the input is planned, if any."""

    @property
    def has_id(self) -> bool:
        """True if the first field of `fields` is the user's own `id`."""
        return False

    @property
    def prefixes(self) -> tuple[str, ...]:
        """URI prefixes outside of which no image is read; empty for no such limit."""
        return ()

    @abstractmethod
    def check(self, reader: Reader) -> None:
        """Check that the input exists and has the columns that the settings name. Raises InvalidJob."""

    def fields(self, reader: Reader, excluded_folder: str | None = None) -> list[pa.Field]:  # noqa: ARG002
        """Return the columns after `REF_FIELDS`: `id` if there is one, then the passthrough columns, all nullable."""
        return []

    def version(self, reader: Reader, excluded_folder: str | None = None) -> str | None:  # noqa: ARG002
        """Return a digest that changes when the list of images may have changed; None if only a new listing tells."""
        return None

    def count_images(self, reader: Reader, excluded_folder: str | None = None) -> int | None:  # noqa: ARG002
        """Return the number of images if it is known without listing them, else None."""
        return None

    def list_files(self, reader: Reader, excluded_folder: str | None = None) -> list[ObjectInfo]:  # noqa: ARG002
        """Return the files that name the images; none if a listing finds them."""
        return []

    @abstractmethod
    def refs(
        self, reader: Reader, after: Cursor, excluded_folder: str | None = None, skipped: SkippedFiles | None = None
    ) -> Iterator[pa.RecordBatch]:
        """Yield batches of `REF_FIELDS` and `fields()`: at least one batch, each of at most `BATCH_ROWS` rows.

        Args:
            reader: Reader with the job's storage options.
            after: Cursor of the last row that is left out; `Cursor()` starts at the first image.
            excluded_folder: URI of a folder that is never part of the input, however the input is named: the output.
            skipped: Counts of the files that the listing leaves out, which are added to while batches are taken.

        Raises:
            InvalidJob: The input does not exist, or one of its rows cannot be read.
        """

    def explain_missing(self, reader: Reader) -> str | None:
        """Return a sentence that says which condition of `require` does not hold yet; None if all hold.

        `min_images` is not counted here: the driver counts while it lists.
        """
        if self.require is None or self.require == Require():
            return None
        return explain_missing_input(reader, self.uri, self.require.marker)


def skip_empty_batches(batches: Iterator[pa.RecordBatch], schema: pa.Schema) -> Iterator[pa.RecordBatch]:
    """Yield the batches that have rows; if none has, yield one empty batch, which carries the schema."""
    found = False
    for batch in batches:
        if batch.num_rows:
            found = True
            yield batch
    if not found:
        yield pa.RecordBatch.from_pylist([], schema=schema)
