"""Digest of a model file, compared with the one in the job."""

from __future__ import annotations

import hashlib
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import batchjob
from batchjob.errors import InvalidJob
from batchjob.models.checkpoint import CheckpointModel
from batchjob.storage.reader import Reader


def test_file_with_another_digest_is_refused(tmp_path: Path) -> None:
    (tmp_path / "net.py").write_text("from torch import nn\n\n\ndef net():\n    return nn.Linear(3, 2)\n")
    torch.save(nn.Linear(3, 2).state_dict(), tmp_path / "net.pth")
    digest = hashlib.sha256((tmp_path / "net.pth").read_bytes()).hexdigest()
    settings = {"architecture": "net:net", "weights": str(tmp_path / "net.pth")}
    with_digest = CheckpointModel.model_validate({**settings, "sha256": digest.upper()}).load(Reader(), tmp_path)
    assert with_digest.digest == CheckpointModel.model_validate(settings).load(Reader(), tmp_path).digest
    with pytest.raises(InvalidJob, match=rf"net.pth has the sha256 {digest}, but model.sha256 is 0000") as caught:
        CheckpointModel.model_validate({**settings, "sha256": "0" * 64}).load(Reader(), tmp_path)
    assert "correct" in str(caught.value)


def test_digest_is_64_hexadecimal_digits() -> None:
    with pytest.raises(ValueError, match="sha256"):
        CheckpointModel.model_validate({"architecture": "resnet18", "weights": "net.pth", "sha256": "abc"})


def test_digest_is_not_part_of_the_fingerprint() -> None:
    job: dict[str, Any] = {
        "input": {"type": "prefix", "uri": "images/"},
        "model": {"type": "checkpoint", "architecture": "resnet18", "weights": "net.pth"},
        "task": {"type": "embedding"},
        "output": {"uri": "out"},
    }
    without_digest = batchjob.Job.model_validate(job).fingerprint()
    job["model"]["sha256"] = "0" * 64
    assert batchjob.Job.model_validate(job).fingerprint() == without_digest
