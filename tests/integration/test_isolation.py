"""Images that kill the process which decodes them: one error each in its row, all others right, none tried again."""

from __future__ import annotations

import importlib
import os
import signal
import time
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pyarrow as pa
import pytest
import torch

from batchjob.errors import AttemptFailed, StorageError, Unavailable
from batchjob.loader.loader import Loader
from batchjob.loader.quarantine import Quarantine
from batchjob.loader.sample import load_samples
from batchjob.loader.settings import LoaderConfig, LoaderSettings, resolve_loader_settings
from batchjob.loader.shard_queue import ShardQueue
from batchjob.storage.objects import ObjectData
from batchjob.storage.reader import Reader
from batchjob.storage.store import open_store
from batchjob.types import Batch, ErrorRecord, ImageInfo, ImageRef, PreparedImage, Shard, ShardKey
from tests.support.memory_store import MemoryStore

GIB = 1 << 30


@dataclass(frozen=True)
class HarmfulTransform:
    """Transform for files of a word and a shade; certain words harm the process. It logs each harmful word it meets."""

    folder: Path

    def __call__(self, data: bytes) -> PreparedImage:
        word = data.decode("latin1").partition(" ")[0]
        if word != "picture":
            with (self.folder / "harmful_words.log").open("a") as log:
                log.write(f"{word}\n")
        match word:
            case "segv":
                os.kill(os.getpid(), signal.SIGSEGV)
            case "exit":
                os._exit(9)
            case "kill":
                os.kill(os.getpid(), signal.SIGKILL)
            case "hang":
                while True:
                    pass
            case "doze":  # uses no CPU time, so the kernel's limit is never reached
                time.sleep(600)
            case "eat":
                return PreparedImage(torch.full((8 * GIB,), 7, dtype=torch.uint8), 1, 1)
            case "once" if (self.folder / "harmful_words.log").read_text().split().count("once") == 1:
                os.kill(os.getpid(), signal.SIGKILL)
            case "slow":
                time.sleep(0.3)
        return PreparedImage(torch.full((3, 2, 2), data[-1], dtype=torch.uint8), 2, 2)


@dataclass(frozen=True)
class DeadlyTransform(HarmfulTransform):
    """Transform that ends the process in which it is unpickled."""

    def __reduce__(self) -> tuple[Any, ...]:
        return os._exit, (3,)


@dataclass(frozen=True)
class UnimportableTransform(HarmfulTransform):
    """Transform that needs a module which the process does not have."""

    def __reduce__(self) -> tuple[Any, ...]:
        return importlib.import_module, ("a_module_that_is_not_there",)


class SlowReader(Reader):
    """Reader of a slow store."""

    def read_many(self, uris: Sequence[str], *how: Any, **more: Any) -> list[ObjectData | StorageError | Unavailable]:
        time.sleep(1.5)
        return super().read_many(uris, *how, **more)


class DeadlyReader(Reader):
    """Reader whose storage client crashes over one object, the first time or always."""

    def read_many(self, uris: Sequence[str], *how: Any, **more: Any) -> list[ObjectData | StorageError | Unavailable]:
        for uri in uris:
            content = Path(uri).read_bytes()
            seen = Path(uri + ".seen")
            if content.startswith(b"unreadable") or (content.startswith(b"shaky") and not seen.exists()):
                seen.touch()
                os.kill(os.getpid(), signal.SIGSEGV)
        return super().read_many(uris, *how, **more)


def write_shard(folder: Path, count: int, **others: Sequence[int]) -> Shard:
    """Write a shard of pictures, with other words at certain positions."""
    words = {position: word for word, positions in others.items() for position in positions}
    refs = []
    for position in range(count):
        path = folder / f"{position:04d}"
        path.write_bytes(words.get(position, "picture").encode() + b" " + bytes([position % 256]))
        refs.append(ImageRef(position, path.name, str(path)))
    return Shard(ShardKey(0, "0" * 16, len(refs), 0, 0), tuple(refs), pa.table({}))


def make_loader(
    folder: Path, *, seconds: float = 60.0, memory: int | None = None, processes: int = 2, **given: Any
) -> Loader:
    settings: dict[str, Any] = {
        "reader": Reader(),
        "transform": HarmfulTransform(folder),
        "batch_size": 16,
        "config": LoaderConfig(processes, 2, False, seconds, memory),
        "size": (2, 2),
    }
    return Loader(**settings | given)


def load_infos(loader: Loader, *shards: Shard) -> list[ImageInfo]:
    """Load all rows of the shards; check that they are in order and that each picture is the right one."""
    infos: list[ImageInfo] = []
    for batch in loader.batches(ShardQueue.of(shards)):
        assert batch.attempt_error is None
        assert batch.start == len(infos)
        good = [batch.start + row for row, info in enumerate(batch.image_infos) if info.error is None]
        assert read_shades(batch) == [position % 256 for position in good]
        infos += batch.image_infos
    return infos


def read_shades(batch: Batch) -> list[int]:
    return [] if batch.pixels is None else batch.pixels[:, 0, 0, 0].tolist()


def error_types(infos: Sequence[ImageInfo]) -> dict[int, str]:
    """Map the position of each error to stage/type."""
    return {row: f"{info.error.stage}/{info.error.type}" for row, info in enumerate(infos) if info.error is not None}


def count_harmful_words(folder: Path) -> Counter[str]:
    """Count the harmful words that processes have logged."""
    return Counter((folder / "harmful_words.log").read_text().split())


def test_deadly_image_is_one_error_and_costs_two_processes(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    loader = make_loader(tmp_path)
    infos = load_infos(loader, write_shard(tmp_path, 200, segv=[22, 23], exit=[90], kill=[95, 199]))
    loader.close()
    print(f"5 deadly images among 200: {loader.process_deaths} loader processes lost")
    crash, memory = "decode/crash", "decode/memory"
    assert error_types(infos) == {22: crash, 23: crash, 90: crash, 95: memory, 199: memory}
    assert len(infos) == 200
    assert infos[23].etag == Reader().stat(str(tmp_path / "0023")).etag, "the ETag that was read is known"
    assert count_harmful_words(tmp_path) == {"segv": 4, "exit": 2, "kill": 4}
    assert loader.process_deaths == 10
    messages = [record.getMessage() for record in caplog.records]
    assert sum("tried alone" in line for line in messages) == sum("is an error row" in line for line in messages) == 5


def test_image_that_never_ends_is_an_error_and_a_slow_store_or_batch_is_not(tmp_path: Path) -> None:
    loader = make_loader(tmp_path, seconds=1.0, reader=SlowReader())
    infos = load_infos(loader, write_shard(tmp_path, 48, hang=[7], slow=range(20, 26), doze=[40]))
    loader.close()
    assert error_types(infos) == {7: "decode/hang", 40: "decode/hang"}
    for row in (7, 40):
        fault = infos[row].error
        assert fault is not None
        assert "within 1 s" in fault.message
    assert (count_harmful_words(tmp_path)["hang"], count_harmful_words(tmp_path)["doze"], loader.process_deaths) == (
        2,
        2,
        4,
    )


def test_kernel_limits_cpu_time_without_the_workers_clock(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Stop the worker's clock, so that the kernel ends the process. Waiting uses no CPU time."""
    monkeypatch.setattr("batchjob.loader.worker_limits.WorkerProgress.is_overdue", lambda self, seconds: False)
    store, images = open_store(str(tmp_path / "out")), tmp_path / "images"
    images.mkdir()
    loader = make_loader(images, seconds=0.2)
    loader.quarantine = Quarantine(store, "plan/")
    infos = load_infos(loader, write_shard(images, 32, hang=[7], slow=range(20, 24)))
    loader.close()
    assert error_types(infos) == {7: "decode/hang"}
    assert loader.process_deaths == count_harmful_words(images)["hang"] == 2
    assert Quarantine(store, "plan/").find(7) == infos[7], "recorded for all workers"


def test_image_over_the_memory_limit_costs_no_process(tmp_path: Path) -> None:
    loader = make_loader(tmp_path, memory=3 * GIB)
    infos = load_infos(loader, write_shard(tmp_path, 40, eat=[3, 30]))
    loader.close()
    assert error_types(infos) == {3: "decode/memory", 30: "decode/memory"}
    assert loader.process_deaths == 0


def test_process_killed_over_a_good_image_costs_no_row(tmp_path: Path) -> None:
    loader = make_loader(tmp_path)
    infos = load_infos(loader, write_shard(tmp_path, 64, once=[37]))
    loader.close()
    assert error_types(infos) == {}
    assert len(infos) == 64
    assert loader.process_deaths == 1


def test_batch_that_kills_without_a_suspect_is_split(tmp_path: Path) -> None:
    loader = make_loader(tmp_path, reader=DeadlyReader(), batch_size=8)
    assert error_types(load_infos(loader, write_shard(tmp_path, 24, shaky=[12]))) == {}
    assert loader.process_deaths == 1
    with pytest.raises(AttemptFailed, match=r"SIGSEGV .*no image is to blame"):
        load_infos(loader, write_shard(tmp_path, 24, unreadable=[12]))
    assert len(load_infos(loader, write_shard(tmp_path, 24))) == 24, "the next epoch starts new processes"
    loader.close()


def test_quarantined_images_are_not_tried_again(tmp_path: Path) -> None:
    store, images = open_store(str(tmp_path / "out")), tmp_path / "images"
    images.mkdir()
    deadly = write_shard(images, 48, segv=[11], exit=[40])
    infos = []
    for loads_records in (True, True, False):
        loader = make_loader(images)
        loader.quarantine = Quarantine(store, "_batchjob/plans/0000/")
        if loads_records:
            loader.quarantine.load(range(48))
        infos.append(load_infos(loader, deadly))
        loader.close()
        print(f"{loader.process_deaths} loader processes lost")
    assert error_types(infos[0]) == {11: "decode/crash", 40: "decode/crash"}
    assert infos[0] == infos[1] == infos[2]
    assert count_harmful_words(images) == {"segv": 3, "exit": 3}, (
        "a loader without records reads the record before it tries an image again"
    )
    records = sorted(stat.uri for stat in store.list("_batchjob/"))
    assert records == [f"_batchjob/plans/0000/quarantine/{position:012d}.json" for position in (11, 40)]


def test_first_record_wins_and_damaged_records_are_ignored(tmp_path: Path) -> None:
    store = open_store(str(tmp_path))
    infos = [ImageInfo("tag", error=ErrorRecord("decode", kind, "words")) for kind in ("crash", "hang")]
    one, other = Quarantine(store, "plan/"), Quarantine(store, "plan/")
    assert one.record(5, infos[0]) == infos[0] == other.record(5, infos[1])
    store.put_if_absent("plan/quarantine/000000000006.json", b"{")
    store.put_if_absent("plan/quarantine/notes.txt", b"")
    third = Quarantine(store, "plan/")
    third.load(range(6, 9))
    assert third.errors_by_row(range(9)) == {}
    third.load(range(4, 9))
    assert third.errors_by_row([4, 5, 6]) == {1: infos[0]}
    assert third.find(6) is None
    assert Quarantine().find(5) is None


def test_quarantine_is_listed_once_and_again_for_a_shard_that_was_tried_before() -> None:
    """Only a worker that has tried a shard before can have recorded anything about its images."""
    store = MemoryStore()
    quarantine, other = Quarantine(store, "plan/"), Quarantine(store.client(), "plan/")
    quarantine.load(range(8))
    info = other.record(21, ImageInfo("tag", error=ErrorRecord("decode", "crash", "words")))
    other.record_suspects(range(24, 28), "why")
    for first in range(8, 800, 8):
        quarantine.load(range(first, first + 8))
    assert quarantine.errors_by_row(range(800)) == {}
    assert Counter(call.method for call in store.calls) == {"list": 1}, "one request for 100 shards"
    assert quarantine.find(21) == info, "a worker that loses a process over it reads the record"
    for refresh in (True, False):
        quarantine.load(range(16, 32), refresh=refresh)
        assert quarantine.errors_by_row([20, 21]) == {1: info}
        assert quarantine.has_suspect(range(24, 25))
    assert Counter(call.method for call in store.calls) == {"list": 2, "read": 1}


@pytest.mark.parametrize(
    ("transform", "words"),
    [(DeadlyTransform, "ended with exit code 3"), (UnimportableTransform, "ended with exit code 1")],
)
def test_processes_that_die_at_their_start_fail_the_attempt(
    tmp_path: Path, transform: type[HarmfulTransform], words: str
) -> None:
    loader = make_loader(tmp_path, transform=transform(tmp_path))
    with pytest.raises(AttemptFailed, match=rf"loader process \d+ {words} as it started"):
        load_infos(loader, write_shard(tmp_path, 4))
    loader.close()


def test_abandoned_epoch_and_close_wait_for_no_image(tmp_path: Path) -> None:
    loader = make_loader(tmp_path, batch_size=1)
    batches = loader.batches(ShardQueue.of([write_shard(tmp_path, 8, hang=[2])]))
    assert read_shades(next(batches)) == [0]
    del batches
    began = time.monotonic()
    loader.close()
    assert time.monotonic() - began < 30
    assert loader.process_deaths == 0


def test_process_memory_is_its_share_but_enough_for_the_largest_image() -> None:
    auto = LoaderSettings()
    assert resolve_loader_settings(auto, cores=4).memory_bytes is None
    assert resolve_loader_settings(auto, cores=3, memory_bytes=16 * GIB).memory_bytes == 4 * GIB
    assert resolve_loader_settings(auto, cores=3, memory_bytes=64 * GIB).memory_bytes == 6 * GIB
    assert resolve_loader_settings(auto, cores=7, memory_bytes=8 * GIB, max_pixels=1 << 26).memory_bytes == 3 * GIB
    assert (
        resolve_loader_settings(LoaderSettings(memory_mib=3000), cores=1, memory_bytes=GIB).memory_bytes == 3000 << 20
    )


def test_deadly_samples_give_their_errors(tmp_path: Path) -> None:
    refs = write_shard(tmp_path, 4, segv=[0], exit=[2]).refs
    samples = load_samples(
        Reader(), HarmfulTransform(tmp_path), [ref.location for ref in refs], LoaderConfig(2, 2, False)
    )
    told = [sample.type if isinstance(sample, ErrorRecord) else int(sample[0, 0, 0]) for sample in samples]
    assert told == ["crash", 1, "crash", 3]


def test_samples_end_at_the_limit_of_the_run(tmp_path: Path) -> None:
    refs = write_shard(tmp_path, 2).refs
    Path(refs[0].location).write_bytes(bytes(10_000))
    samples = load_samples(
        Reader(), HarmfulTransform(tmp_path), [ref.location for ref in refs], LoaderConfig(0, 2, False), max_bytes=9_999
    )
    told = [sample.type if isinstance(sample, ErrorRecord) else int(sample[0, 0, 0]) for sample in samples]
    assert told == ["too_large", 1]
