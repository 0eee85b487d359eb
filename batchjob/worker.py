"""One loaded model that turns shards into committed parts: the only file that knows the whole data path."""

from __future__ import annotations

import hashlib
import json
import shutil
import tempfile
import threading
import time
from collections.abc import Callable, Mapping
from contextlib import suppress
from dataclasses import dataclass
from functools import cached_property, partial
from pathlib import Path
from typing import TYPE_CHECKING

from batchjob import plan
from batchjob.assembly import Assembly, Imprint
from batchjob.devices import pick_device, pick_precision
from batchjob.errors import BatchjobError, ImageFault, InvalidJob, StorageError, Unavailable
from batchjob.job import Job
from batchjob.loader import FEW_IMAGES, Loader, ShardFeed, preload, settle
from batchjob.models import LoadedModel
from batchjob.plan import Contract, Head, PlanReader
from batchjob.pool import Event, Loaded, Setup
from batchjob.predict import Forward, Modes, Predicted, Predictor
from batchjob.prepare import Prepare
from batchjob.records import Batch, Recipe, Shard, ShardKey
from batchjob.sink import row_schema
from batchjob.storage import Reader, open_store
from batchjob.tasks import EXAMPLE_ROWS, Postprocess
from batchjob.transform import Geometry, frame, merge, normalizer

if TYPE_CHECKING:
    import torch

__all__ = ["Worker"]

_BATCH_SIZES = {"cuda": 128}
_BATCH_SIZE_ELSEWHERE = 32
_SIDE_UNKNOWN = 224  # of the example when there is no image to ask


class Worker:
    """Loads once, then takes shards and commits their parts.

    Args:
        job: with its paths as they are on this machine.
        setup: what the driver told.
        cores: that may be used here, loader processes included.
        tell: called, from any thread, with what became of a shard.
    """

    def __init__(self, job: Job, setup: Setup, cores: int, tell: Callable[[Event], None] = lambda event: None) -> None:
        self._job, self._setup, self._cores = job, setup, cores
        self._reader = Reader(job.storage)
        self._store = open_store(job.output.uri, job.storage)
        self._spool = Path(tempfile.mkdtemp(prefix="batchjob-"))
        self._tell = tell
        self._stopped = threading.Event()
        self._plan: _Plan | None = None
        self._assembly: Assembly | None = None
        self._loader: Loader | None = None
        self._threads_before: int | None = None
        self._model: LoadedModel

    # -- once --------------------------------------------------------------------------------------------------

    def load(self) -> Loaded:
        """Load the model, start the loader processes, warm up on the device.

        Raises:
            InvalidJob: model, labels, preprocessing, precision or device do not fit.
        """
        began = time.monotonic()
        self._see_witness()
        preload(Loader.__module__, Prepare.__module__)
        self._use_cores()
        runtime = self._job.runtime
        pick_device(runtime.device)  # before the weights are read
        model = self._job.model.load(self._reader, self._job.base)
        self._device = pick_device(runtime.device, model.devices)
        precision = pick_precision(runtime.precision, self._device) if model.eager else "fp32"
        self._model, self._model_digest = model, model.digest
        self._preprocess = preprocess = merge(self._job.preprocess, model.preprocess)
        self._prepare = Prepare(
            self._job.decode,
            Geometry(preprocess, self._job.base),
            gray=preprocess.channels == "gray",
            turn=preprocess.exif == "apply",
        )
        example = self._example()
        self._start_loader(tuple(example.shape))
        module, normalize = self._job.task.adapt(model.module), normalizer(preprocess)
        modes = Modes(runtime.grad_mode, model.takes, Recipe(precision), model.batch_size)
        forward = Forward(module, normalize, self._device, modes)
        output = forward.tried(example.expand(model.batch_size or EXAMPLE_ROWS, *example.shape).contiguous())
        self._post: Postprocess = self._job.task.prepare(output, model.labels, self._reader)
        self._predictor = Predictor(forward, self._post, model.batch_size)
        self._predictor.warm_up(example.shape, self._batch_size, example.dtype)
        return Loaded(
            device=_device_name(self._device),
            precision=precision,
            model=self._model_id,
            columns=tuple(column.name for column in self._post.fields),
            batch_size=self._batch_size,
            seconds=time.monotonic() - began,
        )

    def begin(self, number: int) -> None:
        """Join the plan of this number: agree with all other workers on schema, model and image size.

        Raises:
            InvalidJob: another worker has loaded another model, or makes other columns.
        """
        if self._plan is not None:
            return
        found, head = plan.current(self._store)
        if head is None or found != number:
            raise InvalidJob(f"{self._store.uri}: plan {number} was discarded while this run was starting; run again")
        reader = PlanReader(self._store, head)
        schema = row_schema(list(reader.passthrough), self._post.fields, has_id=self._job.input.has_id)
        ours = Contract(schema, self._model_digest, None if self._varying else self._size)
        agreed = plan.agree(self._store, head, ours)
        if agreed.size is not None and agreed.size != self._size:
            self._start_loader(agreed.size)
        self._plan = _Plan(head, reader)
        self._assembly = Assembly(
            store=self._store,
            spool=self._spool,
            imprint=Imprint(head.plan, _digest_of(self._job.fingerprint()), self._model_digest, self._model_id, schema),
            post=self._post,
            frames=partial(frame, self._preprocess),
            lost=self._predictor.lost_fault(),
            wanted=self._still_wanted,
            tell=self._tell,
        )

    def shard(self, key: ShardKey) -> Shard:
        """The shard's members, read from the plan."""
        return self._begun.reader.shard(key)

    def close(self) -> None:
        """End loader processes and threads, remove the spool, give torch its threads back."""
        if self._loader is not None:
            self._loader.close()
        if self._assembly is not None:
            self._assembly.close()
        shutil.rmtree(self._spool, ignore_errors=True)
        if self._threads_before is not None:
            import torch

            torch.set_num_threads(self._threads_before)

    # -- again and again ---------------------------------------------------------------------------------------

    def run(self, feed: ShardFeed) -> None:
        """Take shards from the feed until it has none now. What becomes of each is told, some of it later."""
        assert self._loader is not None, "load comes before run"
        assert self._assembly is not None, "begin comes before run"
        taken = _Taken(feed)
        try:
            for batch in self._loader.batches(taken):
                if self._stopped.is_set():
                    return
                self._advance(taken, batch)
        except BatchjobError as error:  # the loader itself: what it held is lost
            self._assembly.lose(list(taken.shards.values()), error)
        for shard in taken.empty:
            self._assembly.add_empty(shard)

    def stop(self) -> None:
        """Begin no further batch."""
        self._stopped.set()

    def _advance(self, taken: _Taken, batch: Batch) -> None:
        assert self._assembly is not None
        shard = taken.shards[batch.shard]
        last = batch.start + self._batch_size >= shard.key.rows
        if last:
            del taken.shards[batch.shard]
        began = time.perf_counter()
        predicted = self._predicted(batch)
        self._assembly.add(shard, batch, predicted, seconds=time.perf_counter() - began, last=last)

    def _predicted(self, batch: Batch) -> Predicted | Exception | None:
        if batch.trouble is not None:
            return Unavailable(batch.trouble)
        if batch.pixels is None:
            return None
        try:
            return self._predictor(batch.pixels, batch.shapes)
        except Exception as error:  # noqa: BLE001 - ends this attempt; the driver decides how far it reaches
            return error

    def _still_wanted(self) -> None:
        if plan.is_discarded(self._store, self._begun.head):
            raise InvalidJob(f"{self._store.uri}: the plan was discarded while this run was at work; run again")

    # -- parts of loading --------------------------------------------------------------------------------------

    @property
    def _begun(self) -> _Plan:
        assert self._plan is not None, "begin comes before work"
        return self._plan

    @cached_property
    def _model_id(self) -> str:
        return f"{self._job.model.title}@{self._model_digest[:12]}"

    @property
    def _batch_size(self) -> int:
        asked = self._job.runtime.batch_size
        return _BATCH_SIZES.get(self._device.type, _BATCH_SIZE_ELSEWHERE) if asked == "auto" else asked

    def _see_witness(self) -> None:
        """Read back what the driver wrote. Raises InvalidJob when this machine sees another output."""
        if self._setup.witness is None:
            return
        key, word = self._setup.witness
        with suppress(StorageError):
            if word.encode() in self._store.read(key).data:
                return
        raise InvalidJob(
            f"output.uri {self._store.uri}: a worker cannot see there what the driver wrote; give a place that all "
            "machines share, such as s3://bucket/folder/"
        )

    def _use_cores(self) -> None:
        import torch

        if torch.get_num_threads() != self._cores:
            self._threads_before = torch.get_num_threads()
            torch.set_num_threads(self._cores)

    def _example(self) -> torch.Tensor:
        """One prepared image `[c, h, w]`: random where settings fix the size, else the first sample that decodes.

        Raises:
            InvalidJob: none of the samples decodes, so that the model's input size is not known.
        """
        import torch

        channels, size = 1 if self._prepare.gray else 3, self._prepare.geometry.size
        if size is None and self._setup.sample:
            return self._first_decodable()
        height, width = size or (_SIDE_UNKNOWN, _SIDE_UNKNOWN)
        own = torch.Generator().manual_seed(0)
        return torch.randint(0, 256, (channels, height, width), dtype=torch.uint8, generator=own)

    def _first_decodable(self) -> torch.Tensor:
        for location in self._setup.sample:
            with suppress(ImageFault, StorageError):
                return self._prepare(self._reader.read(location).data).pixels
        raise InvalidJob(
            f"none of the first {len(self._setup.sample)} images can be decoded, so the model's input size is not "
            "known; give preprocess.resize or crop, or look at the input"
        )

    @property
    def _varying(self) -> bool:
        """Whether images of different sizes go to the model."""
        return self._model.takes == "list" or self._preprocess.sizes == "group"

    def _start_loader(self, size: tuple[int, ...]) -> None:
        """Start a loader for images of this size, in place of one for another."""
        if self._loader is not None:
            self._loader.close()
        self._size = size
        few = FEW_IMAGES if self._setup.few else None
        chosen = settle(self._job.runtime.loader, cores=self._cores, images=few, cuda=self._device.type == "cuda")
        self._loader = Loader(
            reader=self._reader,
            prepare=self._prepare,
            batch_size=self._batch_size,
            plan=chosen,
            size=size,
            varying=self._varying,
            max_bytes=self._job.decode.max_bytes,
        )
        self._loader.start()


@dataclass(frozen=True)
class _Plan:
    """What the worker knows of the plan it works on."""

    head: Head
    reader: PlanReader


class _Taken:
    """The feed, remembering what it gave that is not through yet."""

    def __init__(self, feed: ShardFeed) -> None:
        self._feed = feed
        self.shards: dict[int, Shard] = {}
        self.empty: list[Shard] = []

    def take(self) -> Shard | None:
        shard = self._feed.take()
        if shard is not None and shard.key.rows:
            self.shards[shard.key.index] = shard
        elif shard is not None:
            self.empty.append(shard)
        return shard


def _device_name(device: torch.device) -> str:
    import torch

    return f"{device} ({torch.cuda.get_device_name(device)})" if device.type == "cuda" else str(device)


def _digest_of(fingerprint: Mapping[str, object]) -> str:
    return hashlib.sha256(json.dumps(fingerprint, sort_keys=True).encode()).hexdigest()
