"""Images that kill the process which decodes them: one fault each in its place, all others right, nothing met twice."""

from __future__ import annotations

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
from memory_store import MemoryStore

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

GIB = 1 << 30


@dataclass(frozen=True)
class Prepare:
    """Pictures by their shade; words do harm to the process that reads them. Leaves a note of each word it meets."""

    folder: Path

    def __call__(self, data: bytes) -> PreparedImage:
        word = data.decode("latin1").partition(" ")[0]
        if word != "picture":
            with (self.folder / "met").open("a") as notes:
                notes.write(f"{word}\n")
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
            case "doze":  # no CPU second is used: the kernel's limit never comes
                time.sleep(600)
            case "eat":
                return PreparedImage(torch.full((8 * GIB,), 7, dtype=torch.uint8), 1, 1)
            case "once" if (self.folder / "met").read_text().split().count("once") == 1:
                os.kill(os.getpid(), signal.SIGKILL)
            case "slow":
                time.sleep(0.3)
        return PreparedImage(torch.full((3, 2, 2), data[-1], dtype=torch.uint8), 2, 2)


@dataclass(frozen=True)
class DeadOnArrival(Prepare):
    """Ends the process that it is brought to."""

    def __reduce__(self) -> tuple[Any, ...]:
        return os._exit, (3,)


class SlowReader(Reader):
    """A store that needs its time."""

    def read_many(self, uris: Sequence[str], *how: Any, **more: Any) -> list[ObjectData | StorageError | Unavailable]:
        time.sleep(1.5)
        return super().read_many(uris, *how, **more)


class DeadlyReader(Reader):
    """A storage client that crashes over one object, the first time or always."""

    def read_many(self, uris: Sequence[str], *how: Any, **more: Any) -> list[ObjectData | StorageError | Unavailable]:
        for uri in uris:
            content = Path(uri).read_bytes()
            seen = Path(uri + ".seen")
            if content.startswith(b"unreadable") or (content.startswith(b"shaky") and not seen.exists()):
                seen.touch()
                os.kill(os.getpid(), signal.SIGSEGV)
        return super().read_many(uris, *how, **more)


def shard(folder: Path, count: int, **others: Sequence[int]) -> Shard:
    """A shard of so many pictures, but for words at these positions."""
    words = {position: word for word, positions in others.items() for position in positions}
    refs = []
    for position in range(count):
        path = folder / f"{position:04d}"
        path.write_bytes(words.get(position, "picture").encode() + b" " + bytes([position % 256]))
        refs.append(ImageRef(position, path.name, str(path)))
    return Shard(ShardKey(0, "0" * 16, len(refs), 0, 0), tuple(refs), pa.table({}))


def make(folder: Path, *, seconds: float = 60.0, memory: int | None = None, processes: int = 2, **given: Any) -> Loader:
    settings: dict[str, Any] = {
        "reader": Reader(),
        "transform": Prepare(folder),
        "batch_size": 16,
        "config": LoaderConfig(processes, 2, False, seconds, memory),
        "size": (2, 2),
    }
    return Loader(**settings | given)


def loaded(loader: Loader, *shards: Shard) -> list[ImageInfo]:
    """Facts of all rows of a shard, once each row is seen to follow the last, and each picture to be the right one."""
    found: list[ImageInfo] = []
    for batch in loader.batches(ShardQueue.of(shards)):
        assert batch.attempt_error is None
        assert batch.start == len(found)
        good = [batch.start + row for row, fact in enumerate(batch.image_infos) if fact.error is None]
        assert shades(batch) == [position % 256 for position in good]
        found += batch.image_infos
    return found


def shades(batch: Batch) -> list[int]:
    return [] if batch.pixels is None else batch.pixels[:, 0, 0, 0].tolist()


def kinds(facts: Sequence[ImageInfo]) -> dict[int, str]:
    """Position → stage/type, of the faults."""
    return {row: f"{fact.error.stage}/{fact.error.type}" for row, fact in enumerate(facts) if fact.error is not None}


def met(folder: Path) -> Counter[str]:
    """How often each word was met by a process."""
    return Counter((folder / "met").read_text().split())


def test_a_deadly_image_is_one_fault_and_costs_two_processes(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    loader = make(tmp_path)
    found = loaded(loader, shard(tmp_path, 200, segv=[22, 23], exit=[90], kill=[95, 199]))
    loader.close()
    print(f"5 deadly images among 200: {loader.process_deaths} loader processes lost")
    crash, memory = "decode/crash", "decode/memory"
    assert kinds(found) == {22: crash, 23: crash, 90: crash, 95: memory, 199: memory}
    assert len(found) == 200
    assert found[23].etag == Reader().stat(str(tmp_path / "0023")).etag, "the version that was read is known"
    assert met(tmp_path) == {"segv": 4, "exit": 2, "kill": 4}
    assert loader.process_deaths == 10
    said = [record.getMessage() for record in caplog.records]
    assert sum("tried alone" in line for line in said) == sum("is an error row" in line for line in said) == 5


def test_an_image_that_takes_for_ever_is_a_fault_and_a_slow_store_or_batch_is_none(tmp_path: Path) -> None:
    loader = make(tmp_path, seconds=1.0, reader=SlowReader())
    found = loaded(loader, shard(tmp_path, 48, hang=[7], slow=range(20, 26), doze=[40]))
    loader.close()
    assert kinds(found) == {7: "decode/hang", 40: "decode/hang"}
    for row in (7, 40):
        fault = found[row].error
        assert fault is not None
        assert "within 1 s" in fault.message
    assert (met(tmp_path)["hang"], met(tmp_path)["doze"], loader.process_deaths) == (2, 2, 4)


def test_cpu_seconds_are_limited_where_the_clock_does_not_look(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The worker's clock is stopped: it is the kernel that ends the process. Who waits uses none of them."""
    monkeypatch.setattr("batchjob.loader.worker_progress.WorkerProgress.is_overdue", lambda self, seconds: False)
    store, images = open_store(str(tmp_path / "out")), tmp_path / "images"
    images.mkdir()
    loader = make(images, seconds=0.2)
    loader.quarantine = Quarantine(store, "plan/")
    found = loaded(loader, shard(images, 32, hang=[7], slow=range(20, 24)))
    loader.close()
    assert kinds(found) == {7: "decode/hang"}
    assert loader.process_deaths == met(images)["hang"] == 2
    assert Quarantine(store, "plan/").find(7) == found[7], "remembered for all others"


def test_an_image_that_wants_more_memory_than_there_is_costs_no_process(tmp_path: Path) -> None:
    loader = make(tmp_path, memory=3 * GIB)
    found = loaded(loader, shard(tmp_path, 40, eat=[3, 30]))
    loader.close()
    assert kinds(found) == {3: "decode/memory", 30: "decode/memory"}
    assert loader.process_deaths == 0


def test_a_process_that_was_killed_over_an_innocent_image_costs_no_row(tmp_path: Path) -> None:
    loader = make(tmp_path)
    found = loaded(loader, shard(tmp_path, 64, once=[37]))
    loader.close()
    assert kinds(found) == {}
    assert len(found) == 64
    assert loader.process_deaths == 1


def test_a_batch_that_kills_where_no_image_is_in_work_is_halved(tmp_path: Path) -> None:
    loader = make(tmp_path, reader=DeadlyReader(), batch_size=8)
    assert kinds(loaded(loader, shard(tmp_path, 24, shaky=[12]))) == {}
    assert loader.process_deaths == 1
    with pytest.raises(AttemptFailed, match=r"SIGSEGV .*no image is to blame"):
        loaded(loader, shard(tmp_path, 24, unreadable=[12]))
    assert len(loaded(loader, shard(tmp_path, 24))) == 24, "the next epoch starts anew"
    loader.close()


def test_what_is_in_quarantine_is_met_by_nobody_again(tmp_path: Path) -> None:
    store, images = open_store(str(tmp_path / "out")), tmp_path / "images"
    images.mkdir()
    deadly = shard(images, 48, segv=[11], exit=[40])
    facts = []
    for learns in (True, True, False):
        loader = make(images)
        loader.quarantine = Quarantine(store, "_batchjob/plans/0000/")
        if learns:
            loader.quarantine.load(range(48))
        facts.append(loaded(loader, deadly))
        loader.close()
        print(f"{loader.process_deaths} loader processes lost")
    assert kinds(facts[0]) == {11: "decode/crash", 40: "decode/crash"}
    assert facts[0] == facts[1] == facts[2]
    assert met(images) == {"segv": 3, "exit": 3}, "who did not know beforehand asks before it tries again"
    kept = sorted(stat.uri for stat in store.list("_batchjob/"))
    assert kept == [f"_batchjob/plans/0000/quarantine/{position:012d}.json" for position in (11, 40)]


def test_the_first_verdict_stands_and_damaged_records_count_for_nothing(tmp_path: Path) -> None:
    store = open_store(str(tmp_path))
    verdicts = [ImageInfo("tag", error=ErrorRecord("decode", kind, "words")) for kind in ("crash", "hang")]
    one, other = Quarantine(store, "plan/"), Quarantine(store, "plan/")
    assert one.record(5, verdicts[0]) == verdicts[0] == other.record(5, verdicts[1])
    store.put_if_absent("plan/quarantine/000000000006.json", b"{")
    store.put_if_absent("plan/quarantine/notes.txt", b"")
    late = Quarantine(store, "plan/")
    late.load(range(6, 9))
    assert late.errors_by_row(range(9)) == {}
    late.load(range(4, 9))
    assert late.errors_by_row([4, 5, 6]) == {1: verdicts[0]}
    assert late.find(6) is None
    assert Quarantine().find(5) is None


def test_the_quarantine_is_listed_once_and_anew_for_a_shard_that_was_tried_before() -> None:
    """As nobody else meets the images of a shard, nothing is found out about them but by who has tried it."""
    store = MemoryStore()
    quarantine, other = Quarantine(store, "plan/"), Quarantine(store.client(), "plan/")
    quarantine.load(range(8))
    verdict = other.record(21, ImageInfo("tag", error=ErrorRecord("decode", "crash", "words")))
    other.record_suspects(range(24, 28), "why")
    for first in range(8, 800, 8):
        quarantine.load(range(first, first + 8))
    assert quarantine.errors_by_row(range(800)) == {}
    assert Counter(call.method for call in store.calls) == {"list": 1}, "a request in all, for 100 shards"
    assert quarantine.find(21) == verdict, "who meets it nevertheless loses one process, and asks"
    for again in (True, False):
        quarantine.load(range(16, 32), refresh=again)
        assert quarantine.errors_by_row([20, 21]) == {1: verdict}
        assert quarantine.has_suspect(range(24, 25))
    assert Counter(call.method for call in store.calls) == {"list": 2, "read": 1}


def test_processes_that_die_as_they_start_are_no_image_s_fault(tmp_path: Path) -> None:
    loader = make(tmp_path, transform=DeadOnArrival(tmp_path))
    with pytest.raises(AttemptFailed, match=r"loader process \d+ ended with exit code 3 as it started"):
        loaded(loader, shard(tmp_path, 4))
    loader.close()


def test_an_epoch_that_is_left_and_a_loader_that_is_closed_wait_for_no_image(tmp_path: Path) -> None:
    loader = make(tmp_path, batch_size=1)
    batches = loader.batches(ShardQueue.of([shard(tmp_path, 8, hang=[2])]))
    assert shades(next(batches)) == [0]
    del batches
    began = time.monotonic()
    loader.close()
    assert time.monotonic() - began < 30
    assert loader.process_deaths == 0


def test_the_memory_of_a_process_is_its_share_but_enough_for_the_largest_image() -> None:
    auto = LoaderSettings()
    assert resolve_loader_settings(auto, cores=4).memory_bytes is None
    assert resolve_loader_settings(auto, cores=3, memory_bytes=16 * GIB).memory_bytes == 4 * GIB
    assert resolve_loader_settings(auto, cores=3, memory_bytes=64 * GIB).memory_bytes == 6 * GIB
    assert resolve_loader_settings(auto, cores=7, memory_bytes=8 * GIB, max_pixels=1 << 26).memory_bytes == 3 * GIB
    assert (
        resolve_loader_settings(LoaderSettings(memory_mib=3000), cores=1, memory_bytes=GIB).memory_bytes == 3000 << 20
    )


def test_images_that_are_looked_at_beforehand_end_nobody_either(tmp_path: Path) -> None:
    refs = shard(tmp_path, 4, segv=[0], exit=[2]).refs
    found = load_samples(Reader(), Prepare(tmp_path), [ref.location for ref in refs], LoaderConfig(2, 2, False))
    assert [int(pixels[0, 0, 0]) for pixels in found] == [1, 3]
