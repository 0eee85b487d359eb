"""Selection of one output of a model that returns several."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from batchjob.errors import InvalidJob
from batchjob.models.python import PythonModel
from batchjob.storage.reader import Reader

NET_SOURCE = """
from collections import namedtuple
from dataclasses import dataclass

import torch
from torch import nn

Outputs = namedtuple("Outputs", "logits features")


@dataclass
class Record:
    logits: torch.Tensor
    features: torch.Tensor

    def loss(self):
        return 0


class Net(nn.Module):
    def __init__(self, kind="one"):
        super().__init__()
        self.kind, self.layer = kind, nn.Linear(3, 2)

    def forward(self, x):
        features = x.mean(dim=(2, 3))
        logits = self.layer(features)
        return {
            "one": logits,
            "dict": {"logits": logits, "features": features},
            "tuple": (logits, features),
            "named": Outputs(logits, features),
            "dataclass": Record(logits, features),
            "none": None,
        }[self.kind]


def net(kind="one"):
    return Net(kind)
"""


@pytest.fixture
def job_folder(tmp_path: Path) -> Path:
    """Folder of a job file, with `net.py` in it."""
    (tmp_path / "net.py").write_text(NET_SOURCE)
    return tmp_path


def run_model(job_folder: Path, kind: str, output: str | int | None) -> Any:
    settings = PythonModel.model_validate({"target": "net:net", "arguments": {"kind": kind}, "output": output})
    return settings.load(Reader(), job_folder).module(torch.ones(4, 3, 8, 8))


@pytest.mark.parametrize(
    ("kind", "output"),
    [("dict", "logits"), ("tuple", 0), ("named", "logits"), ("named", 0), ("dataclass", "logits"), ("one", None)],
)
def test_one_output_is_selected(kind: str, output: str | int | None, job_folder: Path) -> None:
    assert run_model(job_folder, kind, output).shape == (4, 2)


@pytest.mark.parametrize(
    ("kind", "output", "message"),
    [
        ("dict", "logit", "a dict with the keys 'logits', 'features'; name one of them"),
        ("dict", 0, "a dict with the keys 'logits', 'features'; name one of them"),
        ("tuple", 2, "a tuple of 2; write a number from 0 to 1"),
        ("tuple", "logits", "a tuple of 2; write a number from 0 to 1"),
        ("named", "logit", r"an Outputs of 2 \(logits, features\); write a number from 0 to 1"),
        ("dataclass", "logit", "a Record with the attributes logits, features; name one of them"),
        ("dataclass", "loss", "a Record with the attributes logits, features; name one of them"),
        ("one", "logits", "one Tensor; leave model.output out"),
        ("one", "shape", "one Tensor; leave model.output out"),
        ("none", 0, "None"),
    ],
)
def test_unknown_output_is_explained(kind: str, output: str | int, message: str, job_folder: Path) -> None:
    with pytest.raises(InvalidJob, match=f"model.output is {output!r}, but the model returns {message}"):
        run_model(job_folder, kind, output)
