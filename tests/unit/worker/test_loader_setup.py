"""Loader of one worker: its batch size, its number of processes, and a new shape for its images."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pyarrow as pa
import pytest
import torch

from batchjob.errors import InvalidJob
from batchjob.inference.engine import Engine
from batchjob.job.job import Job
from batchjob.loader.loader import Loader
from batchjob.loader.shard_queue import ShardQueue
from batchjob.storage.reader import Reader
from batchjob.types import Batch, ImageRef, Shard, ShardKey
from batchjob.worker.loader_setup import LoaderSetup
from tests.support.loaded_worker import write_job
from tests.support.saved_models import FORMATS

AUTO = "runtime.batch_size=auto"
IMAGE_BYTES = 3 * 8 * 8
MIB = 1 << 20


def make_setup(job: Job, cores: int = 1, small_input_bytes: int | None = None) -> LoaderSetup:
    reader = Reader()
    return LoaderSetup(job, Engine(job, reader, ()), reader, cores, small_input_bytes)


def set_free_shared_memory(monkeypatch: pytest.MonkeyPatch, free: int | None) -> None:
    monkeypatch.setattr("batchjob.worker.loader_setup.free_shared_memory", lambda: free)


def load_images(setup: LoaderSetup, folder: Path, names: Sequence[str]) -> list[Batch]:
    """Load a shard of these images."""
    refs = tuple(ImageRef(position, name, str(folder / name)) for position, name in enumerate(names))
    shard = Shard(ShardKey(0, "0" * 16, len(refs), 0, 0), refs, pa.table({}))
    return list(setup.loader.batches(ShardQueue.of([shard])))


# -- batch size ------------------------------------------------------------------------------------------------------


def test_batch_size_of_the_job_is_kept(tmp_path: Path) -> None:
    setup = make_setup(write_job(tmp_path))
    assert (setup.batch_size, setup.chooses_batch_size) == (4, False)


def test_batch_size_on_a_cpu_is_32_and_may_be_changed(tmp_path: Path) -> None:
    setup = make_setup(write_job(tmp_path, AUTO))
    assert (setup.batch_size, setup.chooses_batch_size) == (32, True)


def test_batch_size_that_the_model_fixes_is_used(tmp_path: Path) -> None:
    job = write_job(tmp_path, AUTO)
    saved = FORMATS["exported-fixed-batch"].save(tmp_path, 1)
    preprocess = {"resize": None, "crop": [saved.side, saved.side], "mean": None, "std": None}
    document = {**job.serialize(), "model": saved.settings, "preprocess": preprocess}
    setup = make_setup(Job.deserialize(document, tmp_path, tmp_path))
    assert (setup.batch_size, setup.chooses_batch_size) == (4, False)


def test_batch_size_counts_from_the_next_shard_on(tmp_path: Path) -> None:
    setup = make_setup(write_job(tmp_path))
    names = ["white.png"] * 7
    assert [len(batch.image_infos) for batch in load_images(setup, tmp_path, names)] == [4, 3]
    setup.set_batch_size(5)
    assert setup.batch_size == 5
    assert [len(batch.image_infos) for batch in load_images(setup, tmp_path, names)] == [5, 2]


@pytest.mark.parametrize(
    ("free", "processes", "prefetch", "largest"),
    [
        (None, 4, 2, 1024),
        (1000, 0, 2, 1024),  # without processes no batch lies in shared memory
        # Half of the memory holds 4 * 2 batches: 307,200 / 2 / (8 * 192) = 100 images each.
        (307_200, 4, 2, 100),
        (307_199, 4, 2, 99),
        (307_200, 4, 1, 200),
        (1 << 30, 4, 2, 1024),  # 349,525 would fit
        (1000, 4, 2, 1),  # not even one would fit
    ],
)
def test_batches_in_flight_fill_half_of_the_shared_memory(
    free: int | None,
    processes: int,
    prefetch: int,
    largest: int,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    set_free_shared_memory(monkeypatch, free)
    loader = [f"runtime.loader.processes={processes}", f"runtime.loader.prefetch={prefetch}"]
    assert make_setup(write_job(tmp_path, AUTO, *loader)).max_batch_size == largest


# -- processes -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("cores", "small_input_bytes", "free", "processes", "in_flight"),
    [
        (8, None, None, 8, 8 * 2 * 4),
        (8, 40 * MIB, None, 3, 3 * 2 * 4),  # one process, and one more for each 16 MiB
        (8, 0, None, 1, 1 * 2 * 4),
        # Half of the shared memory holds 5 batches of 4 images: one for each of 5 processes.
        (8, None, 2 * 5 * 4 * IMAGE_BYTES, 5, 5 * 1 * 4),
    ],
)
def test_cores_input_and_shared_memory_limit_the_processes(
    cores: int,
    small_input_bytes: int | None,
    free: int | None,
    processes: int,
    in_flight: int,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    set_free_shared_memory(monkeypatch, free)
    setup = make_setup(write_job(tmp_path, "runtime.loader.processes=auto"), cores, small_input_bytes)
    assert setup.loader.config.processes == processes
    assert setup.images_in_flight == in_flight


# -- little shared memory --------------------------------------------------------------------------------------------

LOADER_AUTO = "runtime.loader.processes=auto"


@pytest.mark.parametrize(
    ("free", "batch_size", "processes"),
    [
        (None, 32, 16),
        (2 * 16 * 32 * IMAGE_BYTES, 32, 16),
        (2 * 16 * 13 * IMAGE_BYTES, 13, 16),  # smaller batches first
        (2 * 5 * 8 * IMAGE_BYTES, 8, 5),  # then fewer processes
        (0, 8, 1),
    ],
)
def test_small_shared_memory_makes_batches_smaller_before_it_takes_processes(
    free: int | None, batch_size: int, processes: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    set_free_shared_memory(monkeypatch, free)
    setup = make_setup(write_job(tmp_path, AUTO, LOADER_AUTO), cores=16)
    assert (setup.batch_size, setup.loader.config.processes) == (batch_size, processes)
    is_limited = batch_size < 32 or processes < 16
    assert len(setup.notes) == is_limited
    if is_limited:
        limit = f"limits the loader to {processes} of 16 processes and batches of {batch_size} images; "
        assert limit in setup.notes[0]
        assert "docker run --shm-size=1g" in setup.notes[0]
        assert "emptyDir" in setup.notes[0]


def test_small_shared_memory_never_changes_the_batch_size_of_the_job(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    set_free_shared_memory(monkeypatch, 2 * 2 * 4 * IMAGE_BYTES)
    setup = make_setup(write_job(tmp_path, LOADER_AUTO), cores=16)
    assert (setup.batch_size, setup.loader.config.processes) == (4, 2)
    assert "2 of 16 processes and batches of 4 images" in setup.notes[0]


@pytest.fixture
def read_only_shared_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("batchjob.worker.loader_setup.is_shared_memory_writable", lambda: False)


@pytest.mark.usefixtures("read_only_shared_memory")
def test_read_only_shared_memory_loads_in_the_worker_and_says_so(tmp_path: Path) -> None:
    setup = make_setup(write_job(tmp_path, LOADER_AUTO), cores=4)
    assert setup.loader.config.processes == 0
    assert "is read-only, so images are loaded in the worker itself" in setup.notes[0]


@pytest.mark.usefixtures("read_only_shared_memory")
def test_loader_processes_without_shared_memory_are_refused(tmp_path: Path) -> None:
    with pytest.raises(InvalidJob, match=r"runtime\.loader\.processes is 2, but .* is read-only here; mount it"):
        make_setup(write_job(tmp_path, "runtime.loader.processes=2"))


@pytest.mark.usefixtures("read_only_shared_memory")
def test_job_without_loader_processes_needs_no_shared_memory(tmp_path: Path) -> None:
    assert make_setup(write_job(tmp_path, "runtime.loader.processes=0")).notes == ()


# -- another shape ---------------------------------------------------------------------------------------------------


def test_after_a_restart_images_of_the_former_shape_are_errors(tmp_path: Path) -> None:
    setup = make_setup(write_job(tmp_path))
    (batch,) = load_images(setup, tmp_path, ["white.png"])
    assert batch.pixels is not None
    assert tuple(batch.pixels.shape[1:]) == setup.image_shape == (3, 8, 8)
    setup.restart((3, 6, 6))
    (batch,) = load_images(setup, tmp_path, ["white.png"])
    assert setup.image_shape == (3, 6, 6)
    (error,) = [info.error for info in batch.image_infos]
    assert error is not None
    assert (error.stage, error.type) == ("transform", "size")


def test_restart_keeps_the_batch_size(tmp_path: Path) -> None:
    setup = make_setup(write_job(tmp_path))
    setup.set_batch_size(3)
    setup.restart((3, 8, 8))
    assert [len(batch.image_infos) for batch in load_images(setup, tmp_path, ["white.png"] * 4)] == [3, 1]


def test_batches_are_pinned_for_the_gpu_of_the_engine(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A worker on cuda:1 whose batches were pinned for cuda:0 would open a context on another worker's GPU."""
    job, devices = write_job(tmp_path), []

    class RecordingLoader(Loader):
        def __init__(self, **arguments: Any) -> None:
            devices.append(arguments.get("device"))
            super().__init__(**arguments)

    monkeypatch.setattr("batchjob.worker.loader_setup.Loader", RecordingLoader)
    engine = Engine(job, Reader(), ())
    for device in ("cpu", "cuda:1"):
        engine.device = torch.device(device)
        LoaderSetup(job, engine, Reader(), 1, None).close()
    assert devices == [None, 1]
