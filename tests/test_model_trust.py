"""Digests that are checked, and one output out of several."""

from __future__ import annotations

import hashlib
from pathlib import Path
from typing import Any

import pytest

import batchjob
from batchjob.errors import InvalidJob
from batchjob.models.checkpoint import CheckpointModel
from batchjob.models.python import PythonModel
from batchjob.storage.reader import Reader

NET = """
from collections import namedtuple

from torch import nn

Two = namedtuple("Two", "logits features")


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
            "named": Two(logits, features),
            "none": None,
        }[self.kind]


def net(kind="one"):
    return Net(kind)
"""


@pytest.fixture
def beside(tmp_path: Path) -> Path:
    (tmp_path / "net.py").write_text(NET)
    return tmp_path


def returned(beside: Path, kind: str, output: str | int | None) -> Any:
    import torch

    settings = PythonModel.model_validate({"target": "net:net", "arguments": {"kind": kind}, "output": output})
    return settings.load(Reader(), beside).module(torch.ones(4, 3, 8, 8))


def test_a_file_of_another_digest_is_refused(beside: Path) -> None:
    import torch

    torch.save({"layer.weight": torch.ones(2, 3), "layer.bias": torch.ones(2)}, beside / "net.pth")
    digest = hashlib.sha256((beside / "net.pth").read_bytes()).hexdigest()
    model = {"architecture": "net:net", "weights": str(beside / "net.pth")}
    right = CheckpointModel.model_validate({**model, "sha256": digest.upper()}).load(Reader(), beside)
    assert right.digest == CheckpointModel.model_validate(model).load(Reader(), beside).digest
    with pytest.raises(InvalidJob, match=rf"net.pth has the sha256 {digest}, but model.sha256 is 0000") as caught:
        CheckpointModel.model_validate({**model, "sha256": "0" * 64}).load(Reader(), beside)
    assert "correct" in str(caught.value)


def test_a_digest_is_64_hexadecimal_digits(beside: Path) -> None:
    with pytest.raises(ValueError, match="sha256"):
        CheckpointModel.model_validate({"architecture": "resnet18", "weights": "net.pth", "sha256": "abc"})


def test_what_is_only_checked_does_not_make_another_job() -> None:
    job: dict[str, Any] = {
        "input": {"type": "prefix", "uri": "images/"},
        "model": {"type": "checkpoint", "architecture": "resnet18", "weights": "net.pth"},
        "task": {"type": "embedding"},
        "output": {"uri": "out"},
    }
    plain = batchjob.Job.model_validate(job).fingerprint()
    job["model"]["sha256"] = "0" * 64
    assert batchjob.Job.model_validate(job).fingerprint() == plain


@pytest.mark.parametrize(
    ("kind", "output"), [("dict", "logits"), ("tuple", 0), ("named", "logits"), ("named", 0), ("one", None)]
)
def test_one_output_of_several(kind: str, output: str | int | None, beside: Path) -> None:
    assert returned(beside, kind, output).shape == (4, 2)


@pytest.mark.parametrize(
    ("kind", "output", "said"),
    [
        ("dict", "logit", "a dict with the keys 'logits', 'features'; name one of them"),
        ("dict", 0, "a dict with the keys 'logits', 'features'; name one of them"),
        ("tuple", 2, "a tuple of 2; write a number from 0 to 1"),
        ("tuple", "logits", "a tuple of 2; write a number from 0 to 1"),
        ("named", "logit", r"a Two of 2 \(logits, features\); write a number from 0 to 1"),
        ("one", "logits", "one Tensor; leave model.output out"),
        ("none", 0, "None"),
    ],
)
def test_an_output_that_is_not_there(kind: str, output: str | int, said: str, beside: Path) -> None:
    with pytest.raises(InvalidJob, match=f"model.output is {output!r}, but the model returns {said}"):
        returned(beside, kind, output)
