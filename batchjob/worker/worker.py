"""Worker: the one place that puts loader, model and part builder together, and runs shards through them."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

from batchjob.errors import BatchjobError, WorkerStalled
from batchjob.inference.fault_isolation import FaultIsolatingPredictor
from batchjob.loader.shard_queue import ShardQueue
from batchjob.output.part_builder import PartBuilder
from batchjob.output.provenance import ShardResult
from batchjob.preprocessing.geometry import compute_image_geometry
from batchjob.types import ShardKey, TimingSink
from batchjob.worker.messages import ShardCommitted, ShardFailed
from batchjob.worker.plan_session import PlanSession
from batchjob.worker.setup import LoadedWorker
from batchjob.worker.shard_runner import ShardRunner

__all__ = ["Worker"]


class Worker:
    """Runs shards of one plan: images in, committed parts out.

    Example:
        >>> with closing(load(job, setup, cores=4)) as loaded:
        ...     session = PlanSession.join(loaded, number=0)
        ...     with closing(Worker(loaded, session, on_event=print)) as worker:
        ...         worker.run(ShardQueue.of([session.read_shard(key) for key in keys]))

    Args:
        loaded: The loaded model and loader.
        session: The plan.
        on_event: Called once per attempt, from any thread, with its result.
        timing_sink: Receives, from any thread, how long each stage of each batch took; by default nothing does.
        is_stopped: Returns True as soon as no further batch may begin; by default never.

    Attributes:
        loaded: The loaded model and loader.
        session: The plan.
        part_builder: Writes and commits the parts.
    """

    def __init__(
        self,
        loaded: LoadedWorker,
        session: PlanSession,
        *,
        on_event: Callable[[ShardCommitted | ShardFailed], None],
        timing_sink: TimingSink = lambda timing: None,
        is_stopped: Callable[[], bool] = lambda: False,
    ) -> None:
        self.loaded, self.session, self._on_event = loaded, session, on_event
        engine, loader_setup, watchdog = loaded.engine, loaded.loader_setup, loaded.watchdog
        self.part_builder = PartBuilder(
            store=loaded.store,
            scratch_folder=loaded.scratch.path,
            metadata=session.part_metadata,
            postprocess=engine.postprocess,
            get_geometry=partial(compute_image_geometry, engine.preprocess),
            raise_if_discarded=session.raise_if_discarded,
            on_result=self._report_result,
            timing_sink=timing_sink,
            step=watchdog.step,
        )
        self._predictor = FaultIsolatingPredictor(
            session.predictor, session.quarantine, loaded.info.device, watchdog.step
        )
        last_progress = loader_setup.loader.last_progress
        self._runner = ShardRunner(
            loader_setup.loader,
            self._predictor,
            self.part_builder,
            loaded.cpu_parallelism.parallel_batches,
            is_stopped,
            timing_sink,
            partial(watchdog.step, "the wait for a batch", storage=True, last_progress=last_progress),
        )

    def run(self, queue: ShardQueue) -> None:
        """Run shards until the queue has none now. The last results may be reported some time later."""
        self._runner.run(queue)

    def find_stall(self) -> WorkerStalled | None:
        """Return an error if a step has shown no progress for too long. Called from another thread than `run`."""
        job = self.loaded.job
        # A batch that has one of n cores to itself may take n times as long.
        seconds = job.runtime.stall_seconds * self.loaded.cpu_parallelism.parallel_batches
        storage_seconds = job.runtime.stall_seconds + job.errors.outage_seconds
        step = self.loaded.watchdog.stalled_step(seconds, storage_seconds)
        return None if step is None else self._predictor.explain_stall(step, seconds)

    def close(self) -> None:
        """End the loader, then finish the parts that are complete, commits included."""
        # First the loader: a commit may wait for its store for long.
        self.loaded.loader_setup.close()
        self.part_builder.close()

    def _report_result(self, key: ShardKey, result: ShardResult | BatchjobError) -> None:
        self._on_event(ShardCommitted(result) if isinstance(result, ShardResult) else ShardFailed(key, result))
