"""The nouns: frozen data that the rooms hand to each other. No behaviour beyond reading and writing themselves."""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field, replace
from functools import partial
from itertools import pairwise
from typing import TYPE_CHECKING, Protocol

from batchjob.text import sanitize

if TYPE_CHECKING:
    import pyarrow as pa
    import torch

__all__ = [
    "Batch",
    "Cursor",
    "EncodedImages",
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
    "no_monitor",
    "overlaps",
    "record_timing",
]


@dataclass(frozen=True, slots=True)
class Cursor:
    """How far a source has been read: rows so far, and the location of the last one."""

    rows: int = 0
    last: str | None = None


@dataclass(frozen=True, slots=True)
class ImageRef:
    """One planned image.

    Attributes:
        position: place in the plan, from 0: the row's identity.
        uri: as listed, or as the manifest gives it.
        location: the absolute URI that is read.
        size: bytes, where listing or manifest said.
        etag: likewise.
    """

    position: int
    uri: str
    location: str
    size: int | None = None
    etag: str | None = None


@dataclass(frozen=True, slots=True)
class ShardKey:
    """What travels to a worker: enough to find the shard's members in the plan.

    Attributes:
        index: place among the shards, from 0.
        id: content id: hash of plan id, index and members.
        rows: images in it.
        chunk: number of the plan chunk that holds it.
        offset: its first row within that chunk.
        revision: of the part that is to be made: 0, or at a retry one more than that of the part which is there.
        failed: at a retry, error rows of that part.
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
        """To be read for it: all of its own, or at a retry those whose rows hold an error."""
        return self.error_rows if self.revision else self.rows

    @property
    def part_key(self) -> str:
        """Key of its Parquet part, relative to the output."""
        return f"predictions/part-{self.index:07d}-{self.id}.parquet"


@dataclass(frozen=True)
class Shard:
    """A shard with its members.

    Attributes:
        key: which shard.
        refs: in plan order; at a retry only those whose rows hold an error.
        passthrough: a table of as many rows, maybe without columns.
        take: number of this attempt within its worker: the same shard may be taken again after one that failed.
        on_host: nothing of it is to be decoded on a device.
    """

    key: ShardKey
    refs: tuple[ImageRef, ...]
    passthrough: pa.Table
    attempt_number: int = 0
    decode_on_cpu: bool = False


@dataclass(frozen=True, slots=True)
class ErrorRecord:
    """What an error row says: `stage` and `type` to group by, `message` to read, without any secret."""

    stage: str
    type: str
    message: str

    def __post_init__(self) -> None:
        object.__setattr__(self, "message", sanitize(self.message))


@dataclass(frozen=True, slots=True)
class PreparedImage:
    """An image ready for its batch.

    Attributes:
        pixels: uint8 or float32 `[c, h, w]`.
        width: as stored, in pixels; `height` likewise.
        turned: a quarter turn, as EXIF says, has swapped the two.
    """

    pixels: torch.Tensor
    width: int
    height: int
    axes_swapped: bool = False


@dataclass(frozen=True)
class ImageInfo:
    """What the loader learned of one image: pixels as stored (`width`, `height`), tag as read, or what went wrong."""

    etag: str | None = None
    width: int | None = None
    height: int | None = None
    error: ErrorRecord | None = None
    axes_swapped: bool = False


@dataclass(frozen=True, slots=True)
class StageTiming:
    """A stretch of work.

    Attributes:
        stage: which; `wait` is the forward loop's, for a batch.
        began: by `time.perf_counter`, whose zero all processes of a machine share; `ended` likewise.
        process: id of the one that did it.
        images: that it was for, 0 where that is not known.
    """

    stage: str
    began: float
    ended: float
    pid: int
    images: int = 0


TimingSink = Callable[[StageTiming], None]
"""Told of each stretch of work, from any thread."""


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


@dataclass(frozen=True)
class Batch:
    """A loaded batch of one shard.

    Attributes:
        shard: index of the shard.
        start: offset of its first row within the shard.
        facts: one per row, good or bad, in plan order.
        pixels: uint8 `[n, c, h, w]`, the `n` rows whose facts hold no fault, in order; float32 where the job's own
            transform made it so; None when `n` is 0. Where `shapes` are given, flat `[values]`, image after image.
        trouble: a fault that is not the images' (network, credentials): the attempt fails, no rows.
        seconds: stage → seconds spent in the loader.
        shapes: `[c, h, w]` of each image where they may differ.
        take: number of the attempt that it belongs to, as its shard gave it.
        spans: what `seconds` adds up, stretch by stretch.
        encoded: those of the `n` images that are not in `pixels`, for they are still to be decoded on a device.
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
    encoded: EncodedImages | None = None

    def pin_memory(self) -> Batch:
        """The same batch with page-locked pixels (in the thread that receives it)."""
        if self.pixels is None:
            return self
        return replace(self, pixels=self.pixels.pin_memory())


@dataclass(frozen=True)
class EncodedImages:
    """Encoded images of a batch.

    Attributes:
        places: theirs among the batch's good images, from 0, in order.
        data: uint8 `[bytes]`, one file behind the other.
        ends: where in it each file ends.
    """

    indices: tuple[int, ...]
    data: torch.Tensor
    ends: tuple[int, ...]

    def files(self) -> list[torch.Tensor]:
        """Each by itself, uint8 `[bytes]`; views of `data`."""
        return [self.data[begin:end] for begin, end in pairwise((0, *self.ends))]


@dataclass(frozen=True)
class PartialOutput:
    """What one call of the module gave.

    Attributes:
        rows: which images of the batch.
        tensors: on the host, one row an image, in the order of `rows`.
    """

    rows: tuple[int, ...]
    tensors: dict[str, torch.Tensor]


@dataclass(frozen=True)
class Prediction:
    """A batch's results; on a GPU they may still be under way.

    Attributes:
        pieces: each image of the batch is in one of them, or lost.
        lost: images that cannot be predicted, and why; such as alone do not fit into memory.
    """

    outputs: tuple[PartialOutput, ...]
    errors: Mapping[int, ErrorRecord] = field(default_factory=dict)
    _arrival: Callable[[], None] | None = None

    @property
    def pending(self) -> bool:
        """Whether it has to be waited for."""
        return self._arrival is not None

    def wait(self) -> Prediction:
        """The same, once all of it has arrived on the host. Raises what went wrong on the device."""
        if self._arrival is not None:
            self._arrival()
        return self

    def on_ready(self, wrapper: Callable[[Callable[[], None]], None]) -> Prediction:
        """The same, its wait inside that function."""
        return replace(self, _arrival=partial(wrapper, self._arrival or _nothing))


def _nothing() -> None:
    """What there is to wait for where all has arrived."""


def overlaps(one: range, other: range) -> bool:
    """Whether a position lies in both."""
    return max(one.start, other.start) < min(one.stop, other.stop)


def record_timing(timing_sink: TimingSink, stage: str, started: float, images: int) -> float:
    """Seconds since `began`, by `time.perf_counter`, which the watch is told of."""
    ended = time.perf_counter()
    timing_sink(StageTiming(stage, started, ended, os.getpid(), images))
    return ended - started
