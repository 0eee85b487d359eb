"""Data that packages share: image refs, shards and the names of their parts, batches, predictions, timings."""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field, replace
from functools import partial
from typing import TYPE_CHECKING, Protocol

from batchjob.text import sanitize

if TYPE_CHECKING:
    import pyarrow as pa
    import torch

__all__ = [
    "Batch",
    "Cursor",
    "ErrorRecord",
    "ImageInfo",
    "ImageRef",
    "PartialOutput",
    "Prediction",
    "PreparedImage",
    "Shard",
    "ShardKey",
    "StageTiming",
    "StalledStep",
    "StepMonitor",
    "TimingSink",
    "is_stray_key",
    "no_monitor",
    "overlaps",
    "record_timing",
]


# -- the plan --------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Cursor:
    """Point up to which a source has been read.

    Attributes:
        rows: Rows read so far.
        last: Location of the last row; None before the first one.
    """

    rows: int = 0
    last: str | None = None


@dataclass(frozen=True, slots=True)
class ImageRef:
    """Reference to one planned image.

    Attributes:
        position: Index in the plan, from 0; it identifies the row.
        uri: URI as the listing or the manifest gives it.
        location: Absolute URI from which the image is read.
        size: Size in bytes; None if neither listing nor manifest says it.
        etag: ETag; None if neither listing nor manifest says it.
    """

    position: int
    uri: str
    location: str
    size: int | None = None
    etag: str | None = None


@dataclass(frozen=True, slots=True)
class ShardKey:
    """Identity of a shard, small enough to send to workers, which read its members from the plan.

    Attributes:
        index: Index among the shards of the plan, from 0.
        id: Hash of plan id, index and members.
        rows: Images in the shard.
        chunk: Number of the plan chunk that holds it.
        offset: Index of its first row within that chunk.
        revision: Revision of the part to write: 0, or at a retry one more than that of the committed part.
        error_rows: At a retry, error rows of the committed part.
    """

    index: int
    id: str
    rows: int
    chunk: int
    offset: int
    revision: int = 0
    error_rows: int = 0

    @property
    def images_to_read(self) -> int:
        """Images to read for the shard: all of them, or at a retry those with error rows."""
        return self.error_rows if self.revision else self.rows

    @property
    def part_key(self) -> str:
        """Key of its Parquet part, relative to the output."""
        return f"predictions/part-{self.index:07d}-{self.id}.parquet"


@dataclass(frozen=True)
class Shard:
    """Shard with its members.

    Attributes:
        key: Identity of the shard.
        refs: Its images in plan order; at a retry only those with error rows.
        passthrough: Table with a row for each image, possibly without columns.
        attempt_number: Number of this attempt within its worker; a shard may be attempted again after a failure.
    """

    key: ShardKey
    refs: tuple[ImageRef, ...]
    passthrough: pa.Table
    attempt_number: int = 0


# -- images ----------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class ErrorRecord:
    """Content of an error row; secrets are removed from the message.

    Attributes:
        stage: Stage that failed: `fetch`, `decode`, `transform` or `predict`.
        type: Short, stable word to group by, such as `not_found` or `truncated`.
        message: One sentence for people.
    """

    stage: str
    type: str
    message: str

    def __post_init__(self) -> None:
        object.__setattr__(self, "message", sanitize(self.message))


@dataclass(frozen=True, slots=True)
class PreparedImage:
    """Image ready for its batch.

    Attributes:
        pixels: uint8 or float32 `[c, h, w]`.
        width: Width in pixels as stored.
        height: Height in pixels as stored.
        axes_swapped: The EXIF orientation is a quarter turn, so that upright width and height are swapped.
    """

    pixels: torch.Tensor
    width: int
    height: int
    axes_swapped: bool = False


@dataclass(frozen=True)
class ImageInfo:
    """Information of the loader on one image.

    Attributes:
        etag: ETag under which it was read; None if the store has none.
        width: Width in pixels as stored; None if it was not decoded.
        height: Height in pixels as stored; None if it was not decoded.
        error: Reason of its error row; None if it has pixels.
        axes_swapped: See `PreparedImage`.
    """

    etag: str | None = None
    width: int | None = None
    height: int | None = None
    error: ErrorRecord | None = None
    axes_swapped: bool = False


@dataclass(frozen=True)
class Batch:
    """Loaded batch of one shard.

    Example: of four images the second cannot be decoded. `image_infos` has four items, the second with an error, and
    `pixels` is `[3, c, h, w]`.

    Attributes:
        shard_index: Index of the shard.
        start: Index of its first row within the shard.
        image_infos: One for each row, with or without error, in plan order.
        pixels: Pixels of the `n` rows without error, in order: uint8 `[n, c, h, w]`, or float32 if the job's own
            transform makes that. With `shapes` they are flat, the values of one image after the other. None if `n`
            is 0.
        attempt_error: Fault of the network or the credentials, for which no image is to blame: the attempt fails.
        stage_seconds: Seconds in the loader for each stage.
        shapes: `[c, h, w]` of each image; None if all are equal.
        attempt_number: Number of the attempt, from its shard.
        timings: The single timings of which `stage_seconds` is the sum.
    """

    shard_index: int
    start: int
    image_infos: tuple[ImageInfo, ...]
    pixels: torch.Tensor | None
    attempt_error: str | None = None
    stage_seconds: Mapping[str, float] = field(default_factory=dict)
    shapes: tuple[tuple[int, ...], ...] | None = None
    attempt_number: int = 0
    timings: tuple[StageTiming, ...] = ()

    def pin_memory(self) -> Batch:
        """Return the batch with pixels in page-locked memory."""
        if self.pixels is None:
            return self
        return replace(self, pixels=self.pixels.pin_memory())


# -- predictions -----------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class PartialOutput:
    """Output of one call of the model.

    Attributes:
        rows: Indices of its images among the batch's images without error.
        tensors: Tensors on the host, with one row an image, in the order of `rows`.
    """

    rows: tuple[int, ...]
    tensors: dict[str, torch.Tensor]


@dataclass(frozen=True)
class Prediction:
    """Results of a batch; on a GPU they may not be complete yet.

    Example: three images, of which the second alone does not fit into memory, have `outputs` with the rows `(0, 2)`
    or `(0,)` and `(2,)`, and `errors` with the key 1.

    Attributes:
        outputs: Outputs of the calls; each image is in one of them or in `errors`.
        errors: Index of an image, counted as in `PartialOutput.rows` -> reason why it cannot be predicted.
    """

    outputs: tuple[PartialOutput, ...]
    errors: Mapping[int, ErrorRecord] = field(default_factory=dict)
    _wait: Callable[[], None] | None = None

    @property
    def pending(self) -> bool:
        """True if `wait` must be called before the tensors are read."""
        return self._wait is not None

    def wait(self) -> Prediction:
        """Wait until the tensors are complete, and return the prediction; raises the device's error if it failed."""
        if self._wait is not None:
            self._wait()
        return self

    def on_ready(self, wrapper: Callable[[Callable[[], None]], None]) -> Prediction:
        """Return the prediction with a function around its wait.

        Args:
            wrapper: Called by `wait` with the function that waits; it must call that, and may act before and after.
        """
        return replace(self, _wait=partial(wrapper, self._wait or _nothing_to_wait_for))


def _nothing_to_wait_for() -> None:
    pass


# -- timings and steps -----------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class StageTiming:
    """Time that a stage took for some images.

    Attributes:
        stage: Name of the stage; `wait` is the time that the model waits for a batch.
        started: Start by `time.perf_counter`, which has one zero for all processes of a machine.
        ended: End by `time.perf_counter`.
        pid: Process that did the work.
        images: Images of the work; 0 if unknown.
    """

    stage: str
    started: float
    ended: float
    pid: int
    images: int = 0

    @property
    def seconds(self) -> float:
        """Duration in seconds."""
        return self.ended - self.started


TimingSink = Callable[[StageTiming], None]
"""Function that receives timings, from any thread."""


def record_timing(timing_sink: TimingSink, stage: str, started: float, images: int) -> float:
    """Send the timing of a stage that ends now to a sink.

    Args:
        timing_sink: Receiver of the timing.
        stage: Name of the stage.
        started: Start by `time.perf_counter`.
        images: Images of the work; 0 if unknown.

    Returns:
        Seconds that the stage took.
    """
    timing = StageTiming(stage, started, time.perf_counter(), os.getpid(), images)
    timing_sink(timing)
    return timing.seconds


class StepMonitor(Protocol):
    """Context manager around one step of work, so that a step which never ends is noticed.

    Example:
        >>> with step("a batch in the model", model=True):
        ...     prediction = predictor(pixels)
    """

    def __call__(self, name: str, *, model: bool = False) -> AbstractContextManager[None]:
        """Enter a step in this thread.

        Args:
            name: The step in words for people: "{name} has not ended for 60 s".
            model: The images that the model has at that time may be the cause of a hang.
        """


def no_monitor(name: str, *, model: bool = False) -> AbstractContextManager[None]:  # noqa: ARG001 - see StepMonitor
    """Watch over nothing; the `StepMonitor` of tests and measurements."""
    return nullcontext()


@dataclass(frozen=True, slots=True)
class StalledStep:
    """A step of a worker that has shown no progress for too long.

    Attributes:
        name: The step in words for people.
        thread: Identifier of the thread that is in it.
        seconds: Time since it began, or since its last sign of progress.
        storage: It uses a store, whose outages are waited for.
        model: The images that the model has may be the cause.
    """

    name: str
    thread: int
    seconds: float
    storage: bool = False
    model: bool = False


def is_stray_key(key: str) -> bool:
    """Return True for a file that a file browser or a copy leaves beside parts: `.DS_Store`, `.part-0.parquet.Xy12ab`.

    Readers of Parquet folders skip these, too.
    """
    name = key.rpartition("/")[2]
    return name.startswith(".") and not name.endswith(".parquet")


def overlaps(one: range, other: range) -> bool:
    """Return True if two ranges of positions have one in common: `range(0, 5)` and `range(4, 8)` do."""
    return max(one.start, other.start) < min(one.stop, other.stop)
