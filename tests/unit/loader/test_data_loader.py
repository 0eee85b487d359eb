"""Every batch comes from `torch.utils.data.DataLoader`: persistent processes of a fork server, pinned for CUDA."""

from __future__ import annotations

import signal
import threading
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pyarrow as pa
import pytest
import torch
from torch.utils.data import DataLoader

from batchjob import Job, run
from batchjob.loader.loader import Loader
from batchjob.loader.settings import LoaderConfig
from batchjob.loader.shard_queue import ShardQueue
from batchjob.storage.reader import Reader
from batchjob.types import Batch, ImageRef, PreparedImage, Shard, ShardKey
from tests.support.harmful_job import write_harmful_job

IMAGES = 10


@dataclass(frozen=True)
class SignalHandlers:
    """Transform whose result says which signal handlers its process has, and with how many threads it computes."""

    def __call__(self, data: bytes) -> PreparedImage:
        kinds = (signal.SIGINT, signal.SIGSEGV, signal.SIGBUS)
        expected = (signal.SIG_IGN, signal.SIG_DFL, signal.SIG_DFL)
        right = tuple(map(signal.getsignal, kinds)) == expected and torch.get_num_threads() == 1
        return PreparedImage(torch.full((1, 2, 2), int(right), dtype=torch.uint8), 2, 2)


class RecordedDataLoaders:
    """All DataLoaders that are made, and the images that they have delivered.

    Attributes:
        made: The DataLoaders.
        images: Images delivered so far.
        threads: Names of the threads that pinned a batch.
    """

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.made: list[DataLoader[Any]] = []
        self.images, self.threads = 0, list[str]()
        real_init, real_iter = DataLoader.__init__, DataLoader.__iter__

        def init(data_loader: DataLoader[Any], *args: Any, **kwargs: Any) -> None:
            real_init(data_loader, *args, **kwargs)
            self.made.append(data_loader)

        def iterate(data_loader: DataLoader[Any]) -> Iterator[Any]:
            for item in real_iter(data_loader):
                self.images += len(item.result.image_infos if hasattr(item, "result") else item.image_infos)
                yield item

        def pin_memory(batch: Batch) -> Batch:
            self.threads.append(threading.current_thread().name)
            return replace(batch, stage_seconds={"pinned": 1.0})

        monkeypatch.setattr(DataLoader, "__init__", init)
        monkeypatch.setattr(DataLoader, "__iter__", iterate)
        monkeypatch.setattr(Batch, "pin_memory", pin_memory)


@pytest.fixture
def recorded(monkeypatch: pytest.MonkeyPatch) -> RecordedDataLoaders:
    return RecordedDataLoaders(monkeypatch)


@pytest.fixture
def accelerator(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Let DataLoader find an accelerator of four devices; return the indices that threads choose."""
    chosen: list[int] = []
    if not torch.accelerator.is_available():
        monkeypatch.setattr("torch.accelerator.is_available", lambda: True)
        monkeypatch.setattr("torch.accelerator.current_accelerator", lambda: torch.device("cuda"))
        monkeypatch.setattr("torch.accelerator.current_device_index", lambda: chosen[-1] if chosen else 0)
        monkeypatch.setattr("torch.accelerator.set_device_index", chosen.append)
    return chosen


def load(folder: Path, config: LoaderConfig, **given: Any) -> list[Batch]:
    refs = []
    for position in range(IMAGES):
        path = folder / f"{position}"
        path.write_bytes(b"x")
        refs.append(ImageRef(position, path.name, str(path)))
    shard = Shard(ShardKey(0, "0" * 16, len(refs), 0, 0), tuple(refs), pa.table({}))
    loader = Loader(reader=Reader(), transform=SignalHandlers(), batch_size=4, config=config, size=None, **given)
    try:
        return [batch for _ in range(2) for batch in loader.batches(ShardQueue.of([shard]))]
    finally:
        loader.close()


@pytest.mark.parametrize("processes", [0, 1])
def test_all_batches_of_a_run_come_from_torchs_data_loader(
    processes: int, recorded: RecordedDataLoaders, tmp_path: Path
) -> None:
    job = write_harmful_job(tmp_path, IMAGES, black_positions=[])
    result = run(Job.from_file(Path(job), overrides=[f"runtime.loader.processes={processes}"]))
    assert (result.status, result.predicted) == ("complete", IMAGES)
    assert recorded.images == IMAGES
    assert {loader.num_workers for loader in recorded.made} == {processes}


def test_processes_are_persistent_and_come_from_a_fork_server(recorded: RecordedDataLoaders, tmp_path: Path) -> None:
    batches = load(tmp_path, LoaderConfig(2, 3, False))
    assert [len(batch.image_infos) for batch in batches] == [4, 4, 2] * 2
    (data_loader,) = recorded.made
    assert (data_loader.num_workers, data_loader.prefetch_factor) == (2, 3)
    assert data_loader.persistent_workers
    assert data_loader.multiprocessing_context.get_start_method() == "forkserver"
    assert data_loader.worker_init_fn is not None
    assert recorded.images == 2 * IMAGES


def test_process_ignores_ctrl_c_and_crashes_without_a_word_of_its_own(tmp_path: Path) -> None:
    (batch, *_) = load(tmp_path, LoaderConfig(1, 2, False))
    assert batch.pixels is not None
    assert batch.pixels.flatten().tolist() == [1] * batch.pixels.numel()


@pytest.mark.parametrize("processes", [0, 2])
def test_batches_for_cuda_are_pinned_by_the_data_loader(
    processes: int, recorded: RecordedDataLoaders, accelerator: list[int], tmp_path: Path
) -> None:
    batches = load(tmp_path, LoaderConfig(processes, 2, True), device=3)
    assert all(data_loader.pin_memory for data_loader in recorded.made)
    assert [dict(batch.stage_seconds) for batch in batches] == [{"pinned": 1.0}] * 6
    if processes:
        assert len(set(recorded.threads)) == 1, "DataLoader's own thread"
        assert "batchjob" not in recorded.threads[0]
        assert set(accelerator) == {3}, "DataLoader's thread uses the device of the job"


def test_batches_for_a_cpu_are_not_pinned(recorded: RecordedDataLoaders, tmp_path: Path) -> None:
    load(tmp_path, LoaderConfig(1, 2, False))
    assert recorded.threads == []
