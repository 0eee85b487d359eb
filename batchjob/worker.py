"""One loaded model that turns shards into committed parts: the only file that knows the whole data path."""

from __future__ import annotations

import hashlib
import json
import secrets
import shutil
import tempfile
import time
from collections import deque
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass
from functools import cached_property
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING

import pyarrow as pa

from batchjob import ledger, plan
from batchjob.errors import AttemptFailed, BatchjobError, ImageFault, InvalidJob, StorageError, Unavailable
from batchjob.job import Job
from batchjob.loader import FEW_IMAGES, Loader, ShardFeed, preload, settle
from batchjob.plan import Contract, Head, PlanReader
from batchjob.pool import Done, Event, Failed, Loaded, Setup
from batchjob.predict import Forward, Predictor, pick_device, pick_precision
from batchjob.prepare import Prepare
from batchjob.records import Batch, Provenance, Shard, ShardKey, ShardResult
from batchjob.sink import PartWriter, row_schema, rows
from batchjob.storage import Reader, open_store
from batchjob.tasks import EXAMPLE_ROWS, Postprocess
from batchjob.transform import Geometry, merge, normalizer

if TYPE_CHECKING:
    import torch

__all__ = ["Worker", "as_ours"]

_COMMITS_PENDING = 2
_BATCH_SIZES = {"cuda": 128}
_BATCH_SIZE_ELSEWHERE = 32
_SIDE_UNKNOWN = 224  # of the example when there is no image to ask
_RECORDED = ("batchjob", "torch", "torchvision", "pyarrow", "pillow")


class Worker:
    """Loads once, then takes shards and commits their parts.

    Args:
        job: with its paths as they are on this machine.
        setup: what the driver told.
        cores: that may be used here, loader processes included.
    """

    def __init__(self, job: Job, setup: Setup, cores: int) -> None:
        self._job, self._setup, self._cores = job, setup, cores
        self._reader = Reader(job.storage)
        self._store = open_store(job.output.uri, job.storage)
        self._spool = Path(tempfile.mkdtemp(prefix="batchjob-"))
        self._committer = ThreadPoolExecutor(1, thread_name_prefix="commit")
        self._commits: deque[Future[Event]] = deque()
        self._drafts: dict[int, _Draft] = {}
        self._plan: _Plan | None = None
        self._loader: Loader | None = None
        self._threads_before: int | None = None

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
        self._device = pick_device(runtime.device)
        precision = pick_precision(runtime.precision, self._device)
        model = self._job.model.load(self._reader, self._job.base)
        self._model_digest = model.digest
        preprocess = merge(self._job.preprocess, model.preprocess)
        self._prepare = Prepare(
            self._job.decode,
            Geometry(preprocess, self._job.base),
            gray=preprocess.channels == "gray",
            turn=preprocess.exif == "apply",
        )
        example = self._example()
        self._start_loader(tuple(example.shape))
        module, normalize = self._job.task.adapt(model.module), normalizer(preprocess)
        output = Forward(module, normalize, self._device, precision, runtime.grad_mode).tried(
            example.expand(EXAMPLE_ROWS, *example.shape).contiguous()
        )
        self._post: Postprocess = self._job.task.prepare(output, model.labels, self._reader)
        self._predictor = Predictor(module, normalize, self._post, self._device, precision, runtime.grad_mode)
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
        ours = Contract(schema, self._model_digest, self._size)
        agreed = plan.agree(self._store, head, ours)
        if agreed.size is not None and agreed.size != self._size:
            self._start_loader(agreed.size)
        self._plan = _Plan(head, reader, schema, _digest_of(self._job.fingerprint()))

    def shard(self, key: ShardKey) -> Shard:
        """The shard's members, read from the plan."""
        return self._begun.reader.shard(key)

    def close(self) -> None:
        """End loader processes and threads, remove the spool, give torch its threads back."""
        if self._loader is not None:
            self._loader.close()
        self._committer.shutdown(wait=True, cancel_futures=True)
        shutil.rmtree(self._spool, ignore_errors=True)
        if self._threads_before is not None:
            import torch

            torch.set_num_threads(self._threads_before)

    # -- again and again ---------------------------------------------------------------------------------------

    def run(self, feed: ShardFeed) -> Iterator[Done | Failed]:
        """Take shards from the feed until it has none now; what became of each, as soon as it is known."""
        assert self._loader is not None, "load comes before run"
        taken = _Taken(feed)
        try:
            for batch in self._loader.batches(taken):
                yield from self._advance(taken, batch)
                yield from self._settled(most_pending=_COMMITS_PENDING)
        except BatchjobError as error:  # the loader itself: what it held is lost
            yield from self._lost(taken, error)
        for shard in taken.empty:
            self._seal(_Draft(self._spool, shard, self._begun.schema))
        yield from self._settled(most_pending=0)

    def _advance(self, taken: _Taken, batch: Batch) -> Iterator[Failed]:
        """One batch further. A shard that has failed is passed over to its end."""
        shard = taken.shards[batch.shard]
        key = shard.key
        draft = self._drafts.get(key.index)
        if draft is None:
            draft = self._drafts[key.index] = _Draft(self._spool, shard, self._begun.schema)
        if not draft.failed:
            try:
                self._predict(draft, batch)
            except Exception as error:  # noqa: BLE001 - ends this attempt; the driver decides how far it reaches
                draft.give_up()
                yield Failed(key, as_ours(error))
        if batch.start + self._batch_size >= key.rows:
            del self._drafts[key.index], taken.shards[key.index]
            if not draft.failed:
                self._seal(draft)

    def _lost(self, taken: _Taken, error: BatchjobError) -> Iterator[Failed]:
        """What the loader held when it failed. Shards that had failed before are not told twice."""
        for index, shard in taken.shards.items():
            draft = self._drafts.pop(index, None)
            if draft is None or not draft.failed:
                yield Failed(shard.key, error)
            if draft is not None:
                draft.give_up()

    def _predict(self, draft: _Draft, batch: Batch) -> None:
        if batch.trouble is not None:
            raise Unavailable(batch.trouble)
        columns: list[pa.Array] = []
        faults: Sequence[object] = ()
        began = time.perf_counter()
        if batch.pixels is not None:
            predicted = self._predictor(batch.pixels)
            columns, faults = self._post.columns(predicted.tensors), predicted.faults
        forward = time.perf_counter()
        draft.writer.add(
            rows(
                self._begun.schema,
                shard=draft.shard,
                start=batch.start,
                facts=batch.facts,
                columns=columns,
                faults=faults,  # type: ignore[arg-type]
                run_id=self._begun.head.plan,
                model_id=self._model_id,
            )
        )
        draft.spend(batch.seconds)
        draft.spend({"forward": forward - began, "write": time.perf_counter() - forward})

    def _seal(self, draft: _Draft) -> None:
        """Finish the part and commit it, off the critical path."""
        self._commits.append(self._committer.submit(self._commit, draft))

    def _commit(self, draft: _Draft) -> Event:
        try:
            made = draft.close(self._begun, self._model_digest)
            done = ledger.commit(self._store, draft.shard.key, draft.writer.path, made, self._still_wanted)
            examples = draft.writer.examples if done.ours else {}
            return Done(ShardResult(draft.shard.key, done.provenance, examples, done.ours, done.stat.etag))
        except Exception as error:  # noqa: BLE001 - ends this attempt
            return Failed(draft.shard.key, as_ours(error))
        finally:
            draft.writer.path.unlink(missing_ok=True)

    def _settled(self, most_pending: int) -> Iterator[Done | Failed]:
        """Commits that have ended; waits for the oldest while more than `most_pending` have not."""
        while self._commits and (len(self._commits) > most_pending or self._commits[0].done()):
            yield self._commits.popleft().result()  # type: ignore[misc]

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
                return self._prepare(self._reader.read(location).data)[0]
        raise InvalidJob(
            f"none of the first {len(self._setup.sample)} images can be decoded, so the model's input size is not "
            "known; give preprocess.resize or crop, or look at the input"
        )

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
            processes=chosen.processes,
            prefetch=chosen.prefetch,
            pin_memory=chosen.pin_memory,
            size=size,
            max_bytes=self._job.decode.max_bytes,
        )
        self._loader.start()


@dataclass(frozen=True)
class _Plan:
    """What the worker knows of the plan it works on."""

    head: Head
    reader: PlanReader
    schema: pa.Schema
    fingerprint: str


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


class _Draft:
    """A part in the making: one attempt at one shard."""

    def __init__(self, spool: Path, shard: Shard, schema: pa.Schema) -> None:
        self.shard = shard
        self.attempt = secrets.token_hex(8)
        self.failed = False
        self.writer = PartWriter(spool / f"{shard.key.index}-{self.attempt}.parquet", schema)
        self._began = time.perf_counter()
        self._seconds: dict[str, float] = {}

    def spend(self, seconds: Mapping[str, float]) -> None:
        """Add to the stage clocks."""
        for stage, spent in seconds.items():
            self._seconds[stage] = self._seconds.get(stage, 0.0) + spent

    def give_up(self) -> None:
        """No more of this attempt."""
        self.failed = True
        with suppress(OSError):
            self.writer.abandon()
        self.writer.path.unlink(missing_ok=True)

    def close(self, begun: _Plan, model: str) -> Provenance:
        """Write the footer; the file is the part."""
        if self.writer.rows != self.shard.key.rows:
            raise BatchjobError(
                f"shard {self.shard.key.index} has {self.shard.key.rows} images, {self.writer.rows} rows"
            )
        self.spend({"wall": time.perf_counter() - self._began})
        made = Provenance(
            plan=begun.head.plan,
            shard=self.shard.key.id,
            index=self.shard.key.index,
            attempt=self.attempt,
            revision=0,
            fingerprint=begun.fingerprint,
            model=model,
            rows=self.writer.rows,
            failed=self.writer.failed,
            errors=self.writer.errors,
            seconds={stage: round(spent, 4) for stage, spent in self._seconds.items()},
            versions={name: version(name) for name in _RECORDED},
        )
        self.writer.close(made)
        return made


def as_ours(error: Exception) -> BatchjobError:
    """An exception of ours as it is, any other as a failed attempt that names it."""
    if isinstance(error, BatchjobError):
        return error
    text = " ".join(str(error).split())[:500]
    return AttemptFailed(f"{type(error).__name__}: {text}")


def _device_name(device: torch.device) -> str:
    import torch

    return f"{device} ({torch.cuda.get_device_name(device)})" if device.type == "cuda" else str(device)


def _digest_of(fingerprint: Mapping[str, object]) -> str:
    return hashlib.sha256(json.dumps(fingerprint, sort_keys=True).encode()).hexdigest()
