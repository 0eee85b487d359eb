"""Messages on a model's output: the value of `model.output` to write, and rows that are not those of the images."""

from __future__ import annotations

from collections import namedtuple
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from transformers.modeling_outputs import ImageClassifierOutput

from batchjob.errors import InvalidJob
from batchjob.tasks.model_output import output_format_error, require_float_output

LOGITS = torch.zeros(2, 5)
Pair = namedtuple("Pair", "scores, features")  # noqa: PYI024 - as a model of the user has it


@dataclass
class Answer:
    """Output of a user's model."""

    logits: torch.Tensor
    loss: None = None


@pytest.mark.parametrize(
    ("output", "advice"),
    [
        (ImageClassifierOutput(logits=LOGITS), "write model.output: logits, or"),
        ({"loss": torch.tensor(0.0), "logits": LOGITS, "features": LOGITS}, "write model.output: logits or features,"),
        ((LOGITS, None, torch.zeros(8, 3)), "write model.output: 0, or"),
        (Pair(LOGITS, LOGITS), "write model.output: scores or features, or"),
        (Answer(LOGITS), "write model.output: logits, or"),
        ({"ids": torch.zeros(2, dtype=torch.int64)}, "pick one of several with model.output, or"),
        ("text", "pick one of several with model.output, or"),
    ],
)
def test_outputs_that_can_be_selected_are_named(output: Any, advice: str) -> None:
    with pytest.raises(InvalidJob, match=f"; {advice}"):
        require_float_output(output, "a task wants [n, classes]", "wrap it")
    assert f"; {advice}" in output_format_error(output, "a task wants boxes").message or advice.endswith(",")


@pytest.mark.parametrize(
    ("rows", "advice"),
    [
        (8, r"it makes 4 rows of one image: where it flattens with view\(-1, …\), give preprocess the size of image"),
        (3, "it must give a row for each image; wrap it"),
        (1, "it must give a row for each image; wrap it"),
    ],
)
def test_rows_that_are_not_those_of_the_images(rows: int, advice: str) -> None:
    with pytest.raises(InvalidJob, match=advice):
        require_float_output(torch.zeros(rows, 5), "a task wants [n, classes]", "wrap it")
