"""Regression: numbers of a tensor or a dict as named columns."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pyarrow as pa
import pytest
import torch

from batchjob.errors import InvalidJob
from batchjob.storage.reader import Reader
from batchjob.tasks.postprocess import EXAMPLE_ROWS, Postprocess
from batchjob.tasks.regression import RegressionTask
from batchjob.tasks.settings import TaskContext
from tests.support.task_rows import build_rows, find_error_types

READER, BASE = Reader(), Path()
NAN, INF = float("nan"), float("inf")


def make_postprocess(task: Any, output: Any) -> Postprocess:
    postprocess: Postprocess = task.build_postprocess(output, TaskContext(None, READER, BASE))
    return postprocess


@pytest.mark.parametrize("shape", [(4,), (4, 1)])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
def test_single_output_is_a_number_per_row(shape: tuple[int, ...], dtype: torch.dtype) -> None:
    output = torch.arange(4, dtype=dtype).view(shape)
    postprocess = make_postprocess(RegressionTask(), output[:EXAMPLE_ROWS])
    assert postprocess.fields == [pa.field("value", pa.float32())]
    assert build_rows(postprocess, output) == [{"value": float(n)} for n in range(4)]


def test_several_outputs_are_named_columns() -> None:
    task = RegressionTask(outputs=["x", "y"])
    output = torch.tensor([[1.0, 2.0], [3.0, 4.0], [NAN, 5.0]])
    postprocess = make_postprocess(task, output[:2])
    assert build_rows(postprocess, output) == [{"x": 1, "y": 2}, {"x": 3, "y": 4}, {"x": None, "y": None}]
    assert find_error_types(postprocess, output) == [None, None, "not_finite"]
    lenient = make_postprocess(RegressionTask(outputs=["x", "y"], allow_nan=True), output[:2])
    assert (build_rows(lenient, output)[2]["y"], find_error_types(lenient, output)) == (5, [None] * 3)


def test_outputs_are_taken_from_a_dict_by_name() -> None:
    output = {"age": torch.ones(2, 1), "weight": torch.zeros(2), "features": torch.zeros(2, 64)}
    postprocess = make_postprocess(RegressionTask(outputs=["weight", "age"]), output)
    assert build_rows(postprocess, output) == [{"weight": 0, "age": 1}] * 2
    with pytest.raises(InvalidJob, match=r"a dict with the keys age, weight, features.*model\.output"):
        make_postprocess(RegressionTask(outputs=["price"]), output)


@pytest.mark.parametrize(
    ("outputs", "text"),
    [
        (["uri"], "a column of its own"),
        (["Error_Type"], "a column of its own"),
        (["a b"], "no name for a column"),
        (["2d"], "no name for a column"),
        (["a", "A"], "would be one column"),
        ([], "1 is the least"),
    ],
)
def test_invalid_column_names_are_refused(outputs: list[str], text: str) -> None:
    with pytest.raises(InvalidJob, match=text):
        RegressionTask(outputs=outputs)
