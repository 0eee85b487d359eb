"""Session of a worker on one plan: what it has agreed on with the plan's other workers, and the shards it reads."""

from __future__ import annotations

import hashlib
import json
import logging
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path

from batchjob.errors import Temporary
from batchjob.inference.autotune.autotuner import Autotuner
from batchjob.inference.autotune.trial_process import TrialSpec
from batchjob.inference.execution_config import ExecutionConfig
from batchjob.inference.predictor import Predictor
from batchjob.loader.quarantine import Quarantine
from batchjob.output import retry
from batchjob.output.part_builder import PartMetadata
from batchjob.output.schema import build_row_schema
from batchjob.plan.chunks import count_planned_images
from batchjob.plan.contract import Contract, put_or_read, verify
from batchjob.plan.head import PlanHead, is_discarded, read_current_head
from batchjob.plan.reader import PlanReader
from batchjob.types import Shard, ShardKey
from batchjob.worker.setup import LoadedWorker

__all__ = ["PlanSession"]

_log = logging.getLogger(__name__)
_TRIAL_IMAGES = 128  # images that a tuning trial may look at
# Size of an input, relative to what is planned of it, that is expected while it is still being listed.
_GROWTH = 10


@dataclass(frozen=True)
class PlanSession:
    """A loaded worker's part in one plan.

    Attributes:
        loaded: The worker.
        head: Head of the plan.
        reader: Reader of the plan's shards.
        contract: Schema, model digest, image shape and decisions that all workers of the plan have agreed on.
        execution_config: Execution config for this kind of device in this plan.
        predictor: The model in that config, warmed up.
        quarantine: Images of the plan that are known, or suspected, to kill a process.
    """

    loaded: LoadedWorker
    head: PlanHead
    reader: PlanReader
    contract: Contract
    execution_config: ExecutionConfig
    predictor: Predictor
    quarantine: Quarantine

    @classmethod
    def join(cls, loaded: LoadedWorker, number: int, is_stopped: Callable[[], bool] = lambda: False) -> PlanSession:
        """Join a plan: adopt its decisions, agree on schema, model and image shape; choose the execution config.

        Args:
            loaded: The worker.
            number: Number of the plan.
            is_stopped: Returns True if tuning must end at once.

        Raises:
            InvalidJob: Another worker has loaded another model, or makes other columns.
            Temporary: The plan has been discarded.
        """
        store = loaded.store
        current, head = read_current_head(store)
        if head is None or current != number:
            raise Temporary(f"{store.uri}: plan {number} was discarded while this run was starting; run again")
        reader = PlanReader(store, head)
        contract = _agree_on_contract(loaded, head, reader)
        config, predictor = _choose_execution_config(loaded, head, reader, is_stopped)
        quarantine = Quarantine(store, head.folder)
        loaded.loader_setup.loader.quarantine = quarantine
        return cls(loaded, head, reader, contract, config, predictor, quarantine)

    @property
    def part_metadata(self) -> PartMetadata:
        """Facts that every part of this session carries."""
        fingerprint = json.dumps(self.loaded.job.fingerprint(), sort_keys=True)
        return PartMetadata(
            plan_id=self.head.plan,
            fingerprint=hashlib.sha256(fingerprint.encode()).hexdigest(),
            model_digest=self.contract.model_digest,
            model_id=self.loaded.info.model,
            execution_config=self.execution_config.description,
            schema=self.contract.schema,
        )

    def read_shard(self, key: ShardKey, reattempt: bool = False) -> Shard:
        """Read a shard's image refs from the plan; for a retry, only those whose rows hold an error.

        Args:
            key: The shard.
            reattempt: The shard has been tried before, so the quarantine may hold images of it by now.

        Raises:
            BatchjobError: The plan, the part or the quarantine cannot be read.
        """
        loaded = self.loaded
        shard = self.reader.read_shard(key)
        if key.revision:
            shard = retry.select_error_rows(loaded.store, shard, loaded.job.decode.max_bytes)
        if shard.refs:
            self.quarantine.load([ref.position for ref in shard.refs], key.revision, reattempt)
        return shard

    def raise_if_discarded(self) -> None:
        """Raise Temporary if the plan has been discarded."""
        store = self.loaded.store
        if is_discarded(store, self.head):
            raise Temporary(f"{store.uri}: the plan was discarded while this run was at work; run again")


def _agree_on_contract(loaded: LoadedWorker, head: PlanHead, reader: PlanReader) -> Contract:
    """Put this worker's contract if it is the first one; else adopt the plan's decisions and image shape."""
    engine, loader_setup = loaded.engine, loaded.loader_setup
    agreed = put_or_read(loaded.store, head, _make_contract(loaded, reader))
    image_transform = engine.image_transform
    engine.adopt(agreed.decisions)
    own = _make_contract(loaded, reader)
    verify(agreed, own, loaded.store.uri)
    image_shape = agreed.image_shape or loader_setup.image_shape
    if image_shape != loader_setup.image_shape or engine.image_transform is not image_transform:
        loader_setup.restart(image_shape)
    # Both schemas are equal, but only ours has its metadata.
    return replace(agreed, schema=own.schema)


def _make_contract(loaded: LoadedWorker, reader: PlanReader) -> Contract:
    """Make the contract as this worker would have it."""
    engine = loaded.engine
    schema = build_row_schema(
        list(reader.passthrough_schema), engine.postprocess.fields, has_id=loaded.job.input.has_id
    )
    image_shape = None if engine.variable_size else loaded.loader_setup.image_shape
    return Contract(schema, engine.digest, image_shape, engine.decided_values, loaded.setup.files_id)


def _choose_execution_config(
    loaded: LoadedWorker, head: PlanHead, reader: PlanReader, is_stopped: Callable[[], bool]
) -> tuple[ExecutionConfig, Predictor]:
    """Use the config that the plan holds for this kind of device, or find one by trials."""
    job, parallelism = loaded.job, loaded.cpu_parallelism
    workers = loaded.setup.pool_size or job.runtime.requested_workers  # that share the images
    refs = reader.read_first_refs(_TRIAL_IMAGES)
    spec = TrialSpec(
        job=loaded.setup.job,
        job_folder=job.folder,
        data_folder=Path(loaded.setup.job_folder),
        sample_locations=tuple(ref.location for ref in refs),
        batch_size=loaded.loader_setup.batch_size,
        threads=parallelism.threads_per_batch,
        decisions=loaded.engine.decided_values,
    )
    autotuner = Autotuner(
        store=loaded.store,
        plan_folder=head.folder,
        task_fingerprint=head.fingerprint.get("task"),
        engine=loaded.engine,
        trial_spec=spec,
        expected_images=_expect_images(loaded, head) / workers,
        seconds_per_image=loaded.seconds_per_image,
        is_stopped=is_stopped,
        parallel_batches=parallelism.parallel_batches,
    )
    decision, predictor = autotuner.build_predictor(autotuner.decide())
    _log.info("%s on %s: %s", decision.config.description, decision.device, decision.reason)
    return decision.config, predictor


def _expect_images(loaded: LoadedWorker, head: PlanHead) -> int:
    """Return the images that all workers of the plan together may expect.

    They are those of the input, where its size is known, else those of the plan. While the input is still being listed
    the plan holds fewer than there are, and several times as many are expected: needless trials cost a short run half
    a minute, missed ones cost a long run hours.
    """
    if loaded.setup.known_images:
        return loaded.setup.known_images
    planned, is_complete = count_planned_images(loaded.store, head)
    return planned if is_complete else planned * _GROWTH
