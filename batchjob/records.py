"""The nouns: frozen data that the rooms hand to each other. No behaviour beyond reading and writing themselves."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, field, fields, replace
from functools import lru_cache
from sys import intern
from typing import TYPE_CHECKING, Any, Literal

from batchjob.encoded import Encoded
from batchjob.redaction import presentable

if TYPE_CHECKING:
    import pyarrow as pa
    import torch

__all__ = [
    "Batch",
    "Blob",
    "Cursor",
    "Fault",
    "Frame",
    "ImageFacts",
    "ImageRef",
    "Precision",
    "Prepared",
    "Provenance",
    "Recipe",
    "Shard",
    "ShardKey",
    "ShardResult",
    "Span",
    "Stat",
    "Watch",
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
        revision: of the part that is to be made: 0, or at a retry one more than that of the part which is there.
        failed: at a retry, error rows of that part.
    """

    index: int
    id: str
    rows: int
    chunk: int
    offset: int
    revision: int = 0
    failed: int = 0

    @property
    def images(self) -> int:
        """To be read for it: all of its own, or at a retry those whose rows hold an error."""
        return self.failed if self.revision else self.rows

    @property
    def part(self) -> str:
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
    take: int = 0
    on_host: bool = False


@dataclass(frozen=True, slots=True)
class Fault:
    """What an error row says: `stage` and `type` to group by, `message` to read, without any secret."""

    stage: str
    type: str
    message: str

    def __post_init__(self) -> None:
        object.__setattr__(self, "message", presentable(self.message))


@dataclass(frozen=True, slots=True)
class Prepared:
    """An image ready for its batch.

    Attributes:
        pixels: uint8 or float32 `[c, h, w]`.
        width: as stored, in pixels; `height` likewise.
        turned: a quarter turn, as EXIF says, has swapped the two.
    """

    pixels: torch.Tensor
    width: int
    height: int
    turned: bool = False


@dataclass(frozen=True)
class ImageFacts:
    """What the loader learned of one image: pixels as stored (`width`, `height`), tag as read, or what went wrong."""

    etag: str | None = None
    width: int | None = None
    height: int | None = None
    fault: Fault | None = None
    turned: bool = False


@dataclass(frozen=True, slots=True)
class Frame:
    """Where the model's input lies in its image: `x` of the image is `(x of the input + left) / scale_x`.

    Attributes:
        width: of the image as it stands upright, in pixels; `height` likewise.
        input_width: of what the model gets, padding left out; `input_height` likewise.
        scale_x: input pixels for one of the image; `scale_y` likewise.
        left: input pixels that the crop cut off, negative where it padded; `top` likewise.
        pad_right: input pixels that `preprocess.pad` put on the right; `pad_below` likewise.
    """

    width: int
    height: int
    input_width: int
    input_height: int
    scale_x: float = 1.0
    scale_y: float = 1.0
    left: float = 0.0
    top: float = 0.0
    pad_right: int = 0
    pad_below: int = 0


Precision = Literal["fp32", "tf32", "bf16", "fp16"]


@dataclass(frozen=True)
class Recipe:
    """How a module is run on a device; `tuning.py` chooses.

    Attributes:
        precision: of the arithmetic; bf16 and fp16 by autocast.
        half: the weights are in that precision too, in place of autocast.
        channels_last: memory layout of images and convolutions.
        fold: batch norms folded into their convolutions.
        compile: mode of `torch.compile`, or `off`.
        freeze: weights are constants to the compiler.
        quantize: of weights and activations.
        cudnn_benchmark: let cuDNN try its algorithms.
    """

    precision: Precision = "fp32"
    half: bool = False
    channels_last: bool = False
    fold: bool = False
    compile: Literal["off", "default", "regional", "reduce-overhead", "max-autotune", "max-autotune-no-cudagraphs"] = (
        "off"
    )
    freeze: bool = False
    quantize: Literal["none", "int8-dynamic", "int8-static", "fp8"] = "none"
    cudnn_benchmark: bool = False

    @property
    def words(self) -> str:
        """For people: `bf16 channels_last compile`, or `eager fp32`."""
        half = f"{self.precision} weights" if self.half else self.precision
        flags = [name for name in ("channels_last", "fold", "freeze", "cudnn_benchmark") if getattr(self, name)]
        compiled = {"off": [], "default": ["compile"]}.get(self.compile, [f"compile={self.compile}"])
        quantized = [] if self.quantize == "none" else [self.quantize]
        more = [*quantized, *flags, *compiled]
        return " ".join([half, *more]) if more or half != "fp32" else "eager fp32"

    @property
    def fixed_batch(self) -> bool:
        """Whether every batch must have the same shape, a short one padded."""
        return self.compile != "off"


@dataclass(frozen=True, slots=True)
class Span:
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
    process: int
    images: int = 0


Watch = Callable[[Span], None]
"""Told of each stretch of work, from any thread."""


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

    shard: int
    start: int
    facts: tuple[ImageFacts, ...]
    pixels: torch.Tensor | None
    trouble: str | None = None
    seconds: Mapping[str, float] = field(default_factory=dict)
    shapes: tuple[tuple[int, ...], ...] | None = None
    take: int = 0
    spans: tuple[Span, ...] = ()
    encoded: Encoded | None = None

    def pin_memory(self) -> Batch:
        """The same batch with page-locked pixels (in the thread that receives it)."""
        if self.pixels is None:
            return self
        return replace(self, pixels=self.pixels.pin_memory())


@dataclass(frozen=True, slots=True)
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
        truth: sums by name, from which the task tells how right it was; they add up over parts.
        recipe: in words, by which the model ran.
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
    truth: Mapping[str, float] = field(default_factory=dict)
    recipe: str = ""

    KEY = "batchjob"

    def dump(self) -> str:
        return json.dumps(asdict(self), sort_keys=True)

    @classmethod
    def parse(cls, text: str | bytes) -> Provenance:
        """What a later version has added is passed over.

        Raises:
            ValueError, TypeError: the text is no provenance record.
        """
        found: dict[str, Any] = dict(json.loads(text))
        known = {field.name for field in fields(cls)}
        return cls(**{name: value for name, value in found.items() if name in known})

    def compact(self) -> Provenance:
        """The same, holding but once what the parts of a run say alike: a driver keeps one of these a part."""
        return replace(
            self,
            plan=intern(self.plan),
            fingerprint=intern(self.fingerprint),
            model=intern(self.model),
            recipe=intern(self.recipe),
            errors=_compact(self.errors),
            seconds=_compact(self.seconds),
            versions=_shared(tuple(self.versions.items())),
            truth=_compact(self.truth),
        )


def _compact(figures: Mapping[str, Any]) -> Mapping[str, Any]:
    return {intern(name): figure for name, figure in figures.items()}


@lru_cache(maxsize=64)
def _shared(versions: tuple[tuple[str, str], ...]) -> Mapping[str, str]:
    return dict(versions)


@dataclass(frozen=True, slots=True)
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
