"""One loaded model that turns shards into committed parts: the only file that knows the whole data path."""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import cached_property, partial
from pathlib import Path

from batchjob.concurrency import preload
from batchjob.errors import Stalled, Temporary
from batchjob.inference import cpu_parallelism
from batchjob.inference.autotune import trial_process
from batchjob.inference.autotune.autotuner import Agreement
from batchjob.inference.autotune.trial_process import Bench
from batchjob.inference.cpu_parallelism import Lanes, lanes
from batchjob.inference.device_errors import identity
from batchjob.inference.engine import Engine
from batchjob.inference.execution_config import Recipe
from batchjob.inference.fault_isolation import Guard
from batchjob.inference.gpu_decode import DeviceDecoding
from batchjob.inference.predictor import Predictor
from batchjob.job.job import Job
from batchjob.loader.loader import Loader
from batchjob.loader.quarantine import Quarantine
from batchjob.output import retry
from batchjob.output.part_builder import Assembly, Imprint
from batchjob.output.schema import row_schema
from batchjob.output.scratch import Spool
from batchjob.plan import chunks, contract
from batchjob.plan.contract import Contract
from batchjob.plan.head import Head, current, is_discarded
from batchjob.plan.reader import PlanReader
from batchjob.preprocessing.geometry import frame
from batchjob.preprocessing.transforms import Prepare
from batchjob.storage.probe import see_witness
from batchjob.storage.reader import Reader
from batchjob.storage.store import open_store
from batchjob.system import memory_given
from batchjob.types import Shard, ShardKey, Watch
from batchjob.worker.loader_setup import Loading
from batchjob.worker.messages import Event, Loaded, Setup
from batchjob.worker.plan_session import _SAMPLE, _digest_of, _Plan, first_attempt
from batchjob.worker.setup import _BRING_TRANSFORMS, _SLOW_SECONDS, _TRANSFORMS, _WARM_UP_ROWS
from batchjob.worker.shard_runner import Passage, PoolFeed
from batchjob.worker.watchdog import AttendedStore, Stopwatch

__all__ = ["Parts", "Worker"]

_log = logging.getLogger(__name__)


class Worker:
    """Loads once, then takes shards and commits their parts.

    Args:
        job: with its paths as they are on this machine.
        setup: what the driver told.
        cores: that may be used here, loader processes included.
        tell: called, from any thread, with what became of a shard.
        watch: told, from any thread, how long each stage of each batch took.

    Attributes:
        device: on which it runs, by its `identity` once that is known.
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
        self._reader = Reader(job.storage, outage=job.errors.outage_seconds)
        self._stopwatch = Stopwatch()
        silence = self._reader.outage(job.output.uri)  # one clock, where images and output lie in one bucket
        self._store = AttendedStore(open_store(job.output.uri, job.storage, outage=silence), self._stopwatch)
        self._spool = Spool()
        self._tell, self._watch = tell, watch
        self._stopped = threading.Event()
        self._plan: _Plan | None = None
        self._quarantine = Quarantine()
        self._assembly: Assembly | None = None
        self._loading: Loading | None = None
        self._threads_before: int | None = None
        self._pace = 0.0  # seconds an image takes, run as plainly as can be; 0 where nobody will ask
        self._engine: Engine
        self._predictor: Predictor
        self._guard: Guard | None = None
        self._passage: Passage | None = None
        self.device = job.runtime.device
        self._recipe = Recipe()
        self._lanes = Lanes(1, cores)

    # -- once --------------------------------------------------------------------------------------------------

    def load(self) -> Loaded:
        """Load the model, start the loader processes, warm up on the device.

        Raises:
            InvalidJob: model, labels, preprocessing, precision or device do not fit.
        """
        began = time.monotonic()
        cpu_parallelism.keep()
        see_witness(self._store, self._setup.witness)
        if self._job.runtime.loader.processes != 0:  # else nothing may ever come from there, and torch takes seconds
            preload(Loader.__module__, Prepare.__module__, trial_process.__name__, *self._needed_by_transforms())
        self._use_threads(lanes("cpu", self._cores).threads)
        self._engine = engine = Engine(self._job, self._reader, self._setup.sample)
        self.device = identity(engine.device)
        few_bytes = self._setup.few_bytes
        self._loading = loading = Loading(self._job, engine, self._reader, self._cores, few_bytes, self._stopwatch)
        loading.start()
        engine.try_out()
        self._warm_up(loading)
        return Loaded(
            device=self.device,
            precision=engine.recipe.precision,
            model=self._model_id,
            columns=tuple(column.name for column in engine.post.fields),
            batch_size=loading.batch_size,
            seconds=time.monotonic() - began,
            ahead=loading.ahead,
            row_bytes=getattr(engine.post, "row_bytes", 0),
        )

    def _warm_up(self, loading: Loading) -> None:
        """Run as plainly as can be; learn how many images fit at once, and how long one takes."""
        engine, example = self._engine, self._engine.example
        self._predictor = engine.predictor(engine.forward(Recipe()))
        rows = min(loading.batch_size, _WARM_UP_ROWS)
        if engine.device.type != "cpu":  # where memory is virtual, what does not fit is not refused but killed
            if loading.may_grow:
                most = loading.most
                first = min(loading.batch_size, most)
                loading.resize(self._predictor.largest_batch(example.shape, first, most, example.dtype))
            rows = loading.batch_size
        pace, kind = self._predictor.warm_up(example.shape, rows, example.dtype) / rows, engine.device.type
        self._lanes = lanes(kind, self._cores, alone=kind == "cpu" and engine.keeps_state(), memory=memory_given())
        self._use_threads(self._lanes.threads)
        if self._setup.few_bytes is None or pace * len(self._setup.sample) > _SLOW_SECONDS:
            took = self._predictor.warm_up(example.shape, loading.batch_size, example.dtype)
            self._pace = took / loading.batch_size / self._lanes.count

    def begin(self, number: int) -> None:
        """Join the plan of this number: agree with all other workers on schema, model and image size.

        Raises:
            InvalidJob: another worker has loaded another model, or makes other columns.
        """
        if self._plan is not None:
            return
        found, head = current(self._store)
        if head is None or found != number:
            raise Temporary(f"{self._store.uri}: plan {number} was discarded while this run was starting; run again")
        reader = PlanReader(self._store, head)
        engine, loading = self._engine, self._loaded
        schema = row_schema(list(reader.passthrough), engine.post.fields, has_id=self._job.input.has_id)
        ours = Contract(schema, self._digest, None if engine.varying else loading.size)
        agreed = contract.agree(self._store, head, ours)
        if agreed.size is not None and agreed.size != loading.size:
            loading.start(agreed.size)
        self._quarantine = Quarantine(self._store, head.folder)
        self._accelerate(head, reader)
        self._plan = _Plan(head, reader)
        self._assembly = Assembly(
            store=self._store,
            spool=self._spool.path,
            imprint=Imprint(
                plan=head.plan,
                fingerprint=_digest_of(self._job.fingerprint()),
                model=self._digest,
                model_id=self._model_id,
                recipe=self._recipe.words,
                schema=schema,
            ),
            post=engine.post,
            frames=partial(frame, engine.preprocess),
            wanted=self._still_wanted,
            tell=self._tell,
            watch=self._watch,
            stopwatch=self._stopwatch,
        )
        loading.loader.quarantine = self._quarantine
        self._guard = Guard(self._predictor, self._quarantine, self.device, self._stopwatch)
        self._passage = Passage(
            loading.source,
            self._guard,
            self._assembly,
            self._lanes.count,
            self._stopped.is_set,
            self._watch,
            partial(self._stopwatch.step, "the wait for a batch", storage=True, sign=loading.loader.last_sign),
        )

    def _accelerate(self, head: Head, reader: PlanReader) -> None:
        """Take up the recipe that stands for this device in this plan, or find it."""
        engine, seen = self._engine, reader.first(chunks.CHUNK_ROWS)
        bench = Bench(
            job=self._setup.job,
            base=self._job.base,
            data_base=Path(self._setup.folder),
            sample=tuple(ref.location for ref in seen[:_SAMPLE]),
            batch_size=self._loaded.batch_size,
            threads=self._lanes.threads,
        )
        images, lanes = len(seen) / self._sharers(), self._lanes.count
        agreement = Agreement(self._store, head, engine, bench, images, self._pace, self._stopped.is_set, lanes)
        decision, self._predictor = agreement.applied(agreement.reach())
        self._recipe = decision.recipe
        _log.info("%s on %s: %s", self._recipe.words, decision.device, decision.reason)

    def _sharers(self) -> int:
        """Workers that the images are shared among, as far as the job says."""
        workers = self._job.runtime.workers
        return workers if isinstance(workers, int) else 1 if workers == "auto" else workers.max

    def shard(self, key: ShardKey, again: bool = False) -> Shard:
        """The shard's members, read from the plan, and what has become known of deadly ones among them.

        At a retry these are the members whose rows hold an error. `again` where somebody has tried it before.
        """
        shard = self._begun.reader.shard(key)
        if key.revision:
            shard = retry.outstanding(self._store, shard, self._job.decode.max_bytes)
        if shard.refs:
            self._quarantine.learn([ref.position for ref in shard.refs], key.revision, again)
        if not self._loaded.divides:
            return shard
        return replace(
            shard, on_host=again or bool(key.revision) or not first_attempt(self._store, self._begun.head, key)
        )

    def close(self) -> None:
        """End loader processes and threads, remove the spool, give memory back, and torch its threads."""
        if self._loading is not None:
            self._loading.close()
        if self._assembly is not None:
            self._assembly.close()
        self._spool.close()
        cpu_parallelism.give_back()
        if self._threads_before is not None:
            import torch

            torch.set_num_threads(self._threads_before)

    # -- again and again ---------------------------------------------------------------------------------------

    def run(self, feed: PoolFeed) -> None:
        """Take shards from the feed until it has none now. What becomes of each is told, some of it later."""
        assert self._passage is not None, "begin comes before run"
        self._passage.run(feed)

    def stop(self) -> None:
        """Begin no further batch."""
        self._stopped.set()

    def overdue(self) -> Stalled | None:
        """What to tell when a step has shown no life for too long, else None; asked from another thread."""
        each = self._job.runtime.stall_seconds  # a batch that has one core of several takes as many times longer
        limits = each * self._lanes.count, each + self._job.errors.outage_seconds
        return self._guard.overdue(*limits) if self._guard else None

    def _still_wanted(self) -> None:
        if is_discarded(self._store, self._begun.head):
            raise Temporary(f"{self._store.uri}: the plan was discarded while this run was at work; run again")

    @property
    def parts(self) -> Parts:
        """What it works with, once begun, for a look at each alone."""
        assert self._assembly is not None, "begin comes before parts"
        on_device, loader = self._loaded.on_device, self._loaded.loader
        return Parts(self._reader, self._engine, loader, self._predictor, self._assembly, self._lanes, on_device)

    # -- parts of loading --------------------------------------------------------------------------------------

    @property
    def _begun(self) -> _Plan:
        assert self._plan is not None, "begin comes before work"
        return self._plan

    @property
    def _loaded(self) -> Loading:
        assert self._loading is not None, "load comes before work"
        return self._loading

    @property
    def _digest(self) -> str:
        return self._engine.digest

    @cached_property
    def _model_id(self) -> str:
        return f"{self._job.model.title}@{self._digest[:12]}"

    def _needed_by_transforms(self) -> tuple[str, ...]:
        """What a transform that is not our own is likely to import: once, and not in each loader process."""
        own = self._job.preprocess is not None and self._job.preprocess.transform is not None
        return (_TRANSFORMS,) if own or self._job.model.type in _BRING_TRANSFORMS else ()

    def _use_threads(self, threads: int) -> None:
        import torch

        if self._threads_before is None:
            self._threads_before = torch.get_num_threads()
        torch.set_num_threads(threads)


@dataclass(frozen=True)
class Parts:
    """What a worker puts together."""

    reader: Reader
    engine: Engine
    loader: Loader
    predictor: Predictor
    assembly: Assembly
    lanes: Lanes
    on_device: DeviceDecoding | None = None
