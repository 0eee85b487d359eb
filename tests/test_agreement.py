"""Workers that come to tune at the same time: one does, the others read what it has put beside the plan."""

from __future__ import annotations

import threading
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
from harmful_job import write_harmful_job
from memory_store import MemoryStore

from batchjob import Job
from batchjob.concurrency import parallel_map
from batchjob.inference.autotune.autotuner import Autotuner
from batchjob.inference.autotune.decision import TuningDecision
from batchjob.inference.autotune.trial_process import TrialSpec
from batchjob.inference.autotune.trials import Trial
from batchjob.inference.engine import Engine
from batchjob.inference.execution_config import ExecutionConfig
from batchjob.storage.reader import Reader

WORKERS = 3


def test_one_worker_of_a_machine_tries_and_the_others_go_by_what_it_found(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of a trial that failed the machine remembers nothing: it is the store that tells."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    job = Job.from_file(Path(write_harmful_job(tmp_path, 4, black_positions=[])), overrides=["runtime.tuning=on"])
    store, waiting, tried = MemoryStore(), threading.Barrier(WORKERS), []

    def table(bench: TrialSpec, recipes: Sequence[ExecutionConfig], *_: Any) -> list[Trial]:
        tried.append(recipes)
        return [Trial(ExecutionConfig(), "it ran out of patience")]

    monkeypatch.setattr("batchjob.inference.autotune.autotuner.run_isolated_trials", table)
    engine = Engine(job, Reader(), (str(tmp_path / "white.png"),))
    bench = TrialSpec(job.serialize(), tmp_path, tmp_path, (), batch_size=4, threads=1)

    def reached(_: int) -> TuningDecision:
        ours = store.client()
        ours.inject("read", "*/tuning/*", waiting.wait)  # all have looked before one has tried
        return Autotuner(ours, "plan/", None, engine, bench, 1000.0, 1.0, lambda: False).decide()

    found = list(parallel_map(reached, range(WORKERS), threads=WORKERS))
    assert len(tried) == 1
    assert len(set(found)) == 1
    assert found[0].reason == "eager fp32 could not be run in a trial: it ran out of patience"
    assert len([key for key in store.stored_keys() if "/tuning/" in key]) == 1
