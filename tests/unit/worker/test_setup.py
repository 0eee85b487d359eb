"""Set-up of a worker: facts for the driver, measured time, device faults; nothing is left behind when it is closed."""

from __future__ import annotations

import tempfile
from pathlib import Path

import pytest
import torch

from batchjob.errors import AttemptFailed, DeviceFault, InvalidJob
from batchjob.inference.cpu_parallelism import CpuParallelism
from batchjob.settings import Decision
from batchjob.storage.store import open_store
from batchjob.worker.setup import report_device_faults
from tests.support.harmful_job import CUDA_ASSERT, CUDA_ECC_ERROR
from tests.support.loaded_worker import load_worker, write_job

GPU = "cuda:0 (NVIDIA H200, GPU-1234)"
MEMORY_OF_A_BATCH = 3 << 29

SLOW_NET = """\
import time

from torch import nn


class Net(nn.Module):
    def forward(self, x):
        time.sleep(0.02)
        return x.mean(dim=(2, 3))


def make():
    return Net()
"""

COUNTING_NET = """\
from torch import nn


class Net(nn.Module):
    calls = 0

    def forward(self, x):
        self.calls += 1
        return x.mean(dim=(2, 3))


def make():
    return Net()
"""


@pytest.fixture
def temporary_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Folder in which scratch folders are created."""
    folder = tmp_path / "temporary"
    folder.mkdir()
    monkeypatch.setattr(tempfile, "tempdir", str(folder))
    return folder


# -- facts for the driver --------------------------------------------------------------------------------------------


def test_driver_learns_the_decisions_of_the_plan_that_is_resumed(tmp_path: Path) -> None:
    job = write_job(tmp_path, "task.type=classification")
    with load_worker(job, decisions={"task.activation": "sigmoid"}) as loaded:
        assert loaded.info.decisions == {"task.activation": Decision("sigmoid", "the plan was begun so")}


def test_driver_learns_device_model_columns_and_batch_size(tmp_path: Path) -> None:
    with load_worker(write_job(tmp_path)) as loaded:
        info = loaded.info
        assert (info.device, info.precision, info.columns, info.batch_size) == ("cpu", "fp32", ("embedding",), 4)
        assert info.model == f"{loaded.job.model.title}@{loaded.engine.digest[:12]}"
        assert info.ahead == 0, "without loader processes no image is loaded ahead"


# -- output ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("stored", [None, b"word of another driver"])
def test_worker_that_sees_another_output_than_the_driver_is_refused(tmp_path: Path, stored: bytes | None) -> None:
    job = write_job(tmp_path)
    if stored is not None:
        open_store(job.output.uri).put_if_absent("_batchjob/mark", stored)
    with (
        pytest.raises(InvalidJob, match="a worker cannot see there what the driver wrote"),
        load_worker(job, visibility_check=("_batchjob/mark", "8f3a")),
    ):
        pass


def test_worker_that_sees_the_output_of_the_driver_loads(tmp_path: Path) -> None:
    job = write_job(tmp_path)
    open_store(job.output.uri).put_if_absent("_batchjob/mark", b"written by driver 8f3a")
    with load_worker(job, visibility_check=("_batchjob/mark", "8f3a")) as loaded:
        assert loaded.info.device == "cpu"


# -- resources -------------------------------------------------------------------------------------------------------


def test_closed_worker_gives_back_threads_and_scratch_folder(tmp_path: Path, temporary_folder: Path) -> None:
    threads_before = torch.get_num_threads()
    with load_worker(write_job(tmp_path), cores=threads_before + 1) as loaded:
        assert loaded.scratch.path.parent == temporary_folder
        assert torch.get_num_threads() == loaded.cpu_parallelism.threads_per_batch
    assert torch.get_num_threads() == threads_before
    assert not list(temporary_folder.iterdir())


def test_worker_that_cannot_load_gives_back_threads_and_scratch_folder(tmp_path: Path, temporary_folder: Path) -> None:
    threads_before = torch.get_num_threads()
    job = write_job(tmp_path)
    (tmp_path / "net.py").write_text("def make():\n    raise RuntimeError('no weights')\n")
    with pytest.raises(InvalidJob, match="no weights"), load_worker(job, cores=threads_before + 1):
        pass
    assert torch.get_num_threads() == threads_before
    assert not list(temporary_folder.iterdir())


@pytest.mark.parametrize(
    ("memory", "parallelism"),
    [
        (None, CpuParallelism(4, 1)),
        (2 * MEMORY_OF_A_BATCH, CpuParallelism(2, 2)),
        (MEMORY_OF_A_BATCH // 2, CpuParallelism(1, 4)),
    ],
)
def test_cores_compute_as_many_batches_as_fit_into_memory(
    memory: int | None, parallelism: CpuParallelism, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("batchjob.worker.setup.available_memory", lambda: memory)
    with load_worker(write_job(tmp_path), cores=4) as loaded:
        assert loaded.cpu_parallelism == parallelism
        assert torch.get_num_threads() == parallelism.threads_per_batch


def test_module_that_changes_itself_computes_one_batch_with_all_cores(tmp_path: Path) -> None:
    job = write_job(tmp_path)
    (tmp_path / "net.py").write_text(COUNTING_NET)
    with load_worker(job, cores=4) as loaded:
        assert loaded.cpu_parallelism == CpuParallelism(1, 4)


# -- measured time ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("net", "images", "is_measured"),
    [
        (None, 100, False),
        # A first call of 20 ms or more for 4 images is 5 ms an image: 0.5 s for 100 of them, 100 s for 20,000.
        (SLOW_NET, 100, False),
        (SLOW_NET, 20_000, True),
    ],
    ids=["fast, few", "slow, few", "slow, many"],
)
def test_small_input_is_measured_only_if_it_takes_a_minute(
    net: str | None, images: int, is_measured: bool, tmp_path: Path
) -> None:
    job = write_job(tmp_path)
    if net is not None:
        (tmp_path / "net.py").write_text(net)
    with load_worker(job, sample=("white.png",) * images) as loaded:
        assert (loaded.seconds_per_image > 0.0) == is_measured


def test_large_input_is_always_measured(tmp_path: Path) -> None:
    with load_worker(write_job(tmp_path), small_input_bytes=None) as loaded:
        assert loaded.seconds_per_image > 0.0


# -- device faults ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("text", [CUDA_ASSERT, CUDA_ECC_ERROR])
def test_error_of_a_broken_device_names_the_device(text: str) -> None:
    with pytest.raises(DeviceFault) as ending, report_device_faults(GPU):
        raise RuntimeError(text)
    assert ending.value.message == f"{GPU} failed: RuntimeError: {text}; the same command resumes"
    assert (ending.value.device, ending.value.exit_code) == (GPU, 75)


def test_error_caused_by_a_broken_device_is_a_device_fault() -> None:
    with (
        pytest.raises(DeviceFault, match="the model failed; the same command resumes"),
        report_device_faults(GPU),
    ):
        raise AttemptFailed("the model failed") from RuntimeError(CUDA_ASSERT)


@pytest.mark.parametrize(
    "error",
    [
        ValueError("not of the device"),
        InvalidJob("model: its output does not fit the task"),
        DeviceFault(f"cuda:1 failed: {CUDA_ASSERT}", "cuda:1"),
        KeyboardInterrupt(CUDA_ASSERT),
    ],
    ids=["other", "job", "already classified", "interrupt"],
)
def test_other_errors_stay_as_they_are(error: BaseException) -> None:
    with pytest.raises(type(error)) as ending, report_device_faults(GPU):
        raise error
    assert ending.value is error
