"""`type: tensorrt`: messages on a machine that cannot run an engine. Running one needs a GPU and torch-tensorrt."""

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
    """File that stands for an engine."""
    path = tmp_path / "net.ep"
    path.write_bytes(b"\x00\x9fcompiled elsewhere")
    return path


def test_engine_without_trust_is_refused(engine: Path) -> None:
    digest = hashlib.sha256(engine.read_bytes()).hexdigest()
    for settings in ({}, {"trust": True}, {"sha256": digest}):
        with pytest.raises(InvalidJob, match=rf"net\.ep is an engine of torch-tensorrt, .*model\.sha256: {digest}"):
            TensorrtModel(weights=str(engine), **settings).load(READER, Path())
    with pytest.raises(InvalidJob, match=r"but model\.sha256 is 0000"):
        TensorrtModel(weights=str(engine), trust=True, sha256="0" * 64).load(READER, Path())


def test_machine_without_a_gpu_is_refused(engine: Path) -> None:
    if torch.cuda.is_available():
        pytest.skip("this machine has a GPU")
    digest = hashlib.sha256(engine.read_bytes()).hexdigest()
    with pytest.raises(InvalidJob, match="needs an NVIDIA GPU, and there is none; run it where one is"):
        TensorrtModel(weights=str(engine), trust=True, sha256=digest).load(READER, Path())


def test_missing_torch_tensorrt_is_named(engine: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "torch_tensorrt", None)
    with pytest.raises(InvalidJob, match=r"needs torch-tensorrt, .*pip install torch-tensorrt"):
        TensorrtModel(weights=str(engine)).check(READER, Path())
