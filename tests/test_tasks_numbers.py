"""Regression, multilabel and raw: the numbers are those of plain torch, in columns that say what they are."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from pydantic import ValidationError

from batchjob.errors import InvalidJob
from batchjob.storage.reader import Reader
from batchjob.tasks.multilabel import MultilabelTask
from batchjob.tasks.postprocess import EXAMPLE_ROWS, Postprocess
from batchjob.tasks.raw import RawTask
from batchjob.tasks.regression import RegressionTask

READER, BASE = Reader(), Path()
NAN, INF = float("nan"), float("inf")


def prepared(task: Any, output: Any, own: tuple[str, ...] | None = None) -> Postprocess:
    post: Postprocess = task.build_postprocess(output, own, READER, BASE)
    return post


def rows(post: Postprocess, output: Any) -> list[dict[str, Any]]:
    tensors = post.on_device(output)
    table = pa.Table.from_arrays(post.columns(tensors, []), schema=pa.schema(post.fields))
    table.validate(full=True)
    found: list[dict[str, Any]] = table.to_pylist()
    return found


def kinds(post: Postprocess, output: Any) -> list[str | None]:
    return [fault.type if fault else None for fault in post.find_errors(post.on_device(output))]


# -------------------------------------------------------------------------------------------------------- regression


@pytest.mark.parametrize("shape", [(4,), (4, 1)])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
def test_one_number_is_the_column_value(shape: tuple[int, ...], dtype: torch.dtype) -> None:
    output = torch.arange(4, dtype=dtype).view(shape)
    post = prepared(RegressionTask(), output[:EXAMPLE_ROWS])
    assert post.fields == [pa.field("value", pa.float32())]
    assert rows(post, output) == [{"value": float(n)} for n in range(4)]


def test_several_numbers_have_their_names() -> None:
    task = RegressionTask(outputs=["x", "y"])
    output = torch.tensor([[1.0, 2.0], [3.0, 4.0], [NAN, 5.0]])
    post = prepared(task, output[:2])
    assert rows(post, output) == [{"x": 1, "y": 2}, {"x": 3, "y": 4}, {"x": None, "y": None}]
    assert kinds(post, output) == [None, None, "not_finite"]
    lenient = prepared(RegressionTask(outputs=["x", "y"], allow_nan=True), output[:2])
    assert (rows(lenient, output)[2]["y"], kinds(lenient, output)) == (5, [None] * 3)


def test_a_dict_gives_its_numbers_by_name_whatever_else_it_holds() -> None:
    output = {"age": torch.ones(2, 1), "weight": torch.zeros(2), "features": torch.zeros(2, 64)}
    assert rows(prepared(RegressionTask(outputs=["weight", "age"]), output), output) == [{"weight": 0, "age": 1}] * 2
    with pytest.raises(InvalidJob, match=r"a dict with the keys age, weight, features.*model\.output"):
        prepared(RegressionTask(outputs=["price"]), output)


@pytest.mark.parametrize(
    ("outputs", "said"),
    [
        (["uri"], "a column of its own"),
        (["Error_Type"], "a column of its own"),
        (["a b"], "no name for a column"),
        (["2d"], "no name for a column"),
        (["a", "A"], "would be one column"),
        ([], "at least 1"),
    ],
)
def test_names_that_cannot_be_columns(outputs: list[str], said: str) -> None:
    with pytest.raises(ValidationError, match=said):
        RegressionTask(outputs=outputs)


# -------------------------------------------------------------------------------------------------------- multilabel


def test_labels_over_the_threshold_in_falling_order() -> None:
    output = torch.randn(50, 6)
    post = prepared(MultilabelTask(threshold=0.4, labels=list("abcdef"), scores=True), output[:2])
    for row, scores in zip(rows(post, output), output.sigmoid().tolist(), strict=True):
        ranked = sorted(range(6), key=lambda number: -scores[number])
        want = [number for number in ranked if scores[number] >= 0.4]
        assert [one["label_id"] for one in row["labels"]] == want
        assert [one["label"] for one in row["labels"]] == ["abcdef"[number] for number in want]
        assert [one["score"] for one in row["labels"]] == pytest.approx([scores[number] for number in want])
        assert row["scores"] == pytest.approx(scores)


def test_each_label_may_have_its_own_threshold_and_a_row_a_bound() -> None:
    output = torch.tensor([[2.0, 1.0, 0.0, -1.0]] * 2)
    each = prepared(MultilabelTask(threshold=[0.95, 0.5, 0.5, 0.1]), output)
    assert [one["label_id"] for one in rows(each, output)[0]["labels"]] == [1, 2, 3]
    assert [one["label"] for one in rows(each, output)[0]["labels"]] == [None] * 3
    bound = prepared(MultilabelTask(threshold=0, top_k=2), output, tuple("abcd"))
    assert [one["label"] for one in rows(bound, output)[0]["labels"]] == ["a", "b"]


def test_large_logits_keep_their_order_and_minus_infinity_is_a_score_of_nothing() -> None:
    output = torch.tensor([[90.0, 99.0, -INF]] * 2)
    post = prepared(MultilabelTask(threshold=[0.5, 0.5, 0.0]), output)
    assert [(one["label_id"], one["score"]) for one in rows(post, output)[0]["labels"]] == [(1, 1), (0, 1), (2, 0)]
    assert kinds(post, output) == [None, None]
    hidden = prepared(MultilabelTask(threshold=[0.5, 1.0, 0.0]), torch.tensor([[-INF, 1.0, -INF]] * 2))
    assert [one["label_id"] for one in rows(hidden, torch.tensor([[-INF, 1.0, -INF]]))[0]["labels"]] == [2]


def test_no_label_is_an_empty_list_and_an_error_row_none() -> None:
    output = torch.tensor([[-9.0, -9.0], [NAN, 9.0]])
    strict = prepared(MultilabelTask(scores=True), output)
    assert rows(strict, output)[0]["labels"] == []
    assert rows(strict, output)[1] == {"labels": None, "scores": None}
    lenient = prepared(MultilabelTask(scores=True, allow_nan=True), output)
    assert [one["label_id"] for one in rows(lenient, output)[1]["labels"]] == [1]
    assert kinds(lenient, output) == [None, None]


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({"threshold": [0.5, 0.5]}, "task.threshold has 2 thresholds, but the model gives 3 classes"),
        ({"labels": ["a"]}, "task.labels has 1 labels, but the model gives 3 classes"),
        ({"top_k": 4}, "task.top_k is 4, but the model knows 3 classes"),
    ],
)
def test_settings_that_do_not_fit_the_classes(settings: dict[str, Any], said: str) -> None:
    with pytest.raises(InvalidJob, match=re.escape(said)):
        prepared(MultilabelTask(**settings), torch.zeros(2, 3))


def test_a_threshold_is_a_score() -> None:
    with pytest.raises(ValidationError):
        MultilabelTask(threshold=50)


def test_rows_have_a_bound(tmp_path: Path) -> None:
    labels = [f"label number {n}" for n in range(40)]
    for settings in ({}, {"scores": True}, {"top_k": 3}):
        task = MultilabelTask(labels=labels, threshold=0.0, **settings)
        output = torch.randn(1000, 40)
        post = prepared(task, output[:2])
        assert sum(column.nbytes for column in post.columns(post.on_device(output), [])) / 1000 <= task.row_bytes
    assert MultilabelTask(top_k=3).row_bytes < MultilabelTask().row_bytes
    (tmp_path / "labels.txt").write_text("a\nb\nc\n")
    task = MultilabelTask(labels=str(tmp_path / "labels.txt"))
    task.check(READER, BASE)
    assert rows(prepared(task, torch.ones(2, 3)), torch.ones(1, 3))[0]["labels"][2]["label"] == "c"


# --------------------------------------------------------------------------------------------------------------- raw

DTYPES = {
    torch.float16: pa.float32(),
    torch.bfloat16: pa.float32(),
    torch.float32: pa.float32(),
    torch.float64: pa.float64(),
    torch.uint8: pa.uint8(),
    torch.int8: pa.int8(),
    torch.int16: pa.int16(),
    torch.int32: pa.int32(),
    torch.int64: pa.int64(),
    torch.bool: pa.bool_(),
}


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_tensors_keep_their_type(dtype: torch.dtype) -> None:
    output = (torch.randn(5, 4) * 50).to(dtype)
    post = prepared(RawTask(), output[:2])
    assert post.fields[0].type == pa.list_(DTYPES[dtype], 4)
    assert [row["output"] for row in rows(post, output)] == output.tolist()
    single = prepared(RawTask(), output[:2, 0])
    assert single.fields[0].type == DTYPES[dtype]
    assert [row["output"] for row in rows(single, output[:, 0])] == output[:, 0].tolist()


def test_the_shape_of_a_row_is_kept_beside_its_numbers(tmp_path: Path) -> None:
    output = torch.randn(5, 2, 3, 4).permute(0, 3, 1, 2)
    post = prepared(RawTask(), output[:2])
    table = pa.Table.from_arrays(post.columns(post.on_device(output), []), schema=pa.schema(post.fields))
    pq.write_table(table, tmp_path / "raw.parquet")
    read = pq.read_table(tmp_path / "raw.parquet")
    assert read.schema.field("output").metadata[b"shape"] == b"[4, 2, 3]"
    torch.testing.assert_close(torch.tensor(read["output"].to_pylist()).view(5, 4, 2, 3), output, rtol=0, atol=0)


def test_dicts_and_tuples_are_a_column_each() -> None:
    a, b = torch.randn(2, 3), torch.arange(2)
    assert [field.name for field in prepared(RawTask(), {"logits": a, "best": b}).fields] == ["logits", "best"]
    assert [field.name for field in prepared(RawTask(), (a, b)).fields] == ["output_0", "output_1"]
    named = prepared(RawTask(), torch.ones(2, 3).max(dim=1))
    assert rows(named, torch.ones(1, 3).max(dim=1)) == [{"output_0": 1.0, "output_1": 0}]


def test_a_row_that_is_not_finite_in_any_tensor_is_null_in_all() -> None:
    output = {"a": torch.tensor([1.0, NAN, 3.0]), "b": torch.tensor([[1.0], [1.0], [INF]]), "c": torch.arange(3)}
    post = prepared(RawTask(), {name: part[:2] for name, part in output.items()})
    assert rows(post, output) == [{"a": 1, "b": [1], "c": 0}, *[{"a": None, "b": None, "c": None}] * 2]
    assert kinds(post, output) == [None, "not_finite", "not_finite"]
    lenient = prepared(RawTask(allow_nan=True), {name: part[:2] for name, part in output.items()})
    assert rows(lenient, output)[2] == {"a": 3, "b": [INF], "c": 2}


def test_wide_rows_are_refused_until_they_are_asked_for() -> None:
    output = torch.zeros(2, 64, 56, 56)
    with pytest.raises(
        InvalidJob, match=r"a row takes 802,817 bytes \(output \[64, 56, 56\]\).*task\.row_bytes is 65,536"
    ):
        prepared(RawTask(), output)
    task = RawTask(row_bytes=1_000_000)
    assert (task.row_bytes, len(prepared(task, output).fields)) == (1_000_000, 1)


def test_images_of_another_size_must_not_make_rows_of_another_shape() -> None:
    post = prepared(RawTask(), torch.zeros(2, 3, 4))
    with pytest.raises(InvalidJob, match=r"gives \[4, 3\] for an image where it gave \[3, 4\]"):
        post.on_device(torch.zeros(2, 4, 3))
