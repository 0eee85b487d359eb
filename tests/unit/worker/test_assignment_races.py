"""Races between the threads of a pool and its worker thread: no assignment and no event is lost."""

from __future__ import annotations

import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pyarrow as pa
import pytest

from batchjob.errors import AttemptFailed
from batchjob.loader.shard_queue import ShardQueue
from batchjob.types import ImageRef, Shard, ShardKey
from batchjob.worker.messages import Assignment, ShardFailed, WorkerEvent, WorkerInfo, WorkerReady, WorkerSetup
from batchjob.worker.worker_thread import WorkerThread
from tests.support.scripted_pool import make_job

INFO = WorkerInfo("cpu", "fp32", "net@000000000000", ("score",), batch_size=4, seconds=0.0)


class FakeWorker:
    """Worker that fails each shard at once, as a sign that it had it."""

    def __init__(self, *_: object, on_event: Callable[[WorkerEvent], None], **__: object) -> None:
        self._on_event = on_event

    def run(self, queue: ShardQueue) -> None:
        while (shard := queue.next_shard()) is not None:
            queue.drop(shard)
            self._on_event(ShardFailed(shard.key, AttemptFailed("had it")))

    def find_stall(self) -> None:
        return None

    def close(self) -> None:
        pass


def read_shard(key: ShardKey, reattempt: bool) -> Shard:
    return Shard(key, (ImageRef(key.index, "a", "a"),), pa.table({}))


@pytest.fixture
def thread(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[WorkerThread]:
    """Thread of a worker that needs no model."""
    monkeypatch.setattr(
        "batchjob.worker.setup.load", lambda *_: SimpleNamespace(info=INFO, close=lambda: None, setup=None)
    )
    monkeypatch.setattr(
        "batchjob.worker.plan_session.PlanSession.join", lambda *_: SimpleNamespace(read_shard=read_shard)
    )
    monkeypatch.setattr("batchjob.worker.worker.Worker", FakeWorker)
    monkeypatch.setattr("batchjob.worker.worker_thread.start_loader_forkserver", lambda job: None)
    job: Any = make_job(tmp_path, ["a.png"])
    found = WorkerThread("7", WorkerSetup(job.serialize(), str(tmp_path)), tmp_path, 1)
    yield found
    found.close()


def collect(thread: WorkerThread, shards: int) -> list[WorkerEvent]:
    """Wait for the events of so many shards, and of the worker's start."""
    events, deadline = list[WorkerEvent](), time.monotonic() + 60
    while len(events) < shards + 1:
        assert time.monotonic() < deadline, f"{len(events) - 1} of {shards} shards reported"
        events += thread.wait(0.1)
    return events


def make_assignment(index: int) -> Assignment:
    return Assignment("7", ShardKey(index, f"{index:016x}", 1, 0, 0), 0)


def submit_every_fourth(thread: WorkerThread, first: int) -> None:
    for index in range(first, 2000, 4):
        thread.submit(make_assignment(index))


def test_assignments_of_several_threads_are_all_run(thread: WorkerThread) -> None:
    """A Ray actor submits in one thread while another one waits for events."""
    before = sys.getswitchinterval()
    sys.setswitchinterval(1e-6)
    try:
        submitting = [threading.Thread(target=submit_every_fourth, args=(thread, first)) for first in range(4)]
        for one in submitting:
            one.start()
        ready, *events = collect(thread, 2000)
    finally:
        sys.setswitchinterval(before)
    for one in submitting:
        one.join()
    assert ready == WorkerReady("7", INFO)
    assert sorted(event.key.index for event in events if isinstance(event, ShardFailed)) == list(range(2000))
