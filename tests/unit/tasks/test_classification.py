"""Classification: the rows are those of plain torch; outputs that are no logits are refused."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pyarrow as pa
import pytest
import torch

from batchjob.errors import InvalidJob
from batchjob.storage.reader import Reader
from batchjob.tasks.classification import ClassificationTask
from batchjob.tasks.postprocess import EXAMPLE_ROWS, Postprocess
from batchjob.tasks.settings import TaskContext
from batchjob.types import ErrorRecord
from tests.support.task_rows import build_rows

READER, BASE = Reader(), Path()
NAN, INF = float("nan"), float("inf")


def make_postprocess(classes: int = 3, weight_labels: tuple[str, ...] | None = None, **settings: Any) -> Postprocess:
    output = torch.zeros(EXAMPLE_ROWS, classes)
    return ClassificationTask(**settings).build_postprocess(output, TaskContext(weight_labels, READER, BASE))


def test_top_k_classes_match_softmax_and_topk_of_torch() -> None:
    output = torch.randn(50, 7)
    labels = tuple("abcdefg")
    rows = build_rows(make_postprocess(7, labels, top_k=3), output)
    scores, ids = output.softmax(1).topk(3)
    for row, expected_ids, expected_scores in zip(rows, ids.tolist(), scores.tolist(), strict=True):
        assert [one["label_id"] for one in row["top_k"]] == expected_ids
        assert [one["label"] for one in row["top_k"]] == [labels[number] for number in expected_ids]
        assert [one["score"] for one in row["top_k"]] == pytest.approx(expected_scores)
        assert (row["label_id"], row["label"], row["score"]) == tuple(row["top_k"][0].values())


def test_schema_does_not_depend_on_labels_or_settings() -> None:
    class_type = pa.struct(
        [pa.field("label_id", pa.int32()), pa.field("label", pa.string()), pa.field("score", pa.float32())]
    )
    expected = pa.schema(
        {"label_id": pa.int32(), "label": pa.string(), "score": pa.float32(), "top_k": pa.list_(class_type)}
    )
    assert pa.schema(make_postprocess().fields) == expected
    assert pa.schema(make_postprocess(9, tuple("abcdefghi"), top_k=9, allow_nan=True).fields) == expected


def test_label_is_null_without_labels() -> None:
    (row,) = build_rows(make_postprocess(), torch.tensor([[0.0, 9.0, 0.0]]))
    assert (row["label_id"], row["label"]) == (1, None)
    assert row["top_k"][0]["label"] is None


def test_empty_batch_has_no_rows() -> None:
    assert build_rows(make_postprocess(), torch.zeros(0, 3)) == []


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_softmax_is_computed_in_float32(dtype: torch.dtype) -> None:
    output = torch.tensor([[1.0, 2.0, 3.0]], dtype=dtype)
    (row,) = build_rows(make_postprocess(), output)
    assert row["score"] == pytest.approx(float(output.float().softmax(1)[0, 2]), abs=1e-7)


def test_rows_that_are_not_finite_are_errors_and_null() -> None:
    output = torch.tensor([[1.0, 2.0, 3.0], [NAN, 0.0, 0.0], [INF, 0.0, 0.0], [-INF, 5.0, 0.0]])
    postprocess = make_postprocess(3, ("a", "b", "c"), top_k=2)
    rows = build_rows(postprocess, output)
    nulls = {"label_id": None, "label": None, "score": None, "top_k": None}
    assert [rows[0]["label"], rows[1], rows[2], rows[3]["label"]] == ["c", nulls, nulls, "b"]
    errors = find_errors(postprocess, output)
    assert [error is None for error in errors] == [True, False, False, True]
    assert errors[1] is not None
    assert (errors[1].stage, errors[1].type) == ("predict", "not_finite")
    assert "allow_nan" in errors[1].message


def test_accepted_nan_has_a_score_but_no_class() -> None:
    postprocess = make_postprocess(3, allow_nan=True)
    output = torch.tensor([[NAN, 0.0, 0.0], [0.0, 0.0, 9.0]])
    first, second = build_rows(postprocess, output)
    assert first["score"] != first["score"]
    assert (first["label_id"], first["top_k"], second["label_id"]) == (None, None, 2)
    assert find_errors(postprocess, output) == [None, None]


@pytest.mark.parametrize(
    ("output", "text"),
    [
        (torch.zeros(2, 3, 4, 4), "[2, 3, 4, 4]"),
        (torch.zeros(2), "[2]"),
        (torch.zeros(1, 3), "float32 [1, 3]"),
        (torch.zeros(()), "float32 []"),
        (torch.zeros(2, 3, dtype=torch.int64), "int64 [2, 3]"),
        (torch.zeros(2, 1), "says nothing"),
        ((torch.zeros(2, 3), torch.zeros(2, 3)), "a tuple of 2 (float32 [2, 3], float32 [2, 3])"),
        ({"out": torch.zeros(2, 3), "aux": None}, "a dict with the keys out, aux"),
        (None, "the model gives None"),
    ],
)
def test_output_other_than_logits_is_refused_with_its_shape(output: Any, text: str) -> None:
    with pytest.raises(InvalidJob) as caught:
        ClassificationTask().build_postprocess(output, TaskContext(None, READER, BASE))
    assert text in caught.value.message
    assert "model.type: python" in caught.value.message


def test_top_k_above_the_number_of_classes_is_refused() -> None:
    with pytest.raises(InvalidJob, match=r"task\.top_k is 5, but the model knows 3 classes"):
        make_postprocess(3, top_k=5)
    with pytest.raises(InvalidJob):
        ClassificationTask(top_k=0)


def test_row_bytes_bounds_the_columns() -> None:
    labels = [f"label number {n}" for n in range(10)]
    task = ClassificationTask(top_k=5, labels=labels)
    postprocess = task.build_postprocess(torch.zeros(EXAMPLE_ROWS, 10), TaskContext(None, READER, BASE))
    columns = postprocess.columns(postprocess.on_device(torch.randn(1000, 10)), [])
    assert sum(column.nbytes for column in columns) / 1000 <= task.row_bytes < ClassificationTask(top_k=5).row_bytes


def find_errors(postprocess: Postprocess, output: torch.Tensor) -> list[ErrorRecord | None]:
    return postprocess.find_errors(postprocess.on_device(output))
