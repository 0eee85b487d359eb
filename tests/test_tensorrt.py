"""TensorRT engines: what is said where they cannot run. That they run is for a machine with a GPU to show."""

from __future__ import annotations

import hashlib
import sys
from pathlib import Path

import pytest
import torch

from batchjob.errors import InvalidJob
from batchjob.models.tensorrt import TensorrtModel
from batchjob.storage.reader import Reader

READER = Reader()


@pytest.fixture
def engine(tmp_path: Path) -> Path:
    path = tmp_path / "net.ep"
    path.write_bytes(b"compiled elsewhere")
    return path


def test_an_engine_is_code_and_needs_trust(engine: Path) -> None:
    digest = hashlib.sha256(engine.read_bytes()).hexdigest()
    for more in ({}, {"trust": True}, {"sha256": digest}):
        with pytest.raises(InvalidJob, match=rf"net\.ep is an engine of torch-tensorrt, .*model\.sha256: {digest}"):
            TensorrtModel(weights=str(engine), **more).load(READER, Path())
    with pytest.raises(InvalidJob, match=r"but model\.sha256 is 0000"):
        TensorrtModel(weights=str(engine), trust=True, sha256="0" * 64).load(READER, Path())


def test_without_a_gpu_it_is_refused(engine: Path) -> None:
    if torch.cuda.is_available():
        pytest.skip("there is a GPU")
    digest = hashlib.sha256(engine.read_bytes()).hexdigest()
    with pytest.raises(InvalidJob, match="needs an NVIDIA GPU, and there is none; run it where one is"):
        TensorrtModel(weights=str(engine), trust=True, sha256=digest).load(READER, Path())


def test_a_missing_package_is_named(engine: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "torch_tensorrt", None)
    with pytest.raises(InvalidJob, match=r"needs torch-tensorrt, .*pip install torch-tensorrt"):
        TensorrtModel(weights=str(engine)).check(READER, Path())
