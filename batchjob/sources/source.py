"""What every source yields, and what every source may be asked to wait for."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING, Protocol

import pyarrow as pa
from pydantic import Field

from batchjob.settings import Settings
from batchjob.sources.locations import explain_missing_input

if TYPE_CHECKING:
    from batchjob.storage.reader import Reader
    from batchjob.types import Cursor

__all__ = ["BATCH_ROWS", "REF_FIELDS", "Require", "Source", "skip_empty_batches"]

BATCH_ROWS = 8192
REF_FIELDS: tuple[pa.Field, ...] = (
    pa.field("uri", pa.string(), nullable=False),
    pa.field("location", pa.string(), nullable=False),
    pa.field("size", pa.int64()),
    pa.field("etag", pa.string()),
)
"""The first columns of every batch of refs; `id` and the passthrough columns follow."""


class Require(Settings):
    """What must be there before anything is planned; until then the job ends with exit 75.

    Attributes:
        marker: name of an object in the input's folder, such as `_SUCCESS`.
        min_images: least number of images.
    """

    marker: str | None = Field(default=None, min_length=1)
    min_images: int | None = Field(default=None, ge=1)

    def explain_missing(self, reader: Reader, uri: str) -> str | None:
        """Why the input at `uri` is not there yet, as a sentence. Images are counted by whoever plans."""
        asked = self.marker is not None or self.min_images is not None
        return explain_missing_input(reader, uri, self.marker) if asked else None


class Source(Protocol):
    """An ordered stream of images that can be taken up again after any row."""

    def check(self, reader: Reader) -> None:
        """Look whether the input is there and has what the settings name. Raises InvalidJob."""

    def fields(self, reader: Reader, excluded_folder: str | None = None) -> list[pa.Field]:
        """The columns after REF_FIELDS: `id` where there is one, then the passthrough, all nullable."""

    def version(self, reader: Reader, excluded_folder: str | None = None) -> str | None:
        """Digest that changes when the list of images may have; None where only listing again would tell."""

    def refs(self, reader: Reader, after: Cursor, excluded_folder: str | None = None) -> Iterator[pa.RecordBatch]:
        """Batches of REF_FIELDS + `fields()`, at least one, each of at most BATCH_ROWS rows.

        Args:
            after: the rows up to here are left out.
            outside: URI of a folder that is no part of the input, however the input is named: the output.

        Raises:
            InvalidJob: nothing there, or a row that cannot be read.
        """

    def explain_missing(self, reader: Reader) -> str | None:
        """Why the input is not there yet, as a sentence, where `require` asks for more than there is.

        `min_images` is counted by the caller.
        """


def skip_empty_batches(batches: Iterator[pa.RecordBatch], schema: pa.Schema) -> Iterator[pa.RecordBatch]:
    """The same batches without empty ones; a single empty one where there are no rows, for its schema."""
    found = False
    for batch in batches:
        if batch.num_rows:
            found = True
            yield batch
    if not found:
        yield pa.RecordBatch.from_pylist([], schema=schema)
