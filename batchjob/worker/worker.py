"""One loaded model that turns shards into committed parts: the only file that knows the whole data path."""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import cached_property, partial
from pathlib import Path

from batchjob.concurrency import start_forkserver
from batchjob.errors import BatchjobError, Temporary, WorkerStalled
from batchjob.inference import cpu_parallelism
from batchjob.inference.autotune import trial_process
from batchjob.inference.autotune.autotuner import Autotuner
from batchjob.inference.autotune.trial_process import TrialSpec
from batchjob.inference.cpu_parallelism import CpuParallelism, choose_cpu_parallelism
from batchjob.inference.devices import identify_device
from batchjob.inference.engine import Engine
from batchjob.inference.execution_config import ExecutionConfig
from batchjob.inference.fault_isolation import FaultIsolatingPredictor
from batchjob.inference.gpu_decode import GpuDecodingLoader
from batchjob.inference.predictor import Predictor
from batchjob.job.job import Job
from batchjob.loader.loader import Loader
from batchjob.loader.quarantine import Quarantine
from batchjob.loader.shard_queue import ShardQueue
from batchjob.output import retry
from batchjob.output.part_builder import PartBuilder, PartMetadata
from batchjob.output.provenance import ShardResult
from batchjob.output.schema import build_row_schema
from batchjob.output.scratch import ScratchFolder
from batchjob.plan import chunks, contract
from batchjob.plan.contract import Contract
from batchjob.plan.head import PlanHead, is_discarded, read_current_head
from batchjob.plan.reader import PlanReader
from batchjob.preprocessing.geometry import compute_image_geometry
from batchjob.preprocessing.transforms import ImageTransform
from batchjob.storage.probe import check_visibility
from batchjob.storage.reader import Reader
from batchjob.storage.store import open_store
from batchjob.system import available_memory
from batchjob.types import Shard, ShardKey, TimingSink
from batchjob.worker.loader_setup import LoaderSetup
from batchjob.worker.messages import ShardCommitted, ShardFailed, WorkerEvent, WorkerInfo, WorkerSetup
from batchjob.worker.plan_session import _SAMPLE, _digest_of, _JoinedPlan, claim_first_attempt
from batchjob.worker.setup import _BRING_TRANSFORMS, _SLOW_SECONDS, _TRANSFORMS, _WARM_UP_ROWS
from batchjob.worker.shard_runner import ShardRunner
from batchjob.worker.watchdog import MonitoredStore, Watchdog

__all__ = ["Worker", "WorkerComponents"]

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
        setup: WorkerSetup,
        cores: int,
        on_event: Callable[[WorkerEvent], None] = lambda event: None,
        timing_sink: TimingSink = lambda span: None,
    ) -> None:
        self._job, self._setup, self._cores = job, setup, cores
        self._reader = Reader(job.storage, outage_timeout=job.errors.outage_seconds)
        self._stopwatch = Watchdog()
        silence = self._reader.outage(job.output.uri)  # one clock, where images and output lie in one bucket
        self._store = MonitoredStore(open_store(job.output.uri, job.storage, outage=silence), self._stopwatch)
        self._spool = ScratchFolder()
        self._tell, self._watch = on_event, timing_sink
        self._stopped = threading.Event()
        self._plan: _JoinedPlan | None = None
        self._quarantine = Quarantine()
        self._assembly: PartBuilder | None = None
        self._loading: LoaderSetup | None = None
        self._threads_before: int | None = None
        self._pace = 0.0  # seconds an image takes, run as plainly as can be; 0 where nobody will ask
        self._engine: Engine
        self._predictor: Predictor
        self._guard: FaultIsolatingPredictor | None = None
        self._passage: ShardRunner | None = None
        self.device = job.runtime.device
        self._recipe = ExecutionConfig()
        self._lanes = CpuParallelism(1, cores)

    # -- once --------------------------------------------------------------------------------------------------

    def load(self) -> WorkerInfo:
        """Load the model, start the loader processes, warm up on the device.

        Raises:
            InvalidJob: model, labels, preprocessing, precision or device do not fit.
        """
        began = time.monotonic()
        cpu_parallelism.retain_freed_memory()
        check_visibility(self._store, self._setup.visibility_check)
        if self._job.runtime.loader.processes != 0:  # else nothing may ever come from there, and torch takes seconds
            start_forkserver(
                Loader.__module__, ImageTransform.__module__, trial_process.__name__, *self._needed_by_transforms()
            )
        self._use_threads(choose_cpu_parallelism("cpu", self._cores).threads_per_batch)
        self._engine = engine = Engine(self._job, self._reader, self._setup.sample)
        self.device = identify_device(engine.device)
        few_bytes = self._setup.small_input_bytes
        self._loading = loading = LoaderSetup(self._job, engine, self._reader, self._cores, few_bytes, self._stopwatch)
        loading.start()
        engine.build_postprocess()
        self._warm_up(loading)
        return WorkerInfo(
            device=self.device,
            precision=engine.requested_config.precision,
            model=self._model_id,
            columns=tuple(column.name for column in engine.postprocess.fields),
            batch_size=loading.batch_size,
            seconds=time.monotonic() - began,
            ahead=loading.images_in_flight,
            row_bytes=getattr(engine.postprocess, "row_bytes", 0),
        )

    def _warm_up(self, loading: LoaderSetup) -> None:
        """Run as plainly as can be; learn how many images fit at once, and how long one takes."""
        engine, example = self._engine, self._engine.example_image
        self._predictor = engine.build_predictor(engine.build_forward(ExecutionConfig()))
        rows = min(loading.batch_size, _WARM_UP_ROWS)
        if engine.device.type != "cpu":  # where memory is virtual, what does not fit is not refused but killed
            if loading.chooses_batch_size:
                most = loading.max_batch_size
                first = min(loading.batch_size, most)
                loading.set_batch_size(self._predictor.find_largest_batch(example.shape, first, most, example.dtype))
            rows = loading.batch_size
        pace, kind = self._predictor.warm_up(example.shape, rows, example.dtype) / rows, engine.device.type
        self._lanes = choose_cpu_parallelism(
            kind, self._cores, sequential=kind == "cpu" and engine.is_stateful(), memory=available_memory()
        )
        self._use_threads(self._lanes.threads_per_batch)
        if self._setup.small_input_bytes is None or pace * len(self._setup.sample) > _SLOW_SECONDS:
            took = self._predictor.warm_up(example.shape, loading.batch_size, example.dtype)
            self._pace = took / loading.batch_size / self._lanes.parallel_batches

    def join_plan(self, number: int) -> None:
        """Join the plan of this number: agree with all other workers on schema, model and image size.

        Raises:
            InvalidJob: another worker has loaded another model, or makes other columns.
        """
        if self._plan is not None:
            return
        found, head = read_current_head(self._store)
        if head is None or found != number:
            raise Temporary(f"{self._store.uri}: plan {number} was discarded while this run was starting; run again")
        reader = PlanReader(self._store, head)
        engine, loading = self._engine, self._loaded
        schema = build_row_schema(
            list(reader.passthrough_schema), engine.postprocess.fields, has_id=self._job.input.has_id
        )
        ours = Contract(schema, self._digest, None if engine.variable_size else loading.image_shape)
        agreed = contract.put_or_verify(self._store, head, ours)
        if agreed.image_shape is not None and agreed.image_shape != loading.image_shape:
            loading.start(agreed.image_shape)
        self._quarantine = Quarantine(self._store, head.folder)
        self._accelerate(head, reader)
        self._plan = _JoinedPlan(head, reader)
        self._assembly = PartBuilder(
            store=self._store,
            scratch_folder=self._spool.path,
            metadata=PartMetadata(
                plan_id=head.plan,
                fingerprint=_digest_of(self._job.fingerprint()),
                model_digest=self._digest,
                model_id=self._model_id,
                execution_config=self._recipe.description,
                schema=schema,
            ),
            postprocess=engine.postprocess,
            get_geometry=partial(compute_image_geometry, engine.preprocess),
            raise_if_discarded=self._still_wanted,
            on_result=self._report,
            timing_sink=self._watch,
            step=self._stopwatch.step,
        )
        loading.loader.quarantine = self._quarantine
        self._guard = FaultIsolatingPredictor(self._predictor, self._quarantine, self.device, self._stopwatch.step)
        self._passage = ShardRunner(
            loading.batch_source,
            self._guard,
            self._assembly,
            self._lanes.parallel_batches,
            self._stopped.is_set,
            self._watch,
            partial(
                self._stopwatch.step, "the wait for a batch", storage=True, last_progress=loading.loader.last_progress
            ),
        )

    def _accelerate(self, head: PlanHead, reader: PlanReader) -> None:
        """Take up the recipe that stands for this device in this plan, or find it."""
        engine, seen = self._engine, reader.read_first_refs(chunks.CHUNK_ROWS)
        bench = TrialSpec(
            job=self._setup.job,
            base=self._job.folder,
            data_base=Path(self._setup.job_folder),
            sample_locations=tuple(ref.location for ref in seen[:_SAMPLE]),
            batch_size=self._loaded.batch_size,
            threads=self._lanes.threads_per_batch,
        )
        images, lanes = len(seen) / self._sharers(), self._lanes.parallel_batches
        agreement = Autotuner(
            store=self._store,
            plan_folder=head.folder,
            task_fingerprint=head.fingerprint.get("task"),
            engine=engine,
            trial_spec=bench,
            expected_images=images,
            seconds_per_image=self._pace,
            is_stopped=self._stopped.is_set,
            parallel_batches=lanes,
        )
        decision, self._predictor = agreement.build_predictor(agreement.decide())
        self._recipe = decision.recipe
        _log.info("%s on %s: %s", self._recipe.description, decision.device, decision.reason)

    def _sharers(self) -> int:
        """Workers that the images are shared among, as far as the job says."""
        workers = self._job.runtime.workers
        return workers if isinstance(workers, int) else 1 if workers == "auto" else workers.max

    def read_shard(self, key: ShardKey, reattempt: bool = False) -> Shard:
        """The shard's members, read from the plan, and what has become known of deadly ones among them.

        At a retry these are the members whose rows hold an error. `again` where somebody has tried it before.
        """
        shard = self._begun.reader.read_shard(key)
        if key.revision:
            shard = retry.select_error_rows(self._store, shard, self._job.decode.max_bytes)
        if shard.refs:
            self._quarantine.load([ref.position for ref in shard.refs], key.revision, reattempt)
        if not self._loaded.decodes_on_gpu:
            return shard
        return replace(
            shard,
            decode_on_cpu=reattempt
            or bool(key.revision)
            or not claim_first_attempt(self._store, self._begun.head, key),
        )

    def close(self) -> None:
        """End loader processes and threads, remove the spool, give memory back, and torch its threads."""
        if self._loading is not None:
            self._loading.close()
        if self._assembly is not None:
            self._assembly.close()
        self._spool.close()
        cpu_parallelism.release_freed_memory()
        if self._threads_before is not None:
            import torch

            torch.set_num_threads(self._threads_before)

    # -- again and again ---------------------------------------------------------------------------------------

    def run(self, queue: ShardQueue) -> None:
        """Take shards from the feed until it has none now. What becomes of each is told, some of it later."""
        assert self._passage is not None, "begin comes before run"
        self._passage.run(queue)

    def stop(self) -> None:
        """Begin no further batch."""
        self._stopped.set()

    def find_stall(self) -> WorkerStalled | None:
        """What to tell when a step has shown no life for too long, else None; asked from another thread."""
        each = self._job.runtime.stall_seconds  # a batch that has one core of several takes as many times longer
        limits = each * self._lanes.parallel_batches, each + self._job.errors.outage_seconds
        step = self._stopwatch.stalled_step(*limits) if self._guard else None
        return self._guard.explain_stall(step, limits[0]) if self._guard and step else None

    def _report(self, key: ShardKey, result: ShardResult | BatchjobError) -> None:
        self._tell(ShardCommitted(result) if isinstance(result, ShardResult) else ShardFailed(key, result))

    def _still_wanted(self) -> None:
        if is_discarded(self._store, self._begun.head):
            raise Temporary(f"{self._store.uri}: the plan was discarded while this run was at work; run again")

    @property
    def components(self) -> WorkerComponents:
        """What it works with, once begun, for a look at each alone."""
        assert self._assembly is not None, "begin comes before parts"
        on_device, loader = self._loaded.gpu_decoding, self._loaded.loader
        return WorkerComponents(
            self._reader, self._engine, loader, self._predictor, self._assembly, self._lanes, on_device
        )

    # -- parts of loading --------------------------------------------------------------------------------------

    @property
    def _begun(self) -> _JoinedPlan:
        assert self._plan is not None, "begin comes before work"
        return self._plan

    @property
    def _loaded(self) -> LoaderSetup:
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
class WorkerComponents:
    """What a worker puts together."""

    reader: Reader
    engine: Engine
    loader: Loader
    predictor: Predictor
    part_builder: PartBuilder
    cpu_parallelism: CpuParallelism
    gpu_decoding: GpuDecodingLoader | None = None
