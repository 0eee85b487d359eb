"""Runs from Python: the caller's process stays as it was."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

import batchjob
from tests.support.batchjob_process import read_rows
from tests.support.tiny_job import encode_red_image, write_tiny_job

IN_PYTHON = """
import random, signal, sys, threading
import numpy, torch
from PIL import Image, ImageFile
import batchjob

torch.set_num_threads(1)
torch.set_default_dtype(torch.float64)
torch.manual_seed(5); random.seed(5); numpy.random.seed(5)
torch.set_grad_enabled(False)

def state():
    return dict(
        threads=torch.get_num_threads(), dtype=torch.get_default_dtype(), device=torch.get_default_device(),
        grad=torch.is_grad_enabled(), inference=torch.is_inference_mode_enabled(),
        rng=torch.get_rng_state().tolist(), random=random.getstate(), numpy=numpy.random.get_state()[1].tolist(),
        matmul=torch.get_float32_matmul_precision(), cudnn=torch.backends.cudnn.benchmark,
        deterministic=torch.are_deterministic_algorithms_enabled(), autocast=torch.is_autocast_enabled("cpu"),
        sharing=torch.multiprocessing.get_sharing_strategy(), start=torch.multiprocessing.get_start_method(True),
        pixels=Image.MAX_IMAGE_PIXELS, truncated=ImageFile.LOAD_TRUNCATED_IMAGES,
        term=signal.getsignal(signal.SIGTERM), int=signal.getsignal(signal.SIGINT), path=list(sys.path),
    )

if __name__ == "__main__":
    before = state()
    for processes in (0, 1):
        result = batchjob.run(
            batchjob.Job(
                input={"type": "prefix", "uri": "images/"},
                model={"type": "torchvision", "name": "resnet18", "seed": 3},
                preprocess={"resize": 40, "crop": 32, "mean": None, "std": None},
                task={"type": "embedding"},
                runtime={"pool": "local", "device": "cpu", "loader": {"processes": processes}},
                output={"uri": f"out{processes}"},
            )
        )
        assert (result.status, result.predicted) == ("complete", 4), result
    after = state()
    changed = [name for name in before if before[name] != after[name]]
    assert not changed, changed
    left = {thread for thread in threading.enumerate() if not thread.daemon} - {threading.main_thread()}
    assert not left, left
    print("unchanged")
"""


@pytest.fixture
def tiny_job(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Folder of a job of four images; it is the working directory."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "images").mkdir()
    for number in range(4):
        (tmp_path / f"images/{number}.png").write_bytes(encode_red_image(format="PNG"))
    write_tiny_job(tmp_path, "file\n" + "".join(f"images/{number}.png\n" for number in range(4)))
    return tmp_path


def test_run_from_python_leaves_the_process_unchanged(tiny_job: Path) -> None:
    (tiny_job / "main.py").write_text(IN_PYTHON)
    process = subprocess.run(
        [sys.executable, "main.py"], check=False, cwd=tiny_job, capture_output=True, text=True, timeout=120
    )
    assert (process.returncode, process.stdout) == (0, "unchanged\n"), process.stderr
    without_processes, with_process = (
        np.stack(read_rows(tiny_job / out)["embedding"].to_numpy(zero_copy_only=False)) for out in ("out0", "out1")
    )
    assert without_processes.dtype == np.float32, "the caller's default dtype must not change the output"
    assert np.array_equal(without_processes, with_process)


def test_public_names_are_enough_to_run_a_job(tiny_job: Path) -> None:
    job = batchjob.Job.from_file("job.yaml", {}, ["output.uri=again"])
    assert batchjob.run(job).status == "complete"
    assert batchjob.run(job).status == "already_complete"
