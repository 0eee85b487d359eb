"""Autotuner: of workers that start at the same time, one runs the trials, the others read its decision."""

from __future__ import annotations

import threading
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest

from batchjob import Job
from batchjob.concurrency import parallel_map
from batchjob.inference.autotune.autotuner import Autotuner
from batchjob.inference.autotune.decision import TuningDecision
from batchjob.inference.autotune.trial_process import TrialSpec
from batchjob.inference.autotune.trials import Trial
from batchjob.inference.engine import Engine
from batchjob.inference.execution_config import ExecutionConfig
from batchjob.storage.reader import Reader
from tests.support.harmful_job import write_harmful_job
from tests.support.memory_store import MemoryStore

WORKERS = 3


def test_one_worker_runs_trials_and_the_others_read_its_decision(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Use trials that fail, which the machine does not cache: the decision must come from the store."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    job = Job.from_file(Path(write_harmful_job(tmp_path, 4, black_positions=[])), overrides=["runtime.tuning=on"])
    store, waiting, calls = MemoryStore(), threading.Barrier(WORKERS), []

    def fail_trials(spec: TrialSpec, configs: Sequence[ExecutionConfig], *_: Any) -> list[Trial]:
        calls.append(configs)
        return [Trial(ExecutionConfig(), "it ran out of patience")]

    monkeypatch.setattr("batchjob.inference.autotune.autotuner.run_isolated_trials", fail_trials)
    engine = Engine(job, Reader(), (str(tmp_path / "white.png"),))
    spec = TrialSpec(job.serialize(), tmp_path, tmp_path, (), batch_size=4, threads=1)

    def decide(_: int) -> TuningDecision:
        ours = store.client()
        ours.inject("read", "*/tuning/*", waiting.wait)  # all have read before the first one decides
        return Autotuner(ours, "plan/", None, engine, spec, 1000.0, 1.0, lambda: False).decide()

    decisions = list(parallel_map(decide, range(WORKERS), threads=WORKERS))
    assert len(calls) == 1
    assert len(set(decisions)) == 1
    assert decisions[0].reason == "eager fp32 could not be run in a trial: it ran out of patience"
    assert len([key for key in store.stored_keys() if "/tuning/" in key]) == 1
