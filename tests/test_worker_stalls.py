"""A worker in which a store, or its loader, keeps everybody waiting is noticed; one that waits with reason is not."""

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
from harmful_job import write_harmful_job
from memory_store import MemoryStore

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

IMAGES = 16


@pytest.fixture
def released() -> Iterator[threading.Event]:
    """Lets go, at the end, what waits for ever."""
    event = threading.Event()
    yield event
    event.set()


@pytest.fixture
def store(monkeypatch: pytest.MonkeyPatch) -> MemoryStore:
    """The output of jobs, for driver and worker."""
    made = MemoryStore()
    for room in ("driver.driver", "worker.setup"):
        monkeypatch.setattr(f"batchjob.{room}.open_store", lambda *_, **__: made)
    return made


def the_job(folder: Path, *settings: str) -> Job:
    return Job.from_file(Path(write_harmful_job(folder, IMAGES, black_positions=[])), overrides=list(settings))


def test_a_store_that_never_answers_ends_a_run_on_the_local_pool_as_temporary(
    tmp_path: Path, store: MemoryStore, released: threading.Event
) -> None:
    store.inject("put_if_absent", "predictions/*", released.wait, skip=1)
    with pytest.raises(WorkerStalled) as told:
        run(the_job(tmp_path, "runtime.stall_seconds=1", "errors.outage_seconds=0"))
    print(told.value.message)
    assert (told.value.exit_code, told.value.status, told.value.storage) == (75, "temporary", True)
    assert "the writing of memory://out/predictions/part-" in told.value.message
    assert re.search(r"ended for \d+ s \(runtime.stall_seconds and errors.outage_seconds\)", told.value.message)
    assert "the same command resumes" in told.value.message
    assert not [key for key in store.stored_keys() if "quarantine" in key], "no image is to blame"
    released.set()
    assert run(the_job(tmp_path)).status == "complete"


def test_a_store_that_is_ridden_out_is_progress(tmp_path: Path, store: MemoryStore) -> None:
    asked = threading.Event()
    store.inject("put_if_absent", "predictions/*", partial(asked.wait, 2.5))
    assert run(the_job(tmp_path, "runtime.stall_seconds=1", "errors.outage_seconds=60")).status == "complete"


def test_a_loader_that_neither_loads_nor_dies_ends_the_run_too(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, released: threading.Event
) -> None:
    read_many = Reader.read_many

    def stuck(
        self: Reader, uris: Sequence[str], *how: Any, **more: Any
    ) -> list[ObjectData | StorageError | Unavailable]:
        released.wait()
        return read_many(self, uris, *how, **more)

    job = the_job(tmp_path, "runtime.stall_seconds=1", "errors.outage_seconds=0")
    monkeypatch.setattr(Reader, "read_many", stuck)
    with pytest.raises(WorkerStalled, match=r"the wait for a batch has not ended for \d+ s") as told:
        run(job)
    assert told.value.storage


class Stopped(Reader):
    """A storage client in which its process comes to a halt, without an end."""

    def read_many(self, uris: Sequence[str], *how: Any, **more: Any) -> list[ObjectData | StorageError | Unavailable]:
        os.kill(os.getpid(), signal.SIGSTOP)
        return super().read_many(uris, *how, **more)


class Slow(Reader):
    """A store from which each object comes after a while."""

    def _try_read(self, *asked: Any) -> ObjectData | StorageError | Unavailable:
        time.sleep(1.0)
        return super()._try_read(*asked)


def prepare(data: bytes) -> PreparedImage:
    return PreparedImage(torch.full((3, 2, 2), len(data), dtype=torch.uint8), 2, 2)


class StoppedOnce(Stopped):
    """The same, in the first process that reads."""

    def read_many(self, uris: Sequence[str], *how: Any, **more: Any) -> list[ObjectData | StorageError | Unavailable]:
        mark = Path(uris[0]).with_name("mark")
        if mark.exists():
            return Reader.read_many(self, uris, *how, **more)
        mark.touch()
        return super().read_many(uris, *how, **more)


def loader(reader: Reader, image_seconds: float = 60.0) -> Loader:
    plan = LoaderConfig(1, 2, False, image_seconds)
    return Loader(reader=reader, transform=prepare, batch_size=8, config=plan, size=(2, 2))


def shard(folder: Path, images: int = 8) -> Shard:
    refs = []
    for position in range(images):
        path = folder / f"{position}"
        path.write_bytes(b"x")
        refs.append(ImageRef(position, path.name, str(path)))
    return Shard(ShardKey(0, "0" * 16, len(refs), 0, 0), tuple(refs), pa.table({}))


@contextmanager
def watched(loading: Loader, seconds: float) -> Iterator[threading.Event]:
    """Have somebody look whether this thread's step, which is loading, shows no life for so long."""
    stopwatch, late, over = Watchdog(), threading.Event(), threading.Event()

    def look() -> None:
        while not over.wait(0.05):
            if stopwatch.stalled_step(seconds, seconds) is not None:
                late.set()

    with stopwatch.step("the wait for a batch", last_progress=loading.last_progress):
        thread = threading.Thread(target=look)
        thread.start()
        try:
            yield late
        finally:
            over.set()
            thread.join()


def test_objects_that_come_one_by_one_are_signs_of_life(tmp_path: Path) -> None:
    slow = loader(Slow())
    list(slow.batches(ShardQueue.of([shard(tmp_path, 1)])))
    with watched(slow, 4.0) as late:
        (batch,) = slow.batches(ShardQueue.of([shard(tmp_path)]))
    slow.close()
    assert len(batch.image_infos) == 8
    assert not late.is_set(), "8 s for the batch, no 4 s without a sign"


def test_a_process_that_was_stopped_gives_none(tmp_path: Path) -> None:
    stopped = loader(Stopped())

    def load() -> None:
        with pytest.raises(AttemptFailed, match="closed"):
            list(stopped.batches(ShardQueue.of([shard(tmp_path)])))

    thread = threading.Thread(target=load)
    with watched(stopped, 1.0) as late:
        thread.start()
        assert late.wait(60)
    assert stopped.process_deaths == 0
    stopped.close()
    thread.join()


def test_a_process_that_was_stopped_for_too_long_is_replaced(tmp_path: Path) -> None:
    stopped = loader(StoppedOnce(), image_seconds=1.0)
    found = list(stopped.batches(ShardQueue.of([shard(tmp_path)])))
    assert [facts.error for batch in found for facts in batch.image_infos] == [None] * 8
    assert stopped.process_deaths == 1
    stopped.close()


def test_each_verb_of_a_store_is_a_step(tmp_path: Path) -> None:
    store, seen, stopwatch = MemoryStore(), list[str](), Watchdog(Hours())
    attended = MonitoredStore(store, stopwatch)

    def look() -> None:
        step = stopwatch.stalled_step(0.0, 0.0)
        assert step is not None
        assert step.storage
        seen.append(step.name)

    body = tmp_path / "body"
    body.write_bytes(b"body")
    for verb in ("put_if_absent", "stat", "read", "read_tail", "read_head", "open", "list"):
        store.inject(verb, "*", look)
    for verb in ("replace_if_match", "delete_if_match", "delete"):
        store.inject(verb, "*", look)
    stat = attended.put_if_absent("a/b", body)
    assert attended.stat("a/b") == stat
    assert attended.read("a/b").data == attended.read_tail("a/b", 9) == attended.read_head("a/b", 9) == b"body"
    assert attended.open("a/b").read() == b"body"
    assert list(attended.list("a/")) == [stat]
    changed = attended.replace_if_match("a/b", b"other", stat.version or "")
    attended.delete_if_match("a/b", changed.version or "")
    attended.delete("a/b")
    assert store.stored_keys() == []
    assert stopwatch.stalled_step(0.0, 0.0) is None
    assert len(seen) == 10
    assert all(name.split(" memory://out/a/")[0].split()[-1] in {"of", "at"} for name in seen), seen


class Hours:
    """A clock that is hours later whenever it is looked at."""

    now = 0.0

    def __call__(self) -> float:
        self.now += 3600.0
        return self.now
