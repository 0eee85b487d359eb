"""Random schedules of deaths, hangs and given-up shards: torch's DataLoader delivers every batch once, in order.

The processes are threads of this process, which die and hang as their images say, so that hundreds of schedules take
seconds. `tests/integration/test_isolation.py` and `tests/faults/test_poison.py` do the same with real processes.
"""

from __future__ import annotations

import multiprocessing
import os
import random
import signal
import threading
import time
from collections.abc import Callable, Mapping
from contextlib import suppress
from dataclasses import dataclass, field
from itertools import count
from multiprocessing.connection import Connection, wait
from typing import Any

import pyarrow as pa
import pytest

from batchjob.errors import AttemptFailed
from batchjob.loader.dataset import LoadedBatch, NumberedRequest
from batchjob.loader.loader import Loader
from batchjob.loader.settings import LoaderConfig
from batchjob.loader.shard_queue import ShardQueue
from batchjob.storage.reader import Reader
from batchjob.types import Batch, ErrorRecord, ImageInfo, ImageRef, PreparedImage, Shard, ShardKey

SCHEDULES = 200
IMAGE_SECONDS = 60.0
WORDS = ["picture"] * 40 + ["crash", "hang", "innocent", "fetch", "bad"]


@dataclass
class Killed(Exception):
    code: int


@dataclass
class World:
    """Fate of the processes of one schedule: some images harm them only the first time."""

    seed: int
    met: set[str] = field(default_factory=set)
    deaths: int = 0

    def is_first(self, location: str) -> bool:
        first = location not in self.met
        self.met.add(location)
        return first


class SimulatedChild:
    """Child process that is a thread of this one."""

    def __init__(self, world: World, args: tuple[Any, ...]) -> None:
        connection, self._progress, *self._args = args
        self._connection = Connection(os.dup(connection.fileno()))
        self._world = world
        self.exitcode: int | None = None
        self._killed, self._kill_writer = multiprocessing.Pipe(duplex=False)
        self.sentinel, self._sentinel_writer = os.pipe()
        self.pid = self.sentinel
        self._thread = threading.Thread(target=self._run, daemon=True)
        self.start = self._thread.start

    def join(self) -> None:
        self._thread.join()
        assert self.exitcode is not None

    def kill(self) -> None:
        self._kill_writer.send(None)

    def _run(self) -> None:
        code = 0
        try:
            self._progress.set_idle()
            if callable(self._args[0]):
                self._run_data_loader_worker()
            else:
                _, request, *_ = self._args
                self._progress.start_request(0)
                infos = self._load(request.refs, {})
                self._connection.send(infos[0] if infos[0].error is not None else None)
        except Killed as killed:
            self._world.deaths += 1
            code = killed.code
        except (EOFError, OSError):
            pass
        self.exitcode = code
        self._connection.close()
        os.close(self._sentinel_writer)

    def _run_data_loader_worker(self) -> None:
        """Answer each item like `torch.utils.data._utils.worker._worker_loop`."""
        while True:
            if self._killed in wait([self._connection, self._killed]):
                raise Killed(-signal.SIGKILL)
            item = self._connection.recv()
            if item is None:
                return
            if not isinstance(item, tuple):  # the beginning of an epoch
                self._connection.send((item, None))
                continue
            number, (numbered,) = item
            self._connection.send((number, self._load_batch(numbered)))

    def _load_batch(self, numbered: NumberedRequest) -> LoadedBatch:
        (_, dataset_holder, *_) = self._args[1]
        if numbered.number in dataset_holder[0]._skipped:
            return LoadedBatch(numbered.number, None)
        request = numbered.request
        self._progress.start_request(numbered.number)
        infos = self._load(request.refs, request.known_errors)
        self._progress.set_idle()
        batch = Batch(request.shard_index, request.start, tuple(infos), None, attempt_number=request.attempt_number)
        return LoadedBatch(numbered.number, batch)

    def _load(self, refs: tuple[ImageRef, ...], known_errors: Mapping[int, ImageInfo]) -> list[ImageInfo]:
        self._progress.set_fetching()
        for ref in refs:
            if ref.uri == "fetch" and self._world.is_first(ref.location):
                raise Killed(-signal.SIGSEGV)
        infos = []
        for row, ref in enumerate(refs):
            if row in known_errors:
                infos.append(known_errors[row])
                continue
            self._progress.set_image(row, ref.location)
            self._pause(0.0)
            if ref.uri == "crash" or (ref.uri == "innocent" and self._world.is_first(ref.location)):
                raise Killed(-signal.SIGSEGV)
            if ref.uri == "hang":
                self._progress._record.since -= 2 * IMAGE_SECONDS  # as if all that time had passed
                self._pause(IMAGE_SECONDS)
            error = ErrorRecord("decode", "bad", "it is bad") if ref.uri == "bad" else None
            infos.append(ImageInfo(ref.location, error=error))
        return infos

    def _pause(self, seconds: float) -> None:
        if self._killed.poll(seconds):
            raise Killed(-signal.SIGKILL)


@pytest.fixture
def worlds(monkeypatch: pytest.MonkeyPatch) -> Callable[[int], World]:
    """Make a world for a schedule; from then on, each process of a loader is simulated in it."""
    real = multiprocessing.get_context("forkserver")
    world = World(0)

    class SimulatedContext:
        RawValue, RawArray, Pipe = real.RawValue, real.RawArray, real.Pipe

        @staticmethod
        def Process(*, args: tuple[Any, ...], **_: Any) -> SimulatedChild:  # noqa: N802
            return SimulatedChild(world, args)

    def make_world(seed: int) -> World:
        nonlocal world
        world = World(seed)
        return world

    monkeypatch.setattr("multiprocessing.get_context", lambda method: SimulatedContext)
    monkeypatch.setattr("batchjob.loader.isolation.start_forkserver", lambda *modules: None)
    monkeypatch.setattr("batchjob.loader.isolation._WATCH_SECONDS", 0.01)
    monkeypatch.setattr("batchjob.loader.isolation._CLOSE_SECONDS", 0.2)
    return make_world


def do_nothing(data: bytes) -> PreparedImage:
    raise AssertionError("simulated")


positions = count(0, 100)


def make_shards(rng: random.Random) -> list[Shard]:
    shards = []
    for index in range(rng.randint(1, 5)):
        words = rng.choices(WORDS, k=rng.randint(0, 14))
        first = next(positions)
        refs = tuple(ImageRef(first + row, word, f"{first + row}-{word}") for row, word in enumerate(words))
        shards.append(Shard(ShardKey(index, "0" * 16, len(refs), 0, 0), refs, pa.table({})))
    return shards


def load_until_closed(loader: Loader, shard: Shard) -> None:
    """Load a shard with a loader that is closed meanwhile."""
    with suppress(AttemptFailed):
        list(loader.batches(ShardQueue.of([shard])))


def check_row(ref: ImageRef, info: ImageInfo) -> None:
    expected = {"crash": "crash", "hang": "hang", "bad": "bad"}.get(ref.uri)
    assert (info.error.type if info.error else None, info.etag) == (expected, ref.location)


def load_all(loader: Loader, shards: list[Shard], rng: random.Random) -> None:
    """Load shards, some of which are given up on the way; check each row and the order."""
    queue = ShardQueue.of(shards)
    give_ups = {shard.key.index for shard in shards if rng.random() < 0.15}
    rows_of: dict[int, int] = {}
    order: list[int] = []
    for batch in loader.batches(queue):
        shard = queue.find_shard(batch)
        assert shard is not None, "a batch of a shard that was given up is not delivered"
        index = shard.key.index
        assert batch.start == rows_of.get(index, 0), "every row once, in order"
        for row, info in enumerate(batch.image_infos, batch.start):
            check_row(shard.refs[row], info)
        rows_of[index] = batch.start + len(batch.image_infos)
        order.append(index)
        if index in give_ups and rng.random() < 0.5:
            queue.drop(shard)
            rows_of[index] = len(shard.refs)
        if rng.random() < 0.1:
            time.sleep(0.003)
    assert order == sorted(order)
    assert rows_of == {shard.key.index: len(shard.refs) for shard in shards if shard.refs}


def test_request_that_is_halved_between_two_epochs_begins_the_next_one(worlds: Callable[[int], World]) -> None:
    # Two halves are fewer requests than processes, and more than the window has room for: nothing new is asked for when
    # the batch before them is delivered, so that only its delivery can begin an epoch.
    world, gate = worlds(0), threading.Event()
    first, is_first = next(positions), world.is_first
    world.is_first = lambda location: gate.wait(10) and is_first(location)  # type: ignore[method-assign]
    words = ["fetch" if row == 4 else "picture" for row in range(40)]
    refs = tuple(ImageRef(first + row, word, f"{first + row}-{word}") for row, word in enumerate(words))
    shard = Shard(ShardKey(0, "0" * 16, len(refs), 0, 0), refs, pa.table({}))
    config = LoaderConfig(3, 1, False, IMAGE_SECONDS)
    loader = Loader(reader=Reader(), transform=do_nothing, batch_size=2, config=config, size=None)
    starts: list[int] = []

    def load() -> None:
        for batch in loader.batches(ShardQueue.of([shard])):
            if not starts:
                time.sleep(0.3)  # all other requests of the window are loaded, and the epoch has no more
                gate.set()
                time.sleep(0.3)  # the process is dead, and its request halved
            starts.append(batch.start)

    thread = threading.Thread(target=load, daemon=True)
    thread.start()
    thread.join(20)
    loader.close()
    assert world.deaths == 1
    assert starts == [0, 2, 4, 5, *range(6, 40, 2)]


def test_close_does_not_wait_for_the_answers_of_a_process_that_dies_meanwhile(
    worlds: Callable[[int], World], monkeypatch: pytest.MonkeyPatch
) -> None:
    world, gate, is_blocked = worlds(0), threading.Event(), threading.Event()
    monkeypatch.setattr("batchjob.loader.isolation._CLOSE_SECONDS", 60.0)

    def block(location: str) -> bool:
        is_blocked.set()
        return gate.wait(20)

    world.is_first = block  # type: ignore[method-assign]
    refs = tuple(ImageRef(next(positions), "fetch", "x") for _ in range(4))
    shard = Shard(ShardKey(0, "0" * 16, len(refs), 0, 0), refs, pa.table({}))
    config = LoaderConfig(1, 1, False, IMAGE_SECONDS)
    loader = Loader(reader=Reader(), transform=do_nothing, batch_size=2, config=config, size=None)
    threading.Thread(target=lambda: load_until_closed(loader, shard), daemon=True).start()
    assert is_blocked.wait(20)
    closing = threading.Thread(target=loader.close, daemon=True)
    closing.start()
    time.sleep(0.1)
    gate.set()
    closing.join(20)
    assert not closing.is_alive()
    assert world.deaths == 1


@pytest.mark.parametrize("part", range(4))
def test_every_batch_comes_once_and_in_order(part: int, worlds: Callable[[int], World]) -> None:
    deaths = 0
    for seed in range(part, SCHEDULES, 4):
        rng, world = random.Random(seed), worlds(seed)
        config = LoaderConfig(rng.randint(1, 3), rng.randint(1, 2), False, IMAGE_SECONDS)
        loader = Loader(reader=Reader(), transform=do_nothing, batch_size=rng.randint(1, 5), config=config, size=None)
        try:
            for _ in range(rng.randint(1, 2)):
                load_all(loader, make_shards(rng), rng)
                if rng.random() < 0.2:  # an epoch that is abandoned on the way
                    next(loader.batches(ShardQueue.of(make_shards(rng))), None)
        except BaseException:
            print(f"schedule {seed}")
            raise
        finally:
            loader.close()
        assert loader.process_deaths <= world.deaths
        deaths += world.deaths
    print(f"{deaths} deaths")
    assert deaths > SCHEDULES // 4, "the schedules kill processes"
