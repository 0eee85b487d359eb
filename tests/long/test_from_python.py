"""A job that is built and run in the caller's own process leaves that process as it was."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from batchjob_process import read_rows
from tiny_job import red, write_tiny_job

import batchjob

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
        outcome = batchjob.run(
            batchjob.Job(
                input={"type": "prefix", "uri": "images/"},
                model={"type": "torchvision", "name": "resnet18", "seed": 3},
                preprocess={"resize": 40, "crop": 32, "mean": None, "std": None},
                task={"type": "embedding"},
                runtime={"pool": "local", "device": "cpu", "loader": {"processes": processes}},
                output={"uri": f"out{processes}"},
            )
        )
        assert (outcome.status, outcome.predicted) == ("complete", 4), outcome
    after = state()
    changed = [name for name in before if before[name] != after[name]]
    assert not changed, changed
    left = {thread for thread in threading.enumerate() if not thread.daemon} - {threading.main_thread()}
    assert not left, left
    print("unchanged")
"""


@pytest.fixture
def tiny(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A job of four images, in the working directory."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "images").mkdir()
    for number in range(4):
        (tmp_path / f"images/{number}.png").write_bytes(red(format="PNG"))
    write_tiny_job(tmp_path, "file\n" + "".join(f"images/{number}.png\n" for number in range(4)))
    return tmp_path


def test_a_run_from_python_leaves_the_process_as_it_was(tiny: Path) -> None:
    (tiny / "main.py").write_text(IN_PYTHON)
    done = subprocess.run(
        [sys.executable, "main.py"], check=False, cwd=tiny, capture_output=True, text=True, timeout=120
    )
    assert (done.returncode, done.stdout) == (0, "unchanged\n"), done.stderr
    alone, helped = (
        np.stack(read_rows(tiny / out)["embedding"].to_numpy(zero_copy_only=False)) for out in ("out0", "out1")
    )
    assert alone.dtype == np.float32, "the caller's default of float64 is not the job's"
    assert np.array_equal(alone, helped)


def test_the_public_face_is_enough(tiny: Path) -> None:
    job = batchjob.Job.from_file("job.yaml", {}, ["output.uri=again"])
    assert batchjob.run(job).status == "complete"
    assert batchjob.run(job).status == "already_complete"
