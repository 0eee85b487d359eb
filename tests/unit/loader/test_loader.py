"""Loader: order of batches, errors in their rows, epochs, processes that die and are replaced, nothing left behind."""

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
from tests.support.batchjob_process import ROOT


@dataclass(frozen=True)
class MisbehavingTransform:
    """Transform that decodes and resizes; certain file contents make it misbehave."""

    geometry: ResizeCrop

    def __call__(self, data: bytes) -> PreparedImage:
        if data == b"interrupt":
            os.kill(os.getpid(), signal.SIGINT)
            data = encode_png(4)
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


# Scripts import this file.
WITH_TESTS = {**os.environ, "PYTHONPATH": str(ROOT)}
TRANSFORM = MisbehavingTransform(ResizeCrop(Preprocess(resize=(8, 8))))


@dataclass(frozen=True)
class FailingReader:
    """Reader whose every read fails: with `Unavailable` as an answer, with any other error as an exception."""

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


def encode_png(shade: int, size: tuple[int, int] = (5, 4)) -> bytes:
    out = io.BytesIO()
    Image.new("RGB", size, (shade, shade, shade)).save(out, "PNG")
    return out.getvalue()


def make_shard(index: int, locations: Sequence[str | Path], sizes: Sequence[int | None] | None = None) -> Shard:
    refs = tuple(
        ImageRef(index * 1000 + n, str(location), str(location), sizes[n] if sizes else None)
        for n, location in enumerate(locations)
    )
    return Shard(ShardKey(index, "0" * 16, len(refs), 0, 0), refs, pa.table({}))


def write_images(folder: Path, *contents: bytes) -> list[Path]:
    paths = [folder / f"{n:03d}" for n in range(len(contents))]
    for path, content in zip(paths, contents, strict=True):
        path.write_bytes(content)
    return paths


def make_loader(processes: int = 0, **given: Any) -> Loader:
    settings: dict[str, Any] = {
        "reader": Reader(),
        "transform": TRANSFORM,
        "batch_size": 4,
        "config": LoaderConfig(processes, 2, False),
        "size": (8, 8),
    }
    return Loader(**settings | given)


def read_shades(batches: Iterable[Batch]) -> list[tuple[int, int, list[int]]]:
    return [
        (batch.shard_index, batch.start, [] if batch.pixels is None else batch.pixels[:, 0, 0, 0].tolist())
        for batch in batches
    ]


def error_types(batch: Batch) -> list[tuple[str, str] | None]:
    return [None if info.error is None else (info.error.stage, info.error.type) for info in batch.image_infos]


@pytest.fixture(scope="module")
def shared() -> Iterator[Loader]:
    """Loader with two processes, shared by all tests that leave its processes alive."""
    loader = make_loader(2)
    loader.start()
    yield loader
    loader.close()


@pytest.fixture(params=["in this process", "two processes"])
def loader(request: pytest.FixtureRequest) -> Loader:
    return make_loader() if request.param == "in this process" else request.getfixturevalue("shared")


def test_batches_come_in_order_and_never_span_shards(loader: Loader, tmp_path: Path) -> None:
    paths = write_images(tmp_path, *map(encode_png, range(40)))
    shards = [make_shard(0, paths[:6]), make_shard(1, []), make_shard(2, paths[6:36]), make_shard(3, paths[36:37])]
    queue = CountingQueue(shards)
    batches = list(loader.batches(queue))
    expected = [
        (s.key.index, start, [int(ref.uri[-3:]) for ref in s.refs[start : start + 4]])
        for s in shards
        for start in range(0, len(s.refs), 4)
    ]
    assert read_shades(batches) == expected
    assert all(batch.pixels is not None and batch.pixels.dtype == torch.uint8 for batch in batches)
    assert all(set(batch.stage_seconds) == {"fetch", "decode"} for batch in batches)
    info = batches[0].image_infos[0]
    assert (info.width, info.height, info.error) == (5, 4, None)
    assert info.etag == Reader().stat(str(paths[0])).etag is not None


def test_epochs_follow_each_other_even_after_an_abandoned_one(loader: Loader, tmp_path: Path) -> None:
    paths = write_images(tmp_path, *map(encode_png, range(24)))
    for _ in range(3):
        assert [
            shade
            for _, _, batch in read_shades(loader.batches(CountingQueue([make_shard(0, paths)])))
            for shade in batch
        ] == list(range(24))
    abandoned = loader.batches(CountingQueue([make_shard(1, paths), make_shard(2, paths)]))
    assert next(abandoned).shard_index == 1
    del abandoned
    assert read_shades(loader.batches(CountingQueue([make_shard(3, paths[:4])]))) == [(3, 0, [0, 1, 2, 3])]
    assert list(loader.batches(CountingQueue([]))) == []


def test_shard_is_taken_only_when_the_one_before_is_requested(tmp_path: Path) -> None:
    paths = write_images(tmp_path, *map(encode_png, range(8)))
    queue = CountingQueue([make_shard(0, paths), make_shard(1, paths)])
    batches = make_loader().batches(queue)
    assert queue.taken == 0
    assert [(next(batches).shard_index, queue.taken) for _ in range(4)] == [(0, 1), (0, 1), (1, 2), (1, 2)]


def test_errors_of_bad_images_stay_in_their_rows(loader: Loader, tmp_path: Path) -> None:
    paths = write_images(tmp_path, b"", encode_png(1), b"text", encode_png(2), b"odd", b"memory", encode_png(3))
    locations = [*map(str, [*paths[:4], tmp_path / "absent", *paths[4:]]), f"{tmp_path}/bad\0name"]
    first, second, third = loader.batches(CountingQueue([make_shard(0, locations)]))
    assert error_types(first) == [("decode", "empty"), None, ("decode", "not_an_image"), None]
    assert error_types(second) == [
        ("fetch", "not_found"),
        ("transform", "ZeroDivisionError"),
        ("decode", "memory"),
        None,
    ]
    assert error_types(third) == [("fetch", "unaddressable")]
    assert read_shades([first, second, third]) == [(0, 0, [1, 2]), (0, 4, [3]), (0, 8, [])]
    assert third.pixels is None
    assert second.image_infos[1].error is not None
    assert second.image_infos[1].error.message == "odd one"
    assert first.image_infos[0].etag is not None, "the ETag that was read is known of a bad image too"


def test_ctrl_c_does_not_reach_the_loader_processes(shared: Loader, tmp_path: Path) -> None:
    paths = write_images(tmp_path, b"interrupt")
    assert read_shades(shared.batches(CountingQueue([make_shard(0, paths)]))) == [(0, 0, [4])]


def test_images_of_other_sizes_and_types_are_errors(tmp_path: Path) -> None:
    paths = write_images(tmp_path, encode_png(1, (8, 8)), encode_png(2, (9, 9)), encode_png(3, (8, 8)), b"float")
    no_resize = MisbehavingTransform(ResizeCrop(Preprocess()))
    for size in (None, (8, 8), (3, 8, 8)):
        (batch,) = make_loader(transform=no_resize, size=size).batches(CountingQueue([make_shard(0, paths)]))
        assert error_types(batch) == [None, ("transform", "size"), None, ("transform", "type")]
        assert (batch.image_infos[1].width, batch.image_infos[1].height) == (9, 9)
    (batch,) = make_loader(transform=no_resize, size=(9, 9)).batches(CountingQueue([make_shard(0, paths)]))
    assert error_types(batch)[:3] == [("transform", "size"), None, ("transform", "size")]
    assert batch.image_infos[0].error is not None
    assert "3x8x8" in batch.image_infos[0].error.message
    assert "9x9" in batch.image_infos[0].error.message
    (batch,) = make_loader(size=None).batches(CountingQueue([make_shard(0, paths[3:])]))
    assert batch.pixels is not None
    assert batch.pixels.dtype == torch.float32


def test_files_over_max_bytes_are_not_fetched(tmp_path: Path) -> None:
    paths = write_images(tmp_path, encode_png(1), encode_png(2), b"x" * 5000)
    loader = make_loader(max_bytes=1000)
    (known,) = loader.batches(
        CountingQueue(
            [make_shard(0, [paths[0], tmp_path / "never fetched", paths[1], paths[2]], [None, 5000, 9, None])]
        )
    )
    assert error_types(known) == [None, ("fetch", "too_large"), None, ("fetch", "too_large")]
    assert read_shades([known]) == [(0, 0, [1, 2])]


def test_large_files_are_fetched_in_small_groups(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    group_sizes: list[int] = []

    class CountingReader(Reader):
        def read_many(
            self, uris: Sequence[str], *how: Any, **more: Any
        ) -> list[ObjectData | StorageError | Unavailable]:
            group_sizes.append(len(uris))
            return super().read_many(uris, *how, **more)

    paths = write_images(tmp_path, *map(encode_png, range(7)))
    loader = make_loader(reader=CountingReader(), batch_size=7)
    size = 60 * 1024 * 1024
    (batch,) = loader.batches(CountingQueue([make_shard(0, paths, [size, size, size, 5 * size, None, 1, size])]))
    assert group_sizes == [2, 1, 1, 3]
    assert read_shades([batch]) == [(0, 0, list(range(7)))]


def test_unreachable_store_is_an_attempt_error(tmp_path: Path) -> None:
    loader = make_loader(reader=FailingReader(Unavailable("the token has expired: log in again")))
    (batch,) = loader.batches(CountingQueue([make_shard(5, write_images(tmp_path, encode_png(1)))]))
    assert (batch.shard_index, batch.attempt_error, batch.image_infos) == (5, "the token has expired: log in again", ())


def test_invalid_job_is_raised_also_from_a_process(tmp_path: Path) -> None:
    shards = [make_shard(0, write_images(tmp_path, encode_png(1)))]
    for processes in (0, 1):
        loader = make_loader(processes, reader=FailingReader(InvalidJob("s3:// needs the extra")))
        with pytest.raises(InvalidJob, match="needs the extra"):
            list(loader.batches(CountingQueue(shards)))
        loader.close()


def test_requests_larger_than_a_pipe_block_nothing(tmp_path: Path) -> None:
    gone = [tmp_path / ("x" * 200) / f"{number:04}" for number in range(2000)]
    loader = make_loader(2, batch_size=len(gone))
    try:
        for _ in range(2):
            batches = list(loader.batches(CountingQueue([make_shard(index, gone) for index in range(5)])))
            assert [(batch.shard_index, len(batch.image_infos)) for batch in batches] == [
                (index, len(gone)) for index in range(5)
            ]
            assert {error and error[0] for batch in batches for error in error_types(batch)} == {"fetch"}
    finally:
        loader.close()


def test_image_that_hangs_without_cpu_time_is_found_in_a_large_batch(tmp_path: Path) -> None:
    (hang,) = write_images(tmp_path, b"doze")
    gone = [tmp_path / ("x" * 200) / f"{number:04}" for number in range(1999)]
    loader = make_loader(1, batch_size=2000, config=LoaderConfig(1, 3, False, 1.0))
    try:
        first, *others = loader.batches(
            CountingQueue([make_shard(0, [hang, *gone]), *(make_shard(index, gone) for index in (1, 2, 3))])
        )
    finally:
        loader.close()
    assert error_types(first)[0] == ("decode", "hang")
    assert [len(batch.image_infos) for batch in (first, *others)] == [2000, 1999, 1999, 1999]


class UnpicklableOnce(str):
    """Location that raises an error the first time it is unpickled."""

    __slots__ = ()

    def __reduce__(self) -> tuple[Any, ...]:
        return _unpickle, (str(self),)


def _unpickle(name: str) -> str:
    seen = Path(name + ".seen")
    if not seen.exists():
        seen.touch()
        raise RuntimeError("not this time")
    return name


def test_request_that_a_process_cannot_unpickle_is_loaded_by_another(tmp_path: Path) -> None:
    paths = write_images(tmp_path, *map(encode_png, range(8)))
    shard, loader = make_shard(0, paths), make_loader(1)
    unpicklable = replace(shard.refs[6], location=UnpicklableOnce(paths[6]))
    try:
        batches = list(
            loader.batches(CountingQueue([replace(shard, refs=(*shard.refs[:6], unpicklable, shard.refs[7]))]))
        )
        assert read_shades(batches) == [(0, 0, [0, 1, 2, 3]), (0, 4, [4, 5, 6, 7])]
        assert loader.process_deaths == 1
    finally:
        loader.close()


def test_loader_can_be_closed_while_a_process_receives_nothing(tmp_path: Path) -> None:
    gone = [tmp_path / ("x" * 200) / f"{number:04}" for number in range(4000)]
    before, loader = find_loader_processes(), make_loader(1, batch_size=len(gone))
    loader.start()
    list(loader.batches(CountingQueue([make_shard(0, gone[:1])])))
    (pid,) = find_loader_processes() - before
    os.kill(pid, signal.SIGSTOP)

    queue = CountingQueue([make_shard(index, gone) for index in range(3)])

    def load() -> None:
        with contextlib.suppress(Exception):
            list(loader.batches(queue))

    thread = threading.Thread(target=load, daemon=True)
    thread.start()
    while not queue.taken:
        pass
    threading.Event().wait(1.0)  # until the request is being sent
    loader.close()
    thread.join(60)
    assert not thread.is_alive()
    assert not find_loader_processes() - before


_SMALL_SHARED_MEMORY_SCRIPT = """
from pathlib import Path
from tests.unit.loader.test_loader import CountingQueue, LargeImages, write_images, make_loader, encode_png
from tests.unit.loader.test_loader import make_shard
from batchjob.errors import AttemptFailed
if __name__ == "__main__":
    loader = make_loader(1, batch_size=64, size=None, transform=LargeImages())
    try:
        list(loader.batches(CountingQueue([make_shard(0, write_images(Path.cwd(), *[encode_png(1)] * 64))])))
    except AttemptFailed as error:
        print(error)
    loader.close()
"""


@dataclass(frozen=True)
class LargeImages:
    def __call__(self, data: bytes) -> PreparedImage:
        return PreparedImage(torch.zeros((3, 100, 100), dtype=torch.uint8), 100, 100)


def test_full_shared_memory_fails_the_attempt(tmp_path: Path) -> None:
    private = ["unshare", "--mount", "--map-root-user"]
    if subprocess.run([*private, "mount", "-t", "tmpfs", "tmpfs", "/dev/shm"], check=False).returncode:
        pytest.skip("this system allows no private mount")
    (tmp_path / "small_shared_memory.py").write_text(_SMALL_SHARED_MEMORY_SCRIPT)
    script = f"exec {sys.executable} small_shared_memory.py"
    mounted = f"mount -t tmpfs -o size=1m tmpfs /dev/shm && {script}"
    done = subprocess.run(
        [*private, "sh", "-c", mounted],
        cwd=tmp_path,
        env=WITH_TESTS,
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    assert "no room for a batch in shared memory: enlarge /dev/shm" in done.stdout, done.stderr


_EXITING_SCRIPT = """
import contextlib, threading
from pathlib import Path
from tests.unit.loader.test_loader import CountingQueue, encode_png, find_loader_processes
from tests.unit.loader.test_loader import make_loader, make_shard, write_images
from batchjob.errors import AttemptFailed
from batchjob.concurrency import exit_past_daemon_threads, kill_child_processes
if __name__ == "__main__":
    paths = write_images(Path.cwd(), *[encode_png(1)] * 64)
    loader = make_loader(2)
    batches = loader.batches(CountingQueue(make_shard(0, paths) for _ in range(999)))
    next(batches)
    def load():
        with contextlib.suppress(AttemptFailed):  # a process may have been killed before it was ready
            list(batches)
        threading.Event().wait()
    threading.Thread(target=load, daemon=True).start()
    before = find_loader_processes()
    kill_child_processes()
    while before & find_loader_processes():
        pass
    threading.Event().wait(2)  # time in which dead processes would be replaced
    print(len(find_loader_processes()))
    exit_past_daemon_threads(75)
"""


def test_program_that_exits_while_loading_prints_nothing_and_starts_no_process(tmp_path: Path) -> None:
    (tmp_path / "exiting.py").write_text(_EXITING_SCRIPT)
    command = [sys.executable, "exiting.py"]
    done = subprocess.run(
        command, cwd=tmp_path, env=WITH_TESTS, capture_output=True, text=True, timeout=120, check=False
    )
    assert (done.returncode, done.stdout, "Traceback" in done.stderr) == (75, "0\n", False), done.stderr


def test_processes_killed_between_two_epochs_are_replaced(tmp_path: Path) -> None:
    paths = write_images(tmp_path, *map(encode_png, range(10)))
    before, loader = find_loader_processes(), make_loader(2, batch_size=1)
    assert len(list(loader.batches(CountingQueue([make_shard(0, paths)])))) == 10
    killed = find_loader_processes() - before
    assert len(killed) == 2
    for pid in killed:
        os.kill(pid, signal.SIGKILL)
    while killed & {process.pid for process in multiprocessing.active_children()}:
        pass
    assert len(list(loader.batches(CountingQueue([make_shard(0, paths)])))) == 10
    loader.close()


def test_close_leaves_no_process_and_may_be_called_before_start_and_twice(tmp_path: Path) -> None:
    before, threads = find_loader_processes(), set(threading.enumerate())
    loader = make_loader(2)
    loader.close()
    loader.start()
    loader.start()
    assert len(list(loader.batches(CountingQueue([make_shard(0, write_images(tmp_path, encode_png(1)))])))) == 1
    assert len(find_loader_processes() - before) == 2
    loader.close()
    loader.close()
    assert find_loader_processes() <= before
    loader.start()
    loader.close()
    assert find_loader_processes() <= before
    assert set(threading.enumerate()) <= threads


def test_settings_of_the_program_are_unchanged(tmp_path: Path) -> None:
    paths = write_images(tmp_path, encode_png(1))
    main, threads = sys.modules["__main__"], torch.get_num_threads()
    torch.manual_seed(3)
    state, numbers = torch.get_rng_state(), random.getstate()
    handlers = [signal.getsignal(kind) for kind in (signal.SIGINT, signal.SIGTERM)]
    for processes in (0, 1):
        loader = make_loader(processes)
        list(loader.batches(CountingQueue([make_shard(0, paths)])))
        loader.close()
    assert torch.get_num_threads() == threads
    assert torch.equal(torch.get_rng_state(), state)
    assert random.getstate() == numbers
    assert sys.modules["__main__"] is main
    assert [signal.getsignal(kind) for kind in (signal.SIGINT, signal.SIGTERM)] == handlers


_UNGUARDED_SCRIPT = """
import os, sys
with open(sys.argv[1] + "/imported", "a") as file:
    file.write("once\\n")
from tests.unit.loader.test_loader import CountingQueue, encode_png, find_loader_processes
from tests.unit.loader.test_loader import make_loader, make_shard, write_images
from pathlib import Path
loader = make_loader(2)
batches = loader.batches(CountingQueue([make_shard(0, write_images(Path(sys.argv[1]), *map(encode_png, range(64))))]))
next(batches)
print(*find_loader_processes(), flush=True)
sys.stdin.read()
"""


def test_script_without_main_guard_runs_once_and_leaves_no_process_when_killed(tmp_path: Path) -> None:
    script = tmp_path / "script.py"
    script.write_text(_UNGUARDED_SCRIPT)
    call = [sys.executable, str(script), str(tmp_path)]
    with subprocess.Popen(call, env=WITH_TESTS, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as program:
        assert program.stdout is not None
        pids = [int(pid) for pid in program.stdout.readline().split()]
        assert len(pids) == 2
        watches = [os.pidfd_open(pid) for pid in pids]
        program.kill()
        for watch in watches:
            assert wait_for_end(watch), "a loader process outlived its program"
    assert (tmp_path / "imported").read_text() == "once\n"


def test_auto_settings_follow_cores_images_and_shared_memory() -> None:
    auto = LoaderSettings()
    assert resolve_loader_settings(auto, cores=4) == LoaderConfig(4, 2, False)
    assert resolve_loader_settings(auto, cores=8, cuda=True) == LoaderConfig(8, 2, True)
    assert resolve_loader_settings(auto, cores=0).processes == 1
    for shared, expected in ((2048, (16, 2)), (640, (16, 1)), (64, (1, 1)), (20, (1, 1))):  # MiB
        config = resolve_loader_settings(
            auto, cores=16, cuda=True, batch_bytes=20 << 20, shared_memory_bytes=shared << 20
        )
        assert (config.processes, config.prefetch) == expected, shared
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
    explicit = LoaderSettings(processes=3, prefetch=5, pin_memory=True)
    assert resolve_loader_settings(explicit, cores=1, small_input_bytes=1, cuda=True) == LoaderConfig(3, 5, True)
    assert resolve_loader_settings(explicit, cores=1).pin_memory is False, "without CUDA there is nothing to pin for"
    assert resolve_loader_settings(LoaderSettings(pin_memory=False), cores=1, cuda=True).pin_memory is False


def test_transform_raises_image_errors() -> None:
    with pytest.raises(ImageError):
        TRANSFORM(b"")


def find_loader_processes() -> set[int]:
    """Find the loader processes of this program: its grandchildren, started by the fork server."""
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


def wait_for_end(watch: int) -> bool:
    import select

    try:
        return bool(select.select([watch], [], [], 20)[0])
    finally:
        os.close(watch)


def test_images_of_different_sizes_come_in_one_flat_tensor(tmp_path: Path) -> None:
    paths = write_images(tmp_path, encode_png(1, (8, 8)), encode_png(2, (3, 5)), b"no image", encode_png(3, (8, 8)))
    for processes in (0, 1):
        loader = make_loader(
            processes, transform=MisbehavingTransform(ResizeCrop(Preprocess())), size=None, variable_size=True
        )
        (batch,) = loader.batches(CountingQueue([make_shard(0, paths)]))
        loader.close()
        assert batch.pixels is not None
        assert batch.shapes is not None
        assert [sorted(shape[1:]) for shape in batch.shapes] == [[8, 8], [3, 5], [8, 8]]
        ends = [192, 237]
        assert [set(part.tolist()) for part in batch.pixels.tensor_split(ends)] == [{1}, {2}, {3}]
        assert [info.error is None for info in batch.image_infos] == [True, True, False, True]


@pytest.mark.parametrize("processes", [0, 1])
def test_dropped_shard_is_not_loaded_to_its_end(tmp_path: Path, processes: int) -> None:
    (path,) = write_images(tmp_path, encode_png(1))
    queue = ShardQueue.of([make_shard(index, [path] * 40) for index in (7, 8, 7)])
    running = make_loader(processes)
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
    assert 1 <= batches[dropped] < 8, "only batches that were in flight"
    assert {batch.attempt_number: batch.shard_index for batch in seen} == {dropped: 7, second: 8, third: 7}
