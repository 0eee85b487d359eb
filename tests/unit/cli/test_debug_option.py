"""`--debug`: the traceback of a fault that is told in one sentence without it."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
from PIL import Image

from batchjob.cli.main import main

JOB = """
input: {type: prefix, uri: in}
model: {type: python, target: "net:build"}
preprocess: {transform: "net:transform"}
task: {type: raw}
runtime: {pool: local, device: cpu, loader: {processes: 0}}
output: {uri: out}
"""
NET = """
import torch

def build():
    return torch.nn.Flatten()

def broken():
    raise RuntimeError("no weights")

def transform(image):
    return inner(image)

def inner(image):
    raise ValueError("not this one")
"""


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "in").mkdir()
    Image.new("RGB", (4, 4)).save(tmp_path / "in" / "a.png")
    (tmp_path / "job.yaml").write_text(JOB)
    (tmp_path / "net.py").write_text(NET)
    return tmp_path


@pytest.mark.usefixtures("folder")
@pytest.mark.parametrize(
    ("override", "frame"), [("model.target=net:broken", "in broken"), ("runtime.pool=local", "in inner")]
)
def test_traceback_is_shown_with_debug_only(override: str, frame: str, capfd: pytest.CaptureFixture[str]) -> None:
    assert main(["run", "job.yaml", override]) == 2
    said = capfd.readouterr().err
    assert "Traceback" not in said
    assert "(net.py:" in said
    assert main(["run", "job.yaml", override, "--debug"]) == 2
    said = capfd.readouterr().err
    assert "Traceback" in said
    assert frame in said
    assert "BATCHJOB_DEBUG" not in os.environ
    assert main(["--debug", "validate", "job.yaml", override]) == 2
    assert "Traceback" in capfd.readouterr().err
