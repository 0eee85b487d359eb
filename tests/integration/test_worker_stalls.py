"""Stalled workers: a store or a loader that hangs is noticed; a worker that waits with reason is not."""

from __future__ import annotations

import os
import re
import signal
import threading
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import pyarrow as pa
import pytest
import torch

from batchjob import Job, run
from batchjob.errors import AttemptFailed, StorageError, Unavailable, WorkerStalled
from batchjob.loader.loader import Loader
from batchjob.loader.settings import LoaderConfig
from batchjob.loader.shard_queue import ShardQueue
from batchjob.storage.objects import ObjectData
from batchjob.storage.reader import Reader
from batchjob.types import ImageRef, PreparedImage, Shard, ShardKey
from batchjob.worker.monitored_store import MonitoredStore
from batchjob.worker.watchdog import Watchdog
from tests.support.harmful_job import write_harmful_job
from tests.support.memory_store import MemoryStore

IMAGES = 16


@pytest.fixture
def release() -> Iterator[threading.Event]:
    """Event that ends the hanging calls of a test; it is set when the test ends, if not before."""
    event = threading.Event()
    yield event
    event.set()


@pytest.fixture
def store(monkeypatch: pytest.MonkeyPatch) -> MemoryStore:
    """Store in memory that driver and worker use as output."""
    store = MemoryStore()
    for module in ("driver.driver", "worker.setup"):
        monkeypatch.setattr(f"batchjob.{module}.open_store", lambda *_, **__: store)
    return store


def make_job(folder: Path, *settings: str) -> Job:
    return Job.from_file(Path(write_harmful_job(folder, IMAGES, black_positions=[])), overrides=list(settings))


def test_store_that_never_answers_ends_a_local_run_as_temporary(
    tmp_path: Path, store: MemoryStore, release: threading.Event
) -> None:
    store.inject("put_if_absent", "predictions/*", release.wait, skip=1)
    with pytest.raises(WorkerStalled) as error:
        run(make_job(tmp_path, "runtime.stall_seconds=1", "errors.outage_seconds=0"))
    message = error.value.message
    print(message)
    assert (error.value.exit_code, error.value.status, error.value.storage) == (75, "temporary", True)
    assert "the writing of memory://out/predictions/part-" in message
    assert re.search(r"ended for \d+ s \(runtime.stall_seconds and errors.outage_seconds\)", message)
    assert "the same command resumes" in message
    assert not [key for key in store.stored_keys() if "quarantine" in key], "no image is to blame"
    release.set()
    assert run(make_job(tmp_path)).status == "complete"


def test_waiting_for_the_end_of_an_outage_is_no_stall(tmp_path: Path, store: MemoryStore) -> None:
    never = threading.Event()
    store.inject("put_if_absent", "predictions/*", partial(never.wait, 2.5))
    assert run(make_job(tmp_path, "runtime.stall_seconds=1", "errors.outage_seconds=60")).status == "complete"


def test_loader_that_neither_loads_nor_dies_ends_the_run_as_temporary(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, release: threading.Event
) -> None:
    read_many = Reader.read_many

    def wait_and_read(
        self: Reader, uris: Sequence[str], *args: Any, **kwargs: Any
    ) -> list[ObjectData | StorageError | Unavailable]:
        release.wait()
        return read_many(self, uris, *args, **kwargs)

    job = make_job(tmp_path, "runtime.stall_seconds=1", "errors.outage_seconds=0")
    monkeypatch.setattr(Reader, "read_many", wait_and_read)
    with pytest.raises(WorkerStalled, match=r"the wait for a batch has not ended for \d+ s") as error:
        run(job)
    assert error.value.storage


class StoppingReader(Reader):
    """Reader that stops its process with SIGSTOP."""

    def read_many(
        self, uris: Sequence[str], *args: Any, **kwargs: Any
    ) -> list[ObjectData | StorageError | Unavailable]:
        os.kill(os.getpid(), signal.SIGSTOP)
        return super().read_many(uris, *args, **kwargs)


class StoppingOnceReader(StoppingReader):
    """Reader that stops only the first process that uses it."""

    def read_many(
        self, uris: Sequence[str], *args: Any, **kwargs: Any
    ) -> list[ObjectData | StorageError | Unavailable]:
        mark = Path(uris[0]).with_name("mark")
        if mark.exists():
            return Reader.read_many(self, uris, *args, **kwargs)
        mark.touch()
        return super().read_many(uris, *args, **kwargs)


class SlowReader(Reader):
    """Reader that takes a second per object."""

    def _try_read(self, *args: Any) -> ObjectData | StorageError | Unavailable:
        time.sleep(1.0)
        return super()._try_read(*args)


def transform(data: bytes) -> PreparedImage:
    return PreparedImage(torch.full((3, 2, 2), len(data), dtype=torch.uint8), 2, 2)


def make_loader(reader: Reader, image_seconds: float = 60.0) -> Loader:
    config = LoaderConfig(1, 2, False, image_seconds)
    return Loader(reader=reader, transform=transform, batch_size=8, config=config, size=(2, 2))


def make_queue(folder: Path, images: int = 8) -> ShardQueue:
    """Write images of one byte; return a queue of one shard of them."""
    refs = []
    for position in range(images):
        path = folder / f"{position}"
        path.write_bytes(b"x")
        refs.append(ImageRef(position, path.name, str(path)))
    return ShardQueue.of([Shard(ShardKey(0, "0" * 16, len(refs), 0, 0), tuple(refs), pa.table({}))])


@contextmanager
def watch(loader: Loader, seconds: float) -> Iterator[threading.Event]:
    """Set the event if the loader shows no progress for so many seconds."""
    watchdog, stalled, over = Watchdog(), threading.Event(), threading.Event()

    def poll() -> None:
        while not over.wait(0.05):
            if watchdog.stalled_step(seconds, seconds) is not None:
                stalled.set()

    with watchdog.step("the wait for a batch", last_progress=loader.last_progress):
        thread = threading.Thread(target=poll)
        thread.start()
        try:
            yield stalled
        finally:
            over.set()
            thread.join()


def test_each_object_is_a_sign_of_progress(tmp_path: Path) -> None:
    loader = make_loader(SlowReader())
    list(loader.batches(make_queue(tmp_path, 1)))
    with watch(loader, 4.0) as stalled:
        (batch,) = loader.batches(make_queue(tmp_path))
    loader.close()
    assert len(batch.image_infos) == 8
    assert not stalled.is_set(), "8 s for the batch, but never 4 s without a sign"


def test_stopped_process_shows_no_progress(tmp_path: Path) -> None:
    loader = make_loader(StoppingReader())

    def load() -> None:
        with pytest.raises(AttemptFailed, match="closed"):
            list(loader.batches(make_queue(tmp_path)))

    thread = threading.Thread(target=load)
    with watch(loader, 1.0) as stalled:
        thread.start()
        assert stalled.wait(60)
    assert loader.process_deaths == 0
    loader.close()
    thread.join()


def test_process_that_is_stopped_for_too_long_is_replaced(tmp_path: Path) -> None:
    loader = make_loader(StoppingOnceReader(), image_seconds=1.0)
    batches = list(loader.batches(make_queue(tmp_path)))
    assert [info.error for batch in batches for info in batch.image_infos] == [None] * 8
    assert loader.process_deaths == 1
    loader.close()


class FastClock:
    """Clock that advances by an hour each time it is read."""

    now = 0.0

    def __call__(self) -> float:
        self.now += 3600.0
        return self.now


def test_each_call_of_a_monitored_store_is_a_step(tmp_path: Path) -> None:
    store, steps, watchdog = MemoryStore(), list[str](), Watchdog(FastClock())
    monitored = MonitoredStore(store, watchdog)

    def record_step() -> None:
        step = watchdog.stalled_step(0.0, 0.0)
        assert step is not None
        assert step.storage
        steps.append(step.name)

    body = tmp_path / "body"
    body.write_bytes(b"body")
    for call in ("put_if_absent", "stat", "read", "read_tail", "read_head", "open", "list"):
        store.inject(call, "*", record_step)
    for call in ("replace_if_match", "delete_if_match", "delete"):
        store.inject(call, "*", record_step)
    info = monitored.put_if_absent("a/b", body)
    assert monitored.stat("a/b") == info
    assert monitored.read("a/b").data == monitored.read_tail("a/b", 9) == monitored.read_head("a/b", 9) == b"body"
    assert monitored.open("a/b").read() == b"body"
    assert list(monitored.list("a/")) == [info]
    replaced = monitored.replace_if_match("a/b", b"other", info.version or "")
    monitored.delete_if_match("a/b", replaced.version or "")
    monitored.delete("a/b")
    assert store.stored_keys() == []
    assert watchdog.stalled_step(0.0, 0.0) is None
    assert len(steps) == 10
    assert all(name.split(" memory://out/a/")[0].split()[-1] in {"of", "at"} for name in steps), steps
