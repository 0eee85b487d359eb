"""Detection of the format of a model file."""

from __future__ import annotations

import io
from typing import Any

import pytest
import torch
from torch import nn

from batchjob.models.file_format import FileFormat, detect_format


@pytest.mark.parametrize("legacy", [False, True], ids=["zip", "legacy"])
@pytest.mark.parametrize(
    ("content", "file_format"), [(nn.Linear(2, 2).state_dict(), "state_dict"), (nn.Linear(2, 2), "pickled_module")]
)
def test_state_dicts_are_distinguished_from_modules(content: Any, file_format: FileFormat, legacy: bool) -> None:
    buffer = io.BytesIO()
    torch.save(content, buffer, _use_new_zipfile_serialization=not legacy)
    assert detect_format(buffer.getvalue()) == file_format
