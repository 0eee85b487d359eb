"""One loaded model that turns shards into committed parts: the only file that knows the whole data path."""

from __future__ import annotations

import hashlib
import json
import logging
import os
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import suppress
from dataclasses import dataclass
from functools import cached_property, partial
from itertools import count
from pathlib import Path
from typing import TYPE_CHECKING

from batchjob import plan, trial
from batchjob.agreement import Agreement
from batchjob.assembly import Assembly, Imprint, as_ours
from batchjob.engine import Engine
from batchjob.environment import memory_given
from batchjob.errors import AttemptFailed, BatchjobError, Interrupted, InvalidJob, StorageError, Temporary, Unavailable
from batchjob.job import Job
from batchjob.loader import FEW_IMAGES, Loader, Quarantine, preload, settle
from batchjob.plan import Contract, Head, PlanReader
from batchjob.pool import Event, Loaded, Setup
from batchjob.predict import Predicted, Predictor
from batchjob.prepare import Prepare
from batchjob.records import Batch, Recipe, Shard, ShardKey, Span, Watch
from batchjob.sink import row_schema
from batchjob.spool import Spool
from batchjob.storage import Reader, open_store
from batchjob.takes import PoolFeed, Taken
from batchjob.transform import frame
from batchjob.trial import Bench

if TYPE_CHECKING:
    import torch

__all__ = ["Parts", "Worker"]

_log = logging.getLogger(__name__)
_BATCH_SIZES = {"cuda": 128}
_BATCH_SIZE_ELSEWHERE = 32
_BATCH_SIZE_MOST = 1024
_WARM_UP_ROWS = 8
_SAMPLE = 128  # images that a trial may look at


class Worker:
    """Loads once, then takes shards and commits their parts.

    Args:
        job: with its paths as they are on this machine.
        setup: what the driver told.
        cores: that may be used here, loader processes included.
        tell: called, from any thread, with what became of a shard.
        watch: told, from any thread, how long each stage of each batch took.
    """

    def __init__(
        self,
        job: Job,
        setup: Setup,
        cores: int,
        tell: Callable[[Event], None] = lambda event: None,
        watch: Watch = lambda span: None,
    ) -> None:
        self._job, self._setup, self._cores = job, setup, cores
        self._reader = Reader(job.storage)
        self._store = open_store(job.output.uri, job.storage)
        self._spool = Spool()
        self._tell, self._watch = tell, watch
        self._stopped = threading.Event()
        self._takes = count()
        self._plan: _Plan | None = None
        self._quarantine = Quarantine()
        self._assembly: Assembly | None = None
        self._loader: Loader | None = None
        self._threads_before: int | None = None
        self._pace = 0.0  # seconds an image takes, run as plainly as can be; 0 where nobody will ask
        self._engine: Engine
        self._predictor: Predictor

    # -- once --------------------------------------------------------------------------------------------------

    def load(self) -> Loaded:
        """Load the model, start the loader processes, warm up on the device.

        Raises:
            InvalidJob: model, labels, preprocessing, precision or device do not fit.
        """
        began = time.monotonic()
        self._see_witness()
        preload(Loader.__module__, Prepare.__module__, trial.__name__)
        self._use_cores()
        self._engine = engine = Engine(self._job, self._reader, self._setup.sample)
        self._batch_size = self._first_batch_size()
        self._start_loader(tuple(engine.example.shape))
        engine.try_out()
        self._warm_up()
        return Loaded(
            device=_device_name(engine.device),
            precision=engine.recipe.precision,
            model=self._model_id,
            columns=tuple(column.name for column in engine.post.fields),
            batch_size=self._batch_size,
            seconds=time.monotonic() - began,
            ahead=self._ahead,
            row_bytes=getattr(engine.post, "row_bytes", 0),
        )

    def _warm_up(self) -> None:
        """Run as plainly as can be; learn how many images fit at once, and how long one takes."""
        engine, example = self._engine, self._engine.example
        self._predictor = engine.predictor(engine.forward(Recipe()))
        rows = min(self._batch_size, _WARM_UP_ROWS)
        if engine.device.type != "cpu":  # where memory is virtual, what does not fit is not refused but killed
            if self._job.runtime.batch_size == "auto" and engine.model.batch_size is None:
                first, dtype = self._batch_size, example.dtype
                self._resize(self._predictor.largest_batch(example.shape, first, _BATCH_SIZE_MOST, dtype))
            rows = self._batch_size
        self._predictor.warm_up(example.shape, rows, example.dtype)
        if not self._setup.few:
            began = time.perf_counter()
            self._predictor.warm_up(example.shape, self._batch_size, example.dtype)
            self._pace = (time.perf_counter() - began) / self._batch_size

    def begin(self, number: int) -> None:
        """Join the plan of this number: agree with all other workers on schema, model and image size.

        Raises:
            InvalidJob: another worker has loaded another model, or makes other columns.
        """
        if self._plan is not None:
            return
        found, head = plan.current(self._store)
        if head is None or found != number:
            raise Temporary(f"{self._store.uri}: plan {number} was discarded while this run was starting; run again")
        reader = PlanReader(self._store, head)
        engine = self._engine
        schema = row_schema(list(reader.passthrough), engine.post.fields, has_id=self._job.input.has_id)
        ours = Contract(schema, self._digest, None if engine.varying else self._size)
        agreed = plan.agree(self._store, head, ours)
        if agreed.size is not None and agreed.size != self._size:
            self._start_loader(agreed.size)
        self._quarantine = Quarantine(self._store, head.folder)
        self._accelerate(head, reader)
        self._plan = _Plan(head, reader)
        self._assembly = Assembly(
            store=self._store,
            spool=self._spool.path,
            imprint=Imprint(head.plan, _digest_of(self._job.fingerprint()), self._digest, self._model_id, schema),
            post=engine.post,
            frames=partial(frame, engine.preprocess),
            lost=self._predictor.lost_fault(),
            wanted=self._still_wanted,
            tell=self._tell,
            watch=self._watch,
        )

    def _accelerate(self, head: Head, reader: PlanReader) -> None:
        """Take up the recipe that stands for this device in this plan, or find it."""
        engine, seen = self._engine, reader.first(plan.CHUNK_ROWS)
        bench = Bench(
            job=self._setup.job,
            base=self._job.base,
            data_base=Path(self._setup.folder),
            sample=tuple(ref.location for ref in seen[:_SAMPLE]),
            batch_size=self._batch_size,
            cores=self._cores,
        )
        agreement = Agreement(
            self._store, head, engine, bench, len(seen) / self._sharers(), self._pace, self._stopped.is_set
        )
        decision, forward = agreement.applied(agreement.reach())
        recipe = decision.recipe
        _log.info("%s on %s: %s", recipe.words, decision.device, decision.reason)
        if recipe != Recipe():
            fixed = self._batch_size if recipe.fixed_batch and not engine.varying else None
            self._predictor = engine.predictor(forward, fixed)
            self._predictor.warm_up(engine.example.shape, self._batch_size, engine.example.dtype)

    def _sharers(self) -> int:
        """Workers that the images are shared among, as far as the job says."""
        workers = self._job.runtime.workers
        return workers if isinstance(workers, int) else 1 if workers == "auto" else workers.max

    def shard(self, key: ShardKey) -> Shard:
        """The shard's members, read from the plan, and what has become known of deadly ones among them."""
        shard = self._begun.reader.shard(key)
        if shard.refs:
            self._quarantine.learn(range(shard.refs[0].position, shard.refs[-1].position + 1))
        return shard

    def close(self) -> None:
        """End loader processes and threads, remove the spool, give torch its threads back."""
        if self._loader is not None:
            self._loader.close()
        if self._assembly is not None:
            self._assembly.close()
        self._spool.close()
        if self._threads_before is not None:
            import torch

            torch.set_num_threads(self._threads_before)

    # -- again and again ---------------------------------------------------------------------------------------

    def run(self, feed: PoolFeed) -> None:
        """Take shards from the feed until it has none now. What becomes of each is told, some of it later."""
        assert self._loader is not None, "load comes before run"
        assert self._assembly is not None, "begin comes before run"
        self._loader.quarantine = self._quarantine
        taken = Taken(feed, self._assembly.failed, self._takes)
        try:
            for batch in self._awaited(self._loader.batches(taken)):
                if self._stopped.is_set():
                    return
                self._advance(taken, batch)
        except BatchjobError as error:  # the loader itself: what it held is lost
            for place, shard in enumerate(taken.running()):
                self._assembly.fail(shard, _beside(error) if place else error)
        for shard in taken.empty:
            self._assembly.add_empty(shard)

    def stop(self) -> None:
        """Begin no further batch."""
        self._stopped.set()

    def _advance(self, taken: Taken, batch: Batch) -> None:
        assert self._assembly is not None
        shard = taken.shards.get(batch.take)
        if shard is None or not taken.wants(shard):
            return
        began = time.perf_counter()
        try:
            predicted = self._predicted(batch)
        except Exception as error:  # noqa: BLE001 - ends this attempt; the driver decides how far it reaches
            del taken.shards[batch.take]
            self._assembly.fail(shard, as_ours(error))
            return
        last = batch.start + len(batch.facts) >= shard.key.rows
        seconds = self._spent("forward", began, len(batch.facts))
        self._assembly.add(shard, batch, predicted, seconds=seconds, last=last)
        if last:
            del taken.shards[batch.take]

    def _awaited(self, batches: Iterator[Batch]) -> Iterator[Batch]:
        """The same; the watch is told how long each was waited for, and how it was made."""
        while True:
            began = time.perf_counter()
            batch = next(batches, None)
            self._spent("wait", began, 0 if batch is None else len(batch.facts))
            if batch is None:
                return
            for span in batch.spans:
                self._watch(span)
            yield batch

    def _spent(self, stage: str, began: float, images: int) -> float:
        """Seconds since `began`, which the watch is told of."""
        ended = time.perf_counter()
        self._watch(Span(stage, began, ended, os.getpid(), images))
        return ended - began

    def _predicted(self, batch: Batch) -> Predicted | None:
        if batch.trouble is not None:
            raise Unavailable(batch.trouble)
        return None if batch.pixels is None else self._predictor(batch.pixels, batch.shapes)

    def _still_wanted(self) -> None:
        if plan.is_discarded(self._store, self._begun.head):
            raise Temporary(f"{self._store.uri}: the plan was discarded while this run was at work; run again")

    @property
    def parts(self) -> Parts:
        """What it works with, once begun, for a look at each alone."""
        assert self._loader is not None, "load comes before parts"
        assert self._assembly is not None, "begin comes before parts"
        return Parts(self._reader, self._engine, self._loader, self._predictor, self._assembly)

    # -- parts of loading --------------------------------------------------------------------------------------

    @property
    def _begun(self) -> _Plan:
        assert self._plan is not None, "begin comes before work"
        return self._plan

    @property
    def _digest(self) -> str:
        return self._engine.digest

    @cached_property
    def _model_id(self) -> str:
        return f"{self._job.model.title}@{self._digest[:12]}"

    def _first_batch_size(self) -> int:
        asked = self._job.runtime.batch_size
        if asked != "auto":
            return asked
        own = self._engine.model.batch_size
        return own or _BATCH_SIZES.get(self._engine.device.type, _BATCH_SIZE_ELSEWHERE)

    def _resize(self, batch_size: int) -> None:
        self._batch_size = batch_size
        if self._loader is not None:
            self._loader.batch_size = batch_size

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

    def _start_loader(self, size: tuple[int, ...]) -> None:
        """Start a loader for images of this size, in place of one for another."""
        if self._loader is not None:
            self._loader.close()
        self._size = size
        few = FEW_IMAGES if self._setup.few else None
        cuda = self._engine.device.type == "cuda"
        chosen = settle(
            self._job.runtime.loader,
            cores=self._cores,
            images=few,
            cuda=cuda,
            memory=memory_given(),
            max_pixels=self._job.decode.max_pixels,
        )
        self._ahead = chosen.processes * chosen.prefetch * self._batch_size
        self._loader = Loader(
            reader=self._reader,
            prepare=self._engine.prepare,
            batch_size=self._batch_size,
            plan=chosen,
            size=size,
            varying=self._engine.varying,
            max_bytes=self._job.decode.max_bytes,
        )
        self._loader.start()


@dataclass(frozen=True)
class Parts:
    """What a worker puts together."""

    reader: Reader
    engine: Engine
    loader: Loader
    predictor: Predictor
    assembly: Assembly


@dataclass(frozen=True)
class _Plan:
    """What the worker knows of the plan it works on."""

    head: Head
    reader: PlanReader


def _beside(error: BatchjobError) -> BatchjobError:
    """What is said of shards that were queued behind the one that a loader process died at."""
    return Interrupted(error.message) if isinstance(error, AttemptFailed) else error


def _device_name(device: torch.device) -> str:
    import torch

    return f"{device} ({torch.cuda.get_device_name(device)})" if device.type == "cuda" else str(device)


def _digest_of(fingerprint: Mapping[str, object]) -> str:
    return hashlib.sha256(json.dumps(fingerprint, sort_keys=True).encode()).hexdigest()
