"""Shards to batches: order, faults in their place, epochs, processes that die and are replaced, nothing left behind."""

from __future__ import annotations

import contextlib
import io
import multiprocessing
import os
import random
import signal
import subprocess
import sys
import threading
import time
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import pyarrow as pa
import pytest
import torch
from PIL import Image

from batchjob.errors import ImageError, InvalidJob, StorageError, Unavailable
from batchjob.loader.loader import Loader
from batchjob.loader.settings import LoaderConfig, LoaderSettings, resolve_loader_settings
from batchjob.loader.shard_queue import ShardQueue
from batchjob.preprocessing.decode import decode
from batchjob.preprocessing.settings import DecodeSettings, Preprocess
from batchjob.preprocessing.transforms import ResizeCrop
from batchjob.storage.objects import ObjectData
from batchjob.storage.reader import Reader
from batchjob.types import Batch, ImageRef, PreparedImage, Shard, ShardKey


@dataclass(frozen=True)
class Prepare:
    """Decode and geometry; names in the pixels of an image pull the strings of the tests."""

    geometry: ResizeCrop

    def __call__(self, data: bytes) -> PreparedImage:
        if data == b"interrupt":
            os.kill(os.getpid(), signal.SIGINT)
            data = png(4)
        if data == b"doze":
            time.sleep(600)
        if data == b"odd":
            raise ZeroDivisionError("odd one")
        if data == b"memory":
            raise MemoryError
        if data == b"float":
            return PreparedImage(torch.full((3, 8, 8), 0.5), 1, 1)
        decoded = decode(data, DecodeSettings(), "rgb", False)
        return PreparedImage(self.geometry(decoded.pixels), decoded.width, decoded.height)


PREPARE = Prepare(ResizeCrop(Preprocess(resize=(8, 8))))


@dataclass(frozen=True)
class Unreachable:
    """In place of a reader: its store is away, or cannot be asked at all."""

    error: Exception

    def read_many(self, uris: Sequence[str], *_: Any, **__: Any) -> list[Unavailable]:
        if isinstance(self.error, Unavailable):
            return [self.error] * len(uris)
        raise self.error


class CountingQueue(ShardQueue):
    """Queue of these shards that counts how many were taken."""

    def __init__(self, shards: Iterable[Shard]) -> None:
        super().__init__(partial(next, iter(list(shards)), None))
        self.taken = 0

    def next_shard(self) -> Shard | None:
        shard = super().next_shard()
        self.taken += shard is not None
        return shard


def png(shade: int, size: tuple[int, int] = (5, 4)) -> bytes:
    out = io.BytesIO()
    Image.new("RGB", size, (shade, shade, shade)).save(out, "PNG")
    return out.getvalue()


def shard(index: int, locations: Sequence[str | Path], sizes: Sequence[int | None] | None = None) -> Shard:
    refs = tuple(
        ImageRef(index * 1000 + n, str(location), str(location), sizes[n] if sizes else None)
        for n, location in enumerate(locations)
    )
    return Shard(ShardKey(index, "0" * 16, len(refs), 0, 0), refs, pa.table({}))


def images(folder: Path, *contents: bytes) -> list[Path]:
    paths = [folder / f"{n:03d}" for n in range(len(contents))]
    for path, content in zip(paths, contents, strict=True):
        path.write_bytes(content)
    return paths


def make(processes: int = 0, **given: Any) -> Loader:
    settings: dict[str, Any] = {
        "reader": Reader(),
        "transform": PREPARE,
        "batch_size": 4,
        "config": LoaderConfig(processes, 2, False),
        "size": (8, 8),
    }
    return Loader(**settings | given)


def shades(batches: Iterable[Batch]) -> list[tuple[int, int, list[int]]]:
    return [
        (batch.shard_index, batch.start, [] if batch.pixels is None else batch.pixels[:, 0, 0, 0].tolist())
        for batch in batches
    ]


def faults(batch: Batch) -> list[tuple[str, str] | None]:
    return [None if fact.error is None else (fact.error.stage, fact.error.type) for fact in batch.image_infos]


@pytest.fixture(scope="module")
def shared() -> Iterator[Loader]:
    """One loader with two processes for all tests that leave it whole."""
    loader = make(2)
    loader.start()
    yield loader
    loader.close()


@pytest.fixture(params=["in this process", "two processes"])
def loader(request: pytest.FixtureRequest) -> Loader:
    return make() if request.param == "in this process" else request.getfixturevalue("shared")


def test_batches_come_in_order_and_never_span_shards(loader: Loader, tmp_path: Path) -> None:
    paths = images(tmp_path, *map(png, range(40)))
    shards = [shard(0, paths[:6]), shard(1, []), shard(2, paths[6:36]), shard(3, paths[36:37])]
    feed = CountingQueue(shards)
    found = list(loader.batches(feed))
    expected = [
        (s.key.index, start, [int(ref.uri[-3:]) for ref in s.refs[start : start + 4]])
        for s in shards
        for start in range(0, len(s.refs), 4)
    ]
    assert shades(found) == expected
    assert all(batch.pixels is not None and batch.pixels.dtype == torch.uint8 for batch in found)
    assert all(set(batch.stage_seconds) == {"fetch", "decode"} for batch in found)
    fact = found[0].image_infos[0]
    assert (fact.width, fact.height, fact.error) == (5, 4, None)
    assert fact.etag == Reader().stat(str(paths[0])).etag is not None


def test_epoch_after_epoch_even_after_one_that_was_left(loader: Loader, tmp_path: Path) -> None:
    paths = images(tmp_path, *map(png, range(24)))
    for _ in range(3):
        assert [
            shade for _, _, batch in shades(loader.batches(CountingQueue([shard(0, paths)]))) for shade in batch
        ] == list(range(24))
    left = loader.batches(CountingQueue([shard(1, paths), shard(2, paths)]))
    assert next(left).shard_index == 1
    del left
    assert shades(loader.batches(CountingQueue([shard(3, paths[:4])]))) == [(3, 0, [0, 1, 2, 3])]
    assert list(loader.batches(CountingQueue([]))) == []


def test_a_shard_is_taken_only_when_the_one_before_is_under_way(tmp_path: Path) -> None:
    paths = images(tmp_path, *map(png, range(8)))
    feed = CountingQueue([shard(0, paths), shard(1, paths)])
    batches = make().batches(feed)
    assert feed.taken == 0
    assert [(next(batches).shard_index, feed.taken) for _ in range(4)] == [(0, 1), (0, 1), (1, 2), (1, 2)]


def test_bad_images_stay_in_their_place(loader: Loader, tmp_path: Path) -> None:
    paths = images(tmp_path, b"", png(1), b"text", png(2), b"odd", b"memory", png(3))
    locations = [*map(str, [*paths[:4], tmp_path / "absent", *paths[4:]]), f"{tmp_path}/bad\0name"]
    first, second, third = loader.batches(CountingQueue([shard(0, locations)]))
    assert faults(first) == [("decode", "empty"), None, ("decode", "not_an_image"), None]
    assert faults(second) == [("fetch", "not_found"), ("transform", "ZeroDivisionError"), ("decode", "memory"), None]
    assert faults(third) == [("fetch", "unaddressable")]
    assert shades([first, second, third]) == [(0, 0, [1, 2]), (0, 4, [3]), (0, 8, [])]
    assert third.pixels is None
    assert second.image_infos[1].error is not None
    assert second.image_infos[1].error.message == "odd one"
    assert first.image_infos[0].etag is not None, "the version that was read is known, also of a bad one"


def test_ctrl_c_does_not_reach_the_loader_processes(shared: Loader, tmp_path: Path) -> None:
    paths = images(tmp_path, b"interrupt")
    assert shades(shared.batches(CountingQueue([shard(0, paths)]))) == [(0, 0, [4])]


def test_images_of_other_sizes_and_kinds_are_error_rows(tmp_path: Path) -> None:
    paths = images(tmp_path, png(1, (8, 8)), png(2, (9, 9)), png(3, (8, 8)), b"float")
    as_they_are = Prepare(ResizeCrop(Preprocess()))
    for size in (None, (8, 8), (3, 8, 8)):
        (batch,) = make(transform=as_they_are, size=size).batches(CountingQueue([shard(0, paths)]))
        assert faults(batch) == [None, ("transform", "size"), None, ("transform", "type")]
        assert (batch.image_infos[1].width, batch.image_infos[1].height) == (9, 9)
    (batch,) = make(transform=as_they_are, size=(9, 9)).batches(CountingQueue([shard(0, paths)]))
    assert faults(batch)[:3] == [("transform", "size"), None, ("transform", "size")]
    assert batch.image_infos[0].error is not None
    assert "3x8x8" in batch.image_infos[0].error.message
    assert "9x9" in batch.image_infos[0].error.message
    (batch,) = make(size=None).batches(CountingQueue([shard(0, paths[3:])]))
    assert batch.pixels is not None
    assert batch.pixels.dtype == torch.float32


def test_files_over_the_limit_are_not_fetched(tmp_path: Path) -> None:
    paths = images(tmp_path, png(1), png(2), b"x" * 5000)
    loader = make(max_bytes=1000)
    (known,) = loader.batches(
        CountingQueue([shard(0, [paths[0], tmp_path / "never asked for", paths[1], paths[2]], [None, 5000, 9, None])])
    )
    assert faults(known) == [None, ("fetch", "too_large"), None, ("fetch", "too_large")]
    assert shades([known]) == [(0, 0, [1, 2])]


def test_large_files_are_fetched_a_few_at_a_time(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[int] = []

    class Counting(Reader):
        def read_many(
            self, uris: Sequence[str], *how: Any, **more: Any
        ) -> list[ObjectData | StorageError | Unavailable]:
            asked.append(len(uris))
            return super().read_many(uris, *how, **more)

    paths = images(tmp_path, *map(png, range(7)))
    loader = make(reader=Counting(), batch_size=7)
    size = 60 * 1024 * 1024
    (batch,) = loader.batches(CountingQueue([shard(0, paths, [size, size, size, 5 * size, None, 1, size])]))
    assert asked == [2, 1, 1, 3]
    assert shades([batch]) == [(0, 0, list(range(7)))]


def test_a_store_that_is_away_is_no_fault_of_the_images(tmp_path: Path) -> None:
    loader = make(reader=Unreachable(Unavailable("the token has expired: log in again")))
    (batch,) = loader.batches(CountingQueue([shard(5, images(tmp_path, png(1)))]))
    assert (batch.shard_index, batch.attempt_error, batch.image_infos) == (5, "the token has expired: log in again", ())


def test_a_job_that_cannot_read_at_all_ends_also_from_a_process(tmp_path: Path) -> None:
    feed = [shard(0, images(tmp_path, png(1)))]
    for processes in (0, 1):
        loader = make(processes, reader=Unreachable(InvalidJob("s3:// needs the extra")))
        with pytest.raises(InvalidJob, match="needs the extra"):
            list(loader.batches(CountingQueue(feed)))
        loader.close()


def test_batches_that_are_larger_than_a_pipe_hold_nobody_up(tmp_path: Path) -> None:
    gone = [tmp_path / ("x" * 200) / f"{number:04}" for number in range(2000)]
    many = make(2, batch_size=len(gone))
    try:
        for _ in range(2):
            batches = list(many.batches(CountingQueue([shard(index, gone) for index in range(5)])))
            assert [(batch.shard_index, len(batch.image_infos)) for batch in batches] == [
                (index, len(gone)) for index in range(5)
            ]
            assert {fault and fault[0] for batch in batches for fault in faults(batch)} == {"fetch"}
    finally:
        many.close()


def test_an_image_that_hangs_without_using_its_core_is_found_in_a_large_batch_too(tmp_path: Path) -> None:
    (hang,) = images(tmp_path, b"doze")
    gone = [tmp_path / ("x" * 200) / f"{number:04}" for number in range(1999)]
    many = make(1, batch_size=2000, config=LoaderConfig(1, 3, False, 1.0))
    try:
        first, *others = many.batches(
            CountingQueue([shard(0, [hang, *gone]), *(shard(index, gone) for index in (1, 2, 3))])
        )
    finally:
        many.close()
    assert faults(first)[0] == ("decode", "hang")
    assert [len(batch.image_infos) for batch in (first, *others)] == [2000, 1999, 1999, 1999]


class Shy(str):
    """A name that cannot be read the first time it arrives somewhere."""

    __slots__ = ()

    def __reduce__(self) -> tuple[Any, ...]:
        return _arrived, (str(self),)


def _arrived(name: str) -> str:
    seen = Path(name + ".seen")
    if not seen.exists():
        seen.touch()
        raise RuntimeError("not this time")
    return name


def test_a_process_that_cannot_read_a_request_ends_and_another_loads_it(tmp_path: Path) -> None:
    paths = images(tmp_path, *map(png, range(8)))
    whole, one = shard(0, paths), make(1)
    shy = replace(whole.refs[6], location=Shy(paths[6]))
    try:
        found = list(one.batches(CountingQueue([replace(whole, refs=(*whole.refs[:6], shy, whole.refs[7]))])))
        assert shades(found) == [(0, 0, [0, 1, 2, 3]), (0, 4, [4, 5, 6, 7])]
        assert one.process_deaths == 1
    finally:
        one.close()


def test_a_loader_can_be_closed_while_a_process_takes_nothing(tmp_path: Path) -> None:
    gone = [tmp_path / ("x" * 200) / f"{number:04}" for number in range(4000)]
    before, stuck = children(), make(1, batch_size=len(gone))
    stuck.start()
    list(stuck.batches(CountingQueue([shard(0, gone[:1])])))
    (pid,) = children() - before
    os.kill(pid, signal.SIGSTOP)

    feed = CountingQueue([shard(index, gone) for index in range(3)])

    def ask() -> None:
        with contextlib.suppress(Exception):
            list(stuck.batches(feed))

    asking = threading.Thread(target=ask, daemon=True)
    asking.start()
    while not feed.taken:
        pass
    threading.Event().wait(1.0)  # until it is at sending
    stuck.close()
    asking.join(60)
    assert not asking.is_alive()
    assert not children() - before


_SMALL_SHM = """
import sys
from pathlib import Path
sys.path.insert(0, sys.argv[1])
from test_loader import CountingQueue, images, make, png, shard
from batchjob.errors import AttemptFailed
if __name__ == "__main__":
    loader = make(1, batch_size=64, size=None, transform=sys.modules["test_loader"].Large())
    try:
        list(loader.batches(CountingQueue([shard(0, images(Path.cwd(), *[png(1)] * 64))])))
    except AttemptFailed as error:
        print(error)
    loader.close()
"""


@dataclass(frozen=True)
class Large:
    def __call__(self, data: bytes) -> PreparedImage:
        return PreparedImage(torch.zeros((3, 100, 100), dtype=torch.uint8), 100, 100)


def test_shared_memory_that_is_full_is_no_fault_of_the_images(tmp_path: Path) -> None:
    private = ["unshare", "--mount", "--map-root-user"]
    if subprocess.run([*private, "mount", "-t", "tmpfs", "tmpfs", "/dev/shm"], check=False).returncode:
        pytest.skip("no mount of its own is allowed here")
    (tmp_path / "small.py").write_text(_SMALL_SHM)
    mounted = f"mount -t tmpfs -o size=1m tmpfs /dev/shm && exec {sys.executable} small.py {Path(__file__).parent}"
    done = subprocess.run(
        [*private, "sh", "-c", mounted], cwd=tmp_path, capture_output=True, text=True, timeout=120, check=False
    )
    assert "no room for a batch in shared memory: enlarge /dev/shm" in done.stdout, done.stderr


_LEAVING = """
import contextlib, sys, threading
from pathlib import Path
sys.path.insert(0, sys.argv[1])
from test_loader import CountingQueue, children, images, make, png, shard
from batchjob.errors import AttemptFailed
from batchjob.concurrency import exit_past_daemon_threads, kill_child_processes
if __name__ == "__main__":
    paths = images(Path.cwd(), *[png(1)] * 64)
    loader = make(2)
    batches = loader.batches(CountingQueue(shard(0, paths) for _ in range(999)))
    next(batches)
    def go_on():
        with contextlib.suppress(AttemptFailed):  # one may not even have begun
            list(batches)
        threading.Event().wait()
    threading.Thread(target=go_on, daemon=True).start()
    before = children()
    kill_child_processes()
    while before & children():
        pass
    threading.Event().wait(2)  # in which lost processes would be replaced
    print(len(children()))
    exit_past_daemon_threads(75)
"""


def test_a_program_that_leaves_amid_loading_leaves_in_silence_and_starts_no_process(tmp_path: Path) -> None:
    (tmp_path / "leaving.py").write_text(_LEAVING)
    command = [sys.executable, "leaving.py", str(Path(__file__).parent)]
    left = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=120, check=False)
    assert (left.returncode, left.stdout, "Traceback" in left.stderr) == (75, "0\n", False), left.stderr


def test_processes_that_were_killed_between_two_epochs_are_replaced(tmp_path: Path) -> None:
    paths = images(tmp_path, *map(png, range(10)))
    before, loader = children(), make(2, batch_size=1)
    assert len(list(loader.batches(CountingQueue([shard(0, paths)])))) == 10
    killed = children() - before
    assert len(killed) == 2
    for pid in killed:
        os.kill(pid, signal.SIGKILL)
    while killed & {process.pid for process in multiprocessing.active_children()}:
        pass
    assert len(list(loader.batches(CountingQueue([shard(0, paths)])))) == 10
    loader.close()


def test_close_leaves_no_process_and_may_be_called_early_and_again(tmp_path: Path) -> None:
    before, threads = children(), set(threading.enumerate())
    loader = make(2)
    loader.close()
    loader.start()
    loader.start()
    assert len(list(loader.batches(CountingQueue([shard(0, images(tmp_path, png(1)))])))) == 1
    assert len(children() - before) == 2
    loader.close()
    loader.close()
    assert children() <= before
    loader.start()
    loader.close()
    assert children() <= before
    assert set(threading.enumerate()) <= threads


def test_the_programs_own_settings_stay_as_they_are(tmp_path: Path) -> None:
    paths = images(tmp_path, png(1))
    main, threads = sys.modules["__main__"], torch.get_num_threads()
    torch.manual_seed(3)
    state, numbers = torch.get_rng_state(), random.getstate()
    handlers = [signal.getsignal(kind) for kind in (signal.SIGINT, signal.SIGTERM)]
    for processes in (0, 1):
        loader = make(processes)
        list(loader.batches(CountingQueue([shard(0, paths)])))
        loader.close()
    assert torch.get_num_threads() == threads
    assert torch.equal(torch.get_rng_state(), state)
    assert random.getstate() == numbers
    assert sys.modules["__main__"] is main
    assert [signal.getsignal(kind) for kind in (signal.SIGINT, signal.SIGTERM)] == handlers


SCRIPT = """
import os, sys
with open(sys.argv[1] + "/imported", "a") as file:
    file.write("once\\n")
sys.path.insert(0, sys.argv[2])
from test_loader import CountingQueue, children, images, make, png, shard
from pathlib import Path
loader = make(2)
batches = loader.batches(CountingQueue([shard(0, images(Path(sys.argv[1]), *map(png, range(64))))]))
next(batches)
print(*children(), flush=True)
sys.stdin.read()
"""


def test_a_script_without_a_guard_runs_once_and_killed_leaves_no_process(tmp_path: Path) -> None:
    script = tmp_path / "script.py"
    script.write_text(SCRIPT)
    call = [sys.executable, str(script), str(tmp_path), str(Path(__file__).parent)]
    with subprocess.Popen(call, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as program:
        assert program.stdout is not None
        pids = [int(pid) for pid in program.stdout.readline().split()]
        assert len(pids) == 2
        watches = [os.pidfd_open(pid) for pid in pids]
        program.kill()
        for watch in watches:
            assert ended(watch), "a loader process outlived its program"
    assert (tmp_path / "imported").read_text() == "once\n"


def test_auto_follows_the_cores_and_the_images() -> None:
    auto = LoaderSettings()
    assert resolve_loader_settings(auto, cores=4) == LoaderConfig(4, 2, False)
    assert resolve_loader_settings(auto, cores=8, cuda=True) == LoaderConfig(8, 2, True)
    assert resolve_loader_settings(auto, cores=0).processes == 1
    for shared, expected in ((2048, (16, 2)), (640, (16, 1)), (64, (1, 1)), (20, (1, 1))):  # MiB
        plan = resolve_loader_settings(
            auto, cores=16, cuda=True, batch_bytes=20 << 20, shared_memory_bytes=shared << 20
        )
        assert (plan.processes, plan.prefetch) == expected, shared
    for processes, batches, prefetch in ((2, 27, 2), (16, 20, 1)):
        some = LoaderSettings(processes=processes)
        assert (
            resolve_loader_settings(some, cores=32, batch_bytes=1 << 20, shared_memory_bytes=batches << 21).prefetch
            == prefetch
        )
    assert resolve_loader_settings(auto, cores=512).processes == 32
    assert [
        resolve_loader_settings(auto, cores=4, small_input_bytes=size << 20).processes for size in (0, 15, 16, 40, 900)
    ] == [1, 1, 2, 3, 4]
    given = LoaderSettings(processes=3, prefetch=5, pin_memory=True)
    assert resolve_loader_settings(given, cores=1, small_input_bytes=1, cuda=True) == LoaderConfig(3, 5, True)
    assert resolve_loader_settings(given, cores=1).pin_memory is False, "there is nothing to pin for"
    assert resolve_loader_settings(LoaderSettings(pin_memory=False), cores=1, cuda=True).pin_memory is False


def test_a_fault_keeps_its_words() -> None:
    with pytest.raises(ImageError):
        PREPARE(b"")


def children() -> set[int]:
    """Loader processes of this program: grandchildren by way of the fork server."""
    parents = {}
    for entry in Path("/proc").iterdir():
        if entry.name.isdigit():
            try:
                stat = (entry / "stat").read_text().rpartition(")")[2].split()
            except OSError:
                continue
            if stat[0] != "Z":
                parents[int(entry.name)] = int(stat[1])
    ours = {pid for pid, parent in parents.items() if parent == os.getpid()}
    return {pid for pid, parent in parents.items() if parent in ours and pid not in ours}


def ended(watch: int) -> bool:
    import select

    try:
        return bool(select.select([watch], [], [], 20)[0])
    finally:
        os.close(watch)


def test_images_of_different_sizes_travel_one_behind_the_other(tmp_path: Path) -> None:
    paths = images(tmp_path, png(1, (8, 8)), png(2, (3, 5)), b"no image", png(3, (8, 8)))
    for processes in (0, 1):
        loader = make(processes, transform=Prepare(ResizeCrop(Preprocess())), size=None, variable_size=True)
        (batch,) = loader.batches(CountingQueue([shard(0, paths)]))
        loader.close()
        assert batch.pixels is not None
        assert batch.shapes is not None
        assert [sorted(shape[1:]) for shape in batch.shapes] == [[8, 8], [3, 5], [8, 8]]
        ends = [192, 237]
        assert [set(part.tolist()) for part in batch.pixels.tensor_split(ends)] == [{1}, {2}, {3}]
        assert [fact.error is None for fact in batch.image_infos] == [True, True, False, True]


@pytest.mark.parametrize("processes", [0, 1])
def test_a_shard_that_is_no_longer_wanted_is_not_loaded_to_its_end(tmp_path: Path, processes: int) -> None:
    (path,) = images(tmp_path, png(1))
    queue = ShardQueue.of([shard(index, [path] * 40) for index in (7, 8, 7)])
    running = make(processes)
    seen: list[Batch] = []
    for batch in running.batches(queue):
        if not seen:
            (first,) = queue.in_flight()
            queue.drop(first)
        seen.append(batch)
    running.close()
    batches = Counter(batch.attempt_number for batch in seen)
    dropped, second, third = sorted(batches)
    assert (batches[second], batches[third]) == (10, 10)
    assert 1 <= batches[dropped] < 8, "only what was under way"
    assert {batch.attempt_number: batch.shard_index for batch in seen} == {dropped: 7, second: 8, third: 7}
