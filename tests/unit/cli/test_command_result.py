"""Results of commands: stdout holds the JSON object and nothing that the user's code prints."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from PIL import Image

from batchjob.cli.main import main

JOB = """
input: {type: prefix, uri: in}
model: {type: python, target: "net:build"}
preprocess: {resize: [8, 8], crop: null, mean: null, std: null}
task: {type: embedding}
runtime: {pool: local, device: cpu, loader: {processes: 0}}
output: {uri: out}
"""
NET = """
import sys
import torch

print("loading")

def build():
    sys.stdout.write("without an end of line")
    return torch.nn.Flatten()
"""


@pytest.mark.parametrize("command", ["run", "validate"])
def test_prints_of_user_code_are_kept_off_stdout(
    command: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("in").mkdir()
    Image.new("RGB", (8, 8)).save("in/a.png")
    Path("net.py").write_text(NET)
    Path("job.yaml").write_text(JOB)
    assert main([command, "job.yaml", "--json"]) == 0
    said = capsys.readouterr()
    assert json.loads(said.out)["exit_code"] == 0
    assert "without an end of line" in said.err
