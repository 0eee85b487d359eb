"""Session of a worker on a plan: what it agrees on with the others, and the shards it reads."""

from __future__ import annotations

import hashlib
import json
from dataclasses import replace
from pathlib import Path

import pytest
from PIL import Image

import batchjob
from batchjob.errors import InvalidJob, Temporary
from batchjob.inference.autotune.autotuner import Autotuner
from batchjob.inference.autotune.decision import TuningDecision
from batchjob.inference.execution_config import ExecutionConfig
from batchjob.loader.quarantine import Quarantine
from batchjob.loader.shard_queue import ShardQueue
from batchjob.settings import Decision
from batchjob.storage.store import open_store
from batchjob.tasks.embedding import EmbeddingTask
from batchjob.types import ErrorRecord, ImageInfo
from batchjob.worker.plan_session import PlanSession
from tests.support.loaded_worker import load_worker, plan_shards, read_head, write_job

DEADLY = ImageInfo(error=ErrorRecord("decode", "crash", "a loader process was ended by SIGSEGV"))

# -- joining a plan --------------------------------------------------------------------------------------------------


def test_plan_of_another_number_cannot_be_joined(tmp_path: Path) -> None:
    job = write_job(tmp_path)
    plan_shards(job)
    with load_worker(job) as loaded, pytest.raises(Temporary, match=r"plan 1 was discarded .* run again"):
        PlanSession.join(loaded, 1)


def test_first_worker_decides_on_the_image_shape(tmp_path: Path) -> None:
    """Without a setting for the size, each worker starts with the size of its first sample image."""
    job = write_job(tmp_path, "preprocess.crop=null", images=2)
    Image.new("RGB", (6, 5)).save(tmp_path / "small.png")
    (tmp_path / "manifest.csv").write_text("file\nwhite.png\nsmall.png\n")
    (key,) = plan_shards(job)
    samples = [str(tmp_path / name) for name in ("white.png", "small.png")]
    with load_worker(job, sample=(samples[0],)) as first, load_worker(job, sample=(samples[1],)) as second:
        assert second.loader_setup.image_shape == (3, 5, 6)
        sessions = [PlanSession.join(loaded, 0) for loaded in (first, second)]
        assert {session.contract.image_shape for session in sessions} == {(3, 8, 8)}
        assert second.loader_setup.image_shape == (3, 8, 8)
        (batch,) = second.loader_setup.loader.batches(ShardQueue.of([sessions[1].read_shard(key)]))
    assert [info.error is None for info in batch.image_infos] == [True, False]


def test_first_worker_decides_on_settings_left_at_auto(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A worker that decided otherwise adopts what the plan holds, also when it makes other rows for it."""
    job = write_job(tmp_path, images=1)
    (key,) = plan_shards(job)
    decided = [{"normalize": Decision(value, "tried")} for value in ("true", "false")]
    monkeypatch.setattr(EmbeddingTask, "decide", lambda *_: decided.pop(0))
    with load_worker(job) as first, load_worker(job) as second:
        assert [loaded.engine.decided_values for loaded in (first, second)] == [
            {"task.normalize": "true"},
            {"task.normalize": "false"},
        ]
        for loaded in (first, second):
            session = PlanSession.join(loaded, 0)
            assert session.contract.decisions == {"task.normalize": "true"}
        assert second.engine.decided_values == {"task.normalize": "true"}
        (batch,) = second.loader_setup.loader.batches(ShardQueue.of([session.read_shard(key)]))
        assert batch.pixels is not None
        (output,) = session.predictor(batch.pixels).wait().outputs
    assert output.tensors["embedding"].norm() == pytest.approx(1)


def test_decision_that_this_version_does_not_know_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    job = write_job(tmp_path, images=1)
    plan_shards(job)
    monkeypatch.setattr(EmbeddingTask, "decide", lambda *_: {"normalize": Decision("true", "tried")})
    with load_worker(job) as loaded:
        loaded.engine.adopt({"task.normalize": "sometimes"})
        with pytest.raises(InvalidJob, match=r"begun with task.normalize: sometimes by another version"):
            loaded.engine.check_task()


def test_worker_with_another_model_cannot_join(tmp_path: Path) -> None:
    job = write_job(tmp_path)
    plan_shards(job)
    with load_worker(job) as loaded:
        PlanSession.join(loaded, 0)
    with (tmp_path / "net.py").open("a") as source:
        source.write("\n# changed\n")
    with load_worker(job) as loaded, pytest.raises(InvalidJob, match="weights or model code changed meanwhile"):
        PlanSession.join(loaded, 0)


def test_parts_carry_plan_fingerprint_model_and_config(tmp_path: Path) -> None:
    job = write_job(tmp_path)
    plan_shards(job)
    with load_worker(job) as loaded:
        metadata = PlanSession.join(loaded, 0).part_metadata
    head = read_head(job)
    assert metadata.plan_id == head.plan
    assert metadata.fingerprint == hashlib.sha256(json.dumps(head.fingerprint, sort_keys=True).encode()).hexdigest()
    assert (metadata.model_digest, metadata.model_id) == (loaded.engine.digest, loaded.info.model)
    assert metadata.execution_config == "eager fp32"
    assert metadata.schema.names[:2] == ["position", "uri"]
    assert "embedding" in metadata.schema.names


def test_discarded_plan_stops_its_workers(tmp_path: Path) -> None:
    job = write_job(tmp_path)
    plan_shards(job)
    with load_worker(job) as loaded:
        session = PlanSession.join(loaded, 0)
        session.raise_if_discarded()
        batchjob.discard(job.output.uri)
        with pytest.raises(Temporary, match="the plan was discarded while this run was at work; run again"):
            session.raise_if_discarded()


# -- reading shards --------------------------------------------------------------------------------------------------


def test_shard_has_its_positions_of_the_plan(tmp_path: Path) -> None:
    job = write_job(tmp_path, images=20)
    keys = plan_shards(job)
    with load_worker(job) as loaded:
        session = PlanSession.join(loaded, 0)
        positions = [[ref.position for ref in session.read_shard(key).refs] for key in keys]
    assert positions == [[*range(8)], [*range(8, 16)], [*range(16, 20)]]


def test_retry_reads_only_the_images_with_error_rows(tmp_path: Path) -> None:
    job = write_job(tmp_path, images=3)
    (tmp_path / "bad.png").write_bytes(b"no picture")
    (tmp_path / "manifest.csv").write_text("file\nwhite.png\nbad.png\nwhite.png\nbad.png\n")
    (key,) = plan_shards(job)
    assert batchjob.run(job).failed == 2
    with load_worker(job) as loaded:
        session = PlanSession.join(loaded, 0)
        shard = session.read_shard(replace(key, revision=1, error_rows=2))
    assert [ref.position for ref in shard.refs] == [1, 3]


@pytest.mark.parametrize(("reattempt", "known"), [(False, {}), (True, {2: DEADLY})])
def test_deadly_image_found_by_another_worker_is_known_at_the_next_attempt(
    reattempt: bool, known: dict[int, ImageInfo], tmp_path: Path
) -> None:
    job = write_job(tmp_path)
    first, second, _ = plan_shards(job)
    with load_worker(job) as loaded:
        session = PlanSession.join(loaded, 0)
        session.read_shard(first)
        Quarantine(open_store(job.output.uri), read_head(job).folder).record(10, DEADLY)
        # Images 8 to 15; without a reattempt the records are not listed again.
        shard = session.read_shard(second, reattempt)
        loader_quarantine = loaded.loader_setup.loader.quarantine
    assert loader_quarantine.errors_by_row(ref.position for ref in shard.refs) == known


def test_records_of_a_retry_are_its_own(tmp_path: Path) -> None:
    """An image that killed a process in the run may be fine in the retry, for example with more memory."""
    job = write_job(tmp_path, images=2)
    (key,) = plan_shards(job)
    Quarantine(open_store(job.output.uri), read_head(job).folder).record(1, DEADLY)
    assert batchjob.run(job).failed == 1
    with load_worker(job) as loaded:
        session = PlanSession.join(loaded, 0)
        (ref,) = session.read_shard(replace(key, revision=1, error_rows=1)).refs
        assert session.quarantine.errors_by_row([ref.position]) == {}


# -- the size of the job ---------------------------------------------------------------------------------------------


def write_chunks(job: batchjob.Job, *, last: int, complete: bool) -> None:
    """Plan chunks of one shard each, and take the last one away if the plan is not to be complete."""
    plan_shards(job)
    if not complete:
        (path,) = sorted(Path(job.output.uri).glob(f"_batchjob/plans/0000/chunk-{last:07d}.arrow"))
        path.unlink()


@pytest.mark.parametrize(
    ("complete", "known", "pool_size", "expected"),
    [(True, 0, 1, 26), (True, 0, 2, 13), (False, 0, 1, 240), (False, 1000, 4, 250), (False, 1000, 0, 1000)],
)
def test_trials_are_decided_by_the_size_of_the_plan_or_the_input(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    complete: bool,
    known: int,
    pool_size: int,
    expected: int,
) -> None:
    """No trial is made here: the decision is scripted, and records what it was told."""
    monkeypatch.setattr("batchjob.plan.chunks.CHUNK_ROWS", 4)
    job = write_job(tmp_path, images=26)
    write_chunks(job, last=3, complete=complete)
    told: list[float] = []

    def decide(autotuner: Autotuner) -> TuningDecision:
        told.append(autotuner.expected_images)
        return TuningDecision("cpu", "0", ExecutionConfig(), "scripted")

    monkeypatch.setattr(Autotuner, "decide", decide)
    with load_worker(job) as loaded:
        setup = replace(loaded.setup, known_images=known, pool_size=pool_size)
        PlanSession.join(replace(loaded, setup=setup), 0)
    assert told == [expected]
