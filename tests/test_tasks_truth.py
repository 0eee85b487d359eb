"""How right rows were: sums by batch that add up over parts, and what the report makes of them."""

from __future__ import annotations

import json
import random
from collections import Counter
from collections.abc import Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
import torch
from cifar_job import footers
from PIL import Image
from pydantic import ValidationError
from sklearn import metrics

import batchjob
from batchjob.errors import InvalidJob
from batchjob.storage.reader import Reader
from batchjob.tasks.classification import ClassificationTask
from batchjob.tasks.embedding import EmbeddingTask
from batchjob.tasks.multilabel import MultilabelTask
from batchjob.tasks.postprocess import EXAMPLE_ROWS
from batchjob.tasks.regression import RegressionTask

READER, BASE = Reader(), Path()
NAN = float("nan")
ANIMALS = ("cat", "dog", "fish")


def tallied(task: Any, output: torch.Tensor, truths: dict[str, Any], cuts: Sequence[int] = ()) -> dict[str, Any]:
    """The summary of rows that were counted in pieces and added up, as JSON gives it back."""
    post = task.build_postprocess(output[:1].repeat(EXAMPLE_ROWS, *[1] * (output.ndim - 1)), None, READER, BASE)
    assert post.truth_columns == task.truth_columns
    tensors = post.on_device(output)
    columns = pa.Table.from_arrays(post.columns(tensors, []), schema=pa.schema(post.fields))
    good = [fault is None for fault in post.find_errors(tensors)]
    sums: Counter[str] = Counter()
    edges = [0, *cuts, len(output)]
    for name, values in truths.items():
        columns = columns.append_column(name, values if isinstance(values, pa.Array) else pa.array(values))
    for start, end in pairwise(edges):
        rows = columns.slice(start, end - start).filter(pa.array(good[start:end], pa.bool_()))
        found = post.sum_metrics(rows.combine_chunks().to_batches()[0] if rows.num_rows else empty(rows.schema))
        sums.update(json.loads(json.dumps(found)))
    summary: dict[str, Any] = json.loads(json.dumps(task.compute_metrics(sums), allow_nan=False))
    return summary


def empty(schema: pa.Schema) -> pa.RecordBatch:
    return pa.RecordBatch.from_arrays([pa.array([], field.type) for field in schema], schema=schema)


def logits(*classes: int, count: int = 3) -> torch.Tensor:
    """Rows whose likeliest class is given, the second the one after it."""
    made = torch.zeros(len(classes), count)
    for row, number in enumerate(classes):
        made[row, number], made[row, (number + 1) % count] = 9.0, 5.0
    return made


# --------------------------------------------------------------------------------------------------- classification


def test_accuracy_top_k_and_confusion() -> None:
    task = ClassificationTask(top_k=2, labels=ANIMALS, truth="animal")
    found = tallied(task, logits(0, 0, 1, 2, 2), {"animal": ["cat", "dog", "dog", "cat", "dog"]}, cuts=(2, 2, 4))
    assert found == {
        "truth": "animal",
        "images": 5,
        "unknown_truth": 0,
        "accuracy": 0.4,
        "top_2_accuracy": 0.8,
        "confusion": {"cat": {"cat": 1, "fish": 1}, "dog": {"cat": 1, "dog": 1, "fish": 1}},
    }


def test_accuracy_is_that_of_scikit_learn() -> None:
    torch.manual_seed(0)
    output, right = torch.randn(500, 7), torch.randint(0, 7, (500,))
    found = tallied(ClassificationTask(top_k=3, truth="t"), output, {"t": right.tolist()}, cuts=(100, 333))
    assert found["accuracy"] == metrics.accuracy_score(right, output.argmax(1))
    assert found["top_3_accuracy"] == metrics.top_k_accuracy_score(right, output.numpy(), k=3)
    matrix = metrics.confusion_matrix(right, output.argmax(1))
    assert found["confusion"] == {
        str(a): {str(b): int(n) for b, n in enumerate(row) if n} for a, row in enumerate(matrix)
    }


@pytest.mark.parametrize(
    ("truths", "right", "unknown"),
    [
        (["cat", "dog", "fish"], 3, 0),
        ([" cat", "dog ", "Fish"], 2, 1),  # as written, but for blanks around
        ([0, 1, 2], 3, 0),
        ([0.0, 1.0, 2.5], 2, 1),
        ([0.0, NAN, None], 1, 1),
        (["0", "1", "2"], 3, 0),
        (["0", "1", "9"], 2, 1),
        ([-1, 3, 2**62], 0, 3),
        ([None, "dog", None], 1, 0),
        (pa.array(["cat", "dog", "fish"], pa.large_string()), 3, 0),
        (pa.array([0, 1, 2**63], pa.uint64()), 2, 1),
        (pa.array([0, 1, 2], pa.int8()), 3, 0),
    ],
)
def test_what_names_a_class(truths: Any, right: int, unknown: int) -> None:
    task = ClassificationTask(labels=ANIMALS, truth="t")
    found = tallied(task, logits(0, 1, 2), {"t": truths})
    assert (found["accuracy"] or 0) * found["images"] == pytest.approx(right)
    assert found["unknown_truth"] == unknown


def test_text_that_is_a_label_is_no_id() -> None:
    task = ClassificationTask(labels=["2", "1", "0"], truth="t")
    assert tallied(task, logits(0, 1, 2), {"t": ["2", "1", "0"]})["accuracy"] == 1
    assert tallied(task, logits(0, 1, 2), {"t": [0, 1, 2]})["accuracy"] == 1
    found = tallied(ClassificationTask(labels=["10", "20", "30"], truth="t"), logits(0, 1, 2), {"t": ["0", "1", "2"]})
    assert (found["images"], found["unknown_truth"], found["accuracy"]) == (0, 3, None)


def test_classes_of_one_name_are_one_class() -> None:
    task = ClassificationTask(labels=["crane", "ship", "crane"], truth="t", top_k=2)
    found = tallied(task, logits(0, 2, 1), {"t": ["crane", "crane", "ship"]})
    assert (found["accuracy"], found["confusion"]) == (1, {"crane": {"crane": 2}, "ship": {"ship": 1}})
    assert tallied(task, logits(0, 2, 1), {"t": [2, 0, 1]})["accuracy"] == 1


def test_error_rows_do_not_count_and_nan_that_was_let_pass_is_wrong() -> None:
    output = torch.stack([logits(0)[0], torch.full((3,), NAN)])
    strict = tallied(ClassificationTask(labels=ANIMALS, truth="t"), output, {"t": ["cat", "cat"]})
    assert (strict["images"], strict["accuracy"]) == (1, 1)
    lenient = tallied(ClassificationTask(labels=ANIMALS, truth="t", allow_nan=True), output, {"t": ["cat", "cat"]})
    assert (lenient["images"], lenient["accuracy"], lenient["confusion"]) == (2, 0.5, {"cat": {"": 1, "cat": 1}})


def test_above_a_hundred_classes_only_counts_by_class_are_kept() -> None:
    found = tallied(ClassificationTask(truth="t"), logits(5, 5, 6, count=101), {"t": [5, 7, 6]}, cuts=(1,))
    assert "confusion" not in found
    assert found["classes"] == {
        "5": {"images": 1, "right": 1},
        "6": {"images": 1, "right": 1},
        "7": {"images": 1, "right": 0},
    }
    assert set(tallied(ClassificationTask(truth="t"), logits(5, count=2001), {"t": [5]})) == {
        "truth",
        "images",
        "unknown_truth",
        "accuracy",
    }


def test_without_truth_nothing_is_told_and_without_rows_no_rate() -> None:
    assert ClassificationTask().compute_metrics({}) == {} == EmbeddingTask().compute_metrics({})
    assert ClassificationTask().truth_columns == () == EmbeddingTask().truth_columns
    none = ClassificationTask(truth="t", top_k=5).compute_metrics({})
    assert none == {"truth": "t", "images": 0, "unknown_truth": 0, "accuracy": None, "top_5_accuracy": None}


# -------------------------------------------------------------------------------------------------------- regression


def test_errors_of_a_regression_are_those_of_scikit_learn() -> None:
    own = np.random.default_rng(0)
    right = own.normal(1000, 3, 400)
    predicted = torch.tensor(right + own.normal(0, 1, 400), dtype=torch.float32)
    found = tallied(RegressionTask(truth="t"), predicted, {"t": right.tolist()}, cuts=(7, 7, 300))["value"]
    assert (found["truth"], found["images"], found["not_finite"]) == ("t", 400, 0)
    assert found["mean_absolute_error"] == pytest.approx(metrics.mean_absolute_error(right, predicted))
    assert found["root_mean_squared_error"] == pytest.approx(metrics.root_mean_squared_error(right, predicted))
    assert found["r2"] == pytest.approx(metrics.r2_score(right, predicted.double()), rel=1e-9)


def test_r2_stands_where_the_mean_is_far_above_the_spread() -> None:
    right = [1.7e9 + 1e4 * n for n in range(100)]
    predicted = torch.tensor([value + 500 for value in right], dtype=torch.float64)
    found = tallied(RegressionTask(truth="t"), predicted, {"t": right}, cuts=tuple(range(1, 100)))["value"]
    assert found["r2"] == pytest.approx(metrics.r2_score(right, predicted.float().double()), abs=1e-5)


def test_several_outputs_each_with_its_truth_or_none() -> None:
    task = RegressionTask(outputs=["x", "y", "z"], truth={"y": "height", "x": "width"})
    assert task.truth_columns == ("height", "width")
    output = torch.tensor([[1.0, 10.0, 0.0], [2.0, 20.0, 0.0]])
    found = tallied(task, output, {"width": [1, 4], "height": [10.0, None]})
    assert list(found) == ["y", "x"]
    assert (found["x"]["images"], found["x"]["mean_absolute_error"]) == (2, 1)
    assert found["x"]["r2"] == pytest.approx(1 - 4 / 4.5)
    assert (found["y"]["images"], found["y"]["mean_absolute_error"], found["y"]["r2"]) == (1, 0, None)


def test_truths_that_are_no_numbers_do_not_count() -> None:
    output = torch.tensor([1.0, 2.0, NAN, 4.0])
    truths = {"t": [1.0, NAN, 3.0, None]}
    assert tallied(RegressionTask(truth="t"), output, truths)["value"]["images"] == 1
    lenient = tallied(RegressionTask(truth="t", allow_nan=True), output, truths)["value"]
    assert (lenient["images"], lenient["not_finite"], lenient["mean_absolute_error"]) == (1, 1, 0)
    nothing = tallied(RegressionTask(truth="t"), output, {"t": pa.nulls(4, pa.float64())})["value"]
    assert (nothing["images"], nothing["root_mean_squared_error"], nothing["r2"]) == (0, None, None)
    constant = tallied(RegressionTask(truth="t"), output[:2], {"t": [0.1, 0.1]})["value"]
    assert constant["r2"] is None
    huge = tallied(RegressionTask(truth="t"), output[:2], {"t": [1e200, 2e200]})["value"]
    assert (huge["mean_absolute_error"], huge["root_mean_squared_error"]) == (pytest.approx(1.5e200), None)


def test_a_truth_for_several_outputs_says_whose_it_is() -> None:
    with pytest.raises(ValidationError, match=r"truth: there are 2 outputs; write \{x: column"):
        RegressionTask(outputs=["x", "y"], truth="t")
    with pytest.raises(ValidationError, match="'z' is none of the outputs x, y"):
        RegressionTask(outputs=["x", "y"], truth={"z": "t"})


# -------------------------------------------------------------------------------------------------------- multilabel


def several(*shown: str) -> torch.Tensor:
    return torch.tensor([[5.0 if name in row.split() else -5.0 for name in ANIMALS] for row in shown])


SHOWN = ("cat dog", "cat", "", "fish dog")


@pytest.mark.parametrize(
    "truths",
    [
        ["cat;dog", "dog", "", "fish;dog;cat"],
        [" dog ; cat;", "dog", " ", "cat; fish ;dog;dog"],
        [["cat", "dog"], ["dog"], [], ["fish", "dog", "cat", "cat"]],
        [[0, 1], [1], [], [2, 1, 0]],
        pa.array([[0, 1], [1], [], [2, 1, 0]], pa.large_list(pa.int8())),
        ["0;1", "1", "", "2;1;0"],
    ],
)
def test_precision_recall_and_exact_match(truths: Any) -> None:
    task = MultilabelTask(labels=ANIMALS, truth="t")
    found = tallied(task, several(*SHOWN), {"t": truths}, cuts=(1, 1, 3))
    assert found == {
        "truth": "t",
        "images": 4,
        "unknown_truth": 0,
        "precision": 4 / 5,
        "recall": 4 / 6,
        "f1": 8 / 11,
        "exact_match": 0.5,
    }


def test_the_micro_averages_are_those_of_scikit_learn() -> None:
    own = random.Random(0)
    torch.manual_seed(0)
    output = torch.randn(300, 3)
    right = np.array([[own.random() < 0.4 for _ in ANIMALS] for _ in range(300)])
    texts = [";".join(name for name, on in zip(ANIMALS, row, strict=True) if on) for row in right]
    found = tallied(MultilabelTask(labels=ANIMALS, truth="t"), output, {"t": texts}, cuts=(5, 200))
    shown = (output > 0).numpy()
    precision, recall, f1, _ = metrics.precision_recall_fscore_support(right, shown, average="micro")
    assert [found["precision"], found["recall"], found["f1"]] == pytest.approx([precision, recall, f1])
    assert found["exact_match"] == pytest.approx(metrics.accuracy_score(right, shown))


def test_images_of_unknown_or_no_truth_do_not_count() -> None:
    task = MultilabelTask(labels=ANIMALS, truth="t")
    found = tallied(task, several(*SHOWN), {"t": ["cat;unicorn", None, "cat", "dog;fish"]})
    assert (found["images"], found["unknown_truth"]) == (2, 1)
    assert (found["precision"], found["recall"], found["exact_match"]) == (1, 2 / 3, 0.5)
    nothing = tallied(task, several("", ""), {"t": ["", ""]})
    assert (nothing["precision"], nothing["recall"], nothing["f1"], nothing["exact_match"]) == (None, None, None, 1)


# ------------------------------------------------------------------------------------------------- before work starts


def fields(**types: pa.DataType) -> list[pa.Field]:
    return [pa.field(name, kind) for name, kind in types.items()]


@pytest.mark.parametrize("task", [ClassificationTask, RegressionTask, MultilabelTask])
def test_a_truth_that_is_no_passthrough_column_is_refused(task: Any) -> None:
    with pytest.raises(InvalidJob, match=r"task\.truth: 'lable' is no passthrough column; did you mean 'label'\?"):
        task(truth="lable").check_truth_columns(fields(label=pa.string()))
    with pytest.raises(InvalidJob, match=r"write input\.passthrough: \[t\]"):
        task(truth="t").check_truth_columns([])
    task().check_truth_columns([])


@pytest.mark.parametrize(
    ("task", "kind", "wants"),
    [
        (RegressionTask, pa.string(), "numbers, such as float64"),
        (RegressionTask, pa.list_(pa.float32()), "numbers"),
        (ClassificationTask, pa.bool_(), "labels"),
        (ClassificationTask, pa.list_(pa.string()), "labels"),
        (ClassificationTask, pa.timestamp("us"), "labels"),
        (MultilabelTask, pa.int64(), "lists of labels"),
        (MultilabelTask, pa.list_(pa.bool_()), "lists of labels"),
    ],
)
def test_a_truth_of_another_type_is_refused(task: Any, kind: pa.DataType, wants: str) -> None:
    with pytest.raises(InvalidJob, match=rf"task\.truth: column 't' holds .*but this task wants {wants}"):
        task(truth="t").check_truth_columns(fields(t=kind))


@pytest.mark.parametrize(
    ("task", "kind"),
    [
        (ClassificationTask, pa.string()),
        (ClassificationTask, pa.int8()),
        (ClassificationTask, pa.float64()),
        (RegressionTask, pa.int64()),
        (RegressionTask, pa.decimal128(10, 2)),
        (MultilabelTask, pa.string()),
        (MultilabelTask, pa.list_(pa.int64())),
        (MultilabelTask, pa.large_list(pa.large_string())),
    ],
)
def test_a_truth_of_a_fitting_type_is_taken(task: Any, kind: pa.DataType) -> None:
    task(truth="t").check_truth_columns(fields(t=kind))


# ------------------------------------------------------------------------------------------------------ in a real job

JOB = """
input: {type: manifest, uri: images.csv, uri_column: image, passthrough: {gray: float64}}
model: {type: python, target: "net:build"}
preprocess: {resize: null, crop: null, mean: null, std: null}
task: {type: regression, outputs: [brightness], truth: gray}
runtime: {pool: local, batch_size: 2, shard_size: 3, loader: {processes: 0}}
errors: {max_rate: 1}
output: {uri: out}
"""
NET = """
import torch

class Mean(torch.nn.Module):
    def forward(self, pixels):
        return pixels.mean(dim=(1, 2, 3))

def build():
    return Mean()
"""


def test_the_sums_lie_in_the_footers_and_error_rows_are_not_in_them(tmp_path: Path) -> None:
    (tmp_path / "job.yaml").write_text(JOB)
    (tmp_path / "net.py").write_text(NET)
    for number in range(5):
        Image.new("RGB", (8, 8), (51 * number,) * 3).save(tmp_path / f"{number}.png")
    lines = [f"{number}.png,{number / 5 + 0.1}" for number in range(4)]
    (tmp_path / "images.csv").write_text("\n".join(["image,gray", *lines, "4.png,", "absent.png,1"]) + "\n")
    job = batchjob.Job.from_file(tmp_path / "job.yaml")
    ended = batchjob.run(job)
    assert (ended.status, ended.predicted, ended.failed) == ("complete", 5, 1)
    parts = footers(str(tmp_path / "out"))
    assert [made.truth["brightness/images"] for _, made in sorted(parts.items())] == [3, 1]
    sums: Counter[str] = Counter()
    for made in parts.values():
        sums.update(made.truth)
    found = job.task.compute_metrics(sums)["brightness"]
    assert (found["truth"], found["images"]) == ("gray", 4)
    assert found["mean_absolute_error"] == pytest.approx(0.1)
