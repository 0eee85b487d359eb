"""The nouns: frozen data that the rooms hand to each other. No behaviour beyond reading and writing themselves."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from typing import TYPE_CHECKING, Any, Literal

from pydantic import Field

from batchjob.settings import Settings, Target

if TYPE_CHECKING:
    import pyarrow as pa
    import torch

__all__ = [
    "Batch",
    "Blob",
    "Cursor",
    "Fault",
    "ImageFacts",
    "ImageRef",
    "Preprocess",
    "Provenance",
    "Shard",
    "ShardKey",
    "ShardResult",
    "Stat",
]


@dataclass(frozen=True, slots=True)
class Stat:
    """An object as a listing shows it.

    Attributes:
        uri: full URI from a `Reader`, key relative to the root from a `Store`.
        size: bytes.
        etag: the store's own tag, without quotes, or None where it has none.
        version: opaque token for `replace_if_match` (an ETag, on GCS a generation).
    """

    uri: str
    size: int
    etag: str | None = None
    version: str | None = None


@dataclass(frozen=True, slots=True)
class Blob:
    """An object's bytes, with the tag and the version they were read under."""

    data: bytes
    etag: str | None = None
    version: str | None = None


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
    """

    index: int
    id: str
    rows: int
    chunk: int
    offset: int

    @property
    def part(self) -> str:
        """Key of its Parquet part, relative to the output."""
        return f"predictions/part-{self.index:07d}-{self.id}.parquet"


@dataclass(frozen=True)
class Shard:
    """A shard with its members: `refs` in plan order, `passthrough` a table of as many rows (maybe no columns)."""

    key: ShardKey
    refs: tuple[ImageRef, ...]
    passthrough: pa.Table


@dataclass(frozen=True, slots=True)
class Fault:
    """What an error row says: `stage` and `type` to group by, `message` to read."""

    stage: str
    type: str
    message: str


@dataclass(frozen=True, slots=True)
class ImageFacts:
    """What the loader learned of one image: pixels as stored (`width`, `height`), tag as read, or what went wrong."""

    etag: str | None = None
    width: int | None = None
    height: int | None = None
    fault: Fault | None = None


@dataclass(frozen=True)
class Batch:
    """A loaded batch of one shard.

    Attributes:
        shard: index of the shard.
        start: offset of its first row within the shard.
        facts: one per row, good or bad, in plan order.
        pixels: uint8 `[n, c, h, w]`, the `n` rows whose facts hold no fault, in order; float32 where the job's own
            transform made it so; None when `n` is 0.
        trouble: a fault that is not the images' (network, credentials): the attempt fails, no rows.
        seconds: stage → seconds spent in the loader.
    """

    shard: int
    start: int
    facts: tuple[ImageFacts, ...]
    pixels: torch.Tensor | None
    trouble: str | None = None
    seconds: Mapping[str, float] = field(default_factory=dict)

    def pin_memory(self) -> Batch:
        """The same batch with page-locked pixels (called by DataLoader)."""
        if self.pixels is None:
            return self
        return Batch(self.shard, self.start, self.facts, self.pixels.pin_memory(), self.trouble, self.seconds)


@dataclass(frozen=True)
class Provenance:
    """What a part's footer says of its making, under one key, as JSON. No hosts, no secrets.

    Attributes:
        plan: id of the plan, `shard` and `index` which of its shards.
        attempt: random id of the attempt that made it.
        revision: 0, one more with each `retry`.
        fingerprint: sha256 of the job's fingerprint.
        model: digest of weights and model code.
        rows: in the part; `failed` of them carry an error.
        errors: `stage/type` → count.
        seconds: stage → seconds; `wall` is start to commit.
        versions: package → version.
    """

    plan: str
    shard: str
    index: int
    attempt: str
    revision: int
    fingerprint: str
    model: str
    rows: int
    failed: int
    errors: Mapping[str, int]
    seconds: Mapping[str, float]
    versions: Mapping[str, str]

    KEY = "batchjob"

    def dump(self) -> str:
        return json.dumps(asdict(self), sort_keys=True)

    @classmethod
    def parse(cls, text: str | bytes) -> Provenance:
        """Raises ValueError or TypeError where the text is not a provenance record."""
        fields: dict[str, Any] = json.loads(text)
        return cls(**fields)


@dataclass(frozen=True)
class ShardResult:
    """Summary of a committed shard: small, for it crosses the cluster.

    Attributes:
        key: which shard.
        made: what the committed part's footer says.
        examples: `stage/type` → one `uri: message`.
        ours: False when a rival had committed it first.
        etag: the part's tag.
    """

    key: ShardKey
    made: Provenance
    examples: Mapping[str, str]
    ours: bool
    etag: str | None


class Preprocess(Settings):
    """How pixels become the model's input.

    In a job: given keys override, absent keys keep the weights' own, null switches a step off.

    Attributes:
        resize: shorter side in pixels, or `[height, width]`; null keeps the size.
        crop: centre crop, a side or `[height, width]`; null keeps all.
        interpolation: of the resize; always antialiased.
        mean: per channel, after scaling; with `std`; null normalises nothing.
        std: per channel.
        channels: order and number handed to the model.
        scale: `unit` divides by 255, `none` leaves 0-255.
        exif: `apply` turns the image as its EXIF orientation says.
        transform: `module:function` from uint8 `[3, h, w]` to a tensor, in place of all the steps above but `exif`.
    """

    resize: int | tuple[int, int] | None = None
    crop: int | tuple[int, int] | None = None
    interpolation: Literal["nearest", "bilinear", "bicubic"] = "bilinear"
    mean: tuple[float, ...] | None = None
    std: tuple[float, ...] | None = None
    channels: Literal["rgb", "bgr", "gray"] = "rgb"
    scale: Literal["unit", "none"] = "unit"
    exif: Literal["ignore", "apply"] = "ignore"
    transform: Target | None = Field(default=None)
