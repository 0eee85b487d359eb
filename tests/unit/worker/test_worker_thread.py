"""Worker in a thread: assignments in, events out, until it is closed or cannot go on."""

from __future__ import annotations

import shutil
import threading
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path

import pytest

from batchjob.errors import InvalidJob, NotFound, Temporary
from batchjob.job.job import Job
from batchjob.types import ShardKey
from batchjob.worker.messages import (
    Assignment,
    ShardCommitted,
    ShardFailed,
    WorkerEvent,
    WorkerFailed,
    WorkerReady,
    WorkerSetup,
)
from batchjob.worker.worker_thread import WorkerThread
from tests.support.batchjob_process import read_rows
from tests.support.loaded_worker import plan_shards, write_job

StartWorker = Callable[..., WorkerThread]


@pytest.fixture
def start_worker() -> Iterator[StartWorker]:
    """Start the worker "7" for a job; it is closed at the end of the test at the latest."""
    threads: list[WorkerThread] = []

    def start(job: Job, folder: Path | None = None) -> WorkerThread:
        setup = WorkerSetup(job.serialize(), str(job.folder), small_input_bytes=0)
        threads.append(WorkerThread("7", setup, folder or job.folder, cores=1))
        return threads[-1]

    yield start
    for thread in threads:
        thread.close()


def submit(thread: WorkerThread, *keys: ShardKey, plan_number: int = 0) -> None:
    for key in keys:
        thread.submit(Assignment("7", key, plan_number))


def collect(thread: WorkerThread, count: int) -> list[WorkerEvent]:
    """Wait for so many events; a worker that fails has no more."""
    events: list[WorkerEvent] = []
    while len(events) < count and not any(isinstance(event, WorkerFailed) for event in events):
        arrived = thread.wait(60)
        assert arrived, f"no event in 60 s after {events}"
        events += arrived
    return events


def committed(events: list[WorkerEvent]) -> list[int]:
    return sorted(event.result.key.index for event in events if isinstance(event, ShardCommitted))


def test_worker_loads_and_then_commits_what_was_submitted_before(tmp_path: Path, start_worker: StartWorker) -> None:
    job = write_job(tmp_path, images=20)
    keys = plan_shards(job)
    thread = start_worker(job)
    submit(thread, *keys)
    ready, *others = collect(thread, 4)
    assert isinstance(ready, WorkerReady)
    assert (ready.worker, ready.info.device) == ("7", "cpu")
    assert committed(others) == [0, 1, 2]
    assert read_rows(tmp_path / "out").column("position").to_pylist() == list(range(20))


def test_worker_waits_for_assignments_between_shards(tmp_path: Path, start_worker: StartWorker) -> None:
    job = write_job(tmp_path)
    first, second, _ = plan_shards(job)
    thread = start_worker(job)
    submit(thread, first)
    assert committed(collect(thread, 2)) == [0]
    submit(thread, second)
    assert committed(collect(thread, 1)) == [1]


def test_shard_that_cannot_be_read_fails_alone(tmp_path: Path, start_worker: StartWorker) -> None:
    job = write_job(tmp_path)
    first, second, third = plan_shards(job)
    absent = replace(second, chunk=9)
    thread = start_worker(job)
    submit(thread, first, absent, third)
    events = collect(thread, 4)
    assert committed(events) == [0, 2]
    (failure,) = [event for event in events if isinstance(event, ShardFailed)]
    assert failure.key == absent
    assert isinstance(failure.error, NotFound)


def test_shard_that_is_submitted_twice_is_committed_once(tmp_path: Path, start_worker: StartWorker) -> None:
    job = write_job(tmp_path)
    first, *_ = plan_shards(job)
    thread = start_worker(job)
    submit(thread, first, first)
    events = collect(thread, 3)
    assert sorted(event.result.committed_here for event in events if isinstance(event, ShardCommitted)) == [False, True]
    assert read_rows(tmp_path / "out").num_rows == first.rows


def test_worker_that_is_sent_to_a_discarded_plan_fails(tmp_path: Path, start_worker: StartWorker) -> None:
    job = write_job(tmp_path)
    first, *_ = plan_shards(job)
    thread = start_worker(job)
    submit(thread, first, plan_number=1)
    ready, failure = collect(thread, 2)
    assert isinstance(ready, WorkerReady)
    assert isinstance(failure, WorkerFailed)
    assert isinstance(failure.error, Temporary)


def test_worker_that_cannot_load_is_never_ready(tmp_path: Path, start_worker: StartWorker) -> None:
    job = write_job(tmp_path)
    (tmp_path / "net.py").unlink()
    (failure,) = collect(start_worker(job), 2)
    assert isinstance(failure, WorkerFailed)
    assert isinstance(failure.error, InvalidJob)
    assert "net" in failure.error.message


def test_model_comes_from_this_machine_and_images_from_the_folder_of_the_driver(
    tmp_path: Path, start_worker: StartWorker
) -> None:
    here, driver = tmp_path / "here", tmp_path / "driver"
    job = write_job(driver)
    first, *_ = plan_shards(job)
    here.mkdir()
    shutil.move(driver / "net.py", here / "net.py")
    thread = start_worker(job, here)
    submit(thread, first)
    assert committed(collect(thread, 2)) == [0]
    assert read_rows(driver / "out").num_rows == first.rows
    assert not (here / "out").exists()


def test_closed_worker_runs_no_further_shard(tmp_path: Path, start_worker: StartWorker) -> None:
    job = write_job(tmp_path)
    keys = plan_shards(job)
    before = set(threading.enumerate())
    thread = start_worker(job)
    assert isinstance(collect(thread, 1)[0], WorkerReady)
    started = set(threading.enumerate()) - before
    thread.close()
    submit(thread, *keys)
    for one in started:
        one.join(60)
    assert not [one.name for one in started if one.is_alive()]
    assert thread.wait(0) == []
    assert not list((tmp_path / "out").glob("predictions/*"))
