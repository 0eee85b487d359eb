"""Metrics against ground truth: sums of batches that add up over parts, and the report computed from them."""

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
from PIL import Image
from sklearn import metrics

import batchjob
from batchjob.errors import InvalidJob
from batchjob.storage.reader import Reader
from batchjob.tasks.classification import ClassificationTask
from batchjob.tasks.embedding import EmbeddingTask
from batchjob.tasks.multilabel import MultilabelTask
from batchjob.tasks.postprocess import EXAMPLE_ROWS
from batchjob.tasks.regression import RegressionTask
from batchjob.tasks.settings import TaskContext
from tests.support.batchjob_process import read_all_footers

READER, BASE = Reader(), Path()
NAN = float("nan")
ANIMALS = ("cat", "dog", "fish")


def run_metrics(task: Any, output: torch.Tensor, truths: dict[str, Any], cuts: Sequence[int] = ()) -> dict[str, Any]:
    """Return the metrics of rows that were summed in pieces and added up, as JSON gives them back."""
    example = output[:1].repeat(EXAMPLE_ROWS, *[1] * (output.ndim - 1))
    postprocess = task.build_postprocess(example, TaskContext(None, READER, BASE))
    assert postprocess.truth_columns == task.truth_columns
    tensors = postprocess.on_device(output)
    table = pa.Table.from_arrays(postprocess.columns(tensors, []), schema=pa.schema(postprocess.fields))
    good = [error is None for error in postprocess.find_errors(tensors)]
    for name, values in truths.items():
        table = table.append_column(name, values if isinstance(values, pa.Array) else pa.array(values))
    sums: Counter[str] = Counter()
    for start, end in pairwise([0, *cuts, len(output)]):
        rows = table.slice(start, end - start).filter(pa.array(good[start:end], pa.bool_()))
        batch = rows.combine_chunks().to_batches()[0] if rows.num_rows else make_empty_batch(rows.schema)
        sums.update(json.loads(json.dumps(postprocess.sum_metrics(batch))))
    report: dict[str, Any] = json.loads(json.dumps(task.compute_metrics(sums), allow_nan=False))
    return report


def make_empty_batch(schema: pa.Schema) -> pa.RecordBatch:
    return pa.RecordBatch.from_arrays([pa.array([], field.type) for field in schema], schema=schema)


def make_logits(*classes: int, count: int = 3) -> torch.Tensor:
    """Make a row for each class, which is its most likely class; the next class is its second."""
    output = torch.zeros(len(classes), count)
    for row, number in enumerate(classes):
        output[row, number], output[row, (number + 1) % count] = 9.0, 5.0
    return output


# -- classification


def test_accuracy_top_k_and_confusion() -> None:
    task = ClassificationTask(top_k=2, labels=ANIMALS, truth="animal")
    report = run_metrics(
        task, make_logits(0, 0, 1, 2, 2), {"animal": ["cat", "dog", "dog", "cat", "dog"]}, cuts=(2, 2, 4)
    )
    assert report == {
        "truth": "animal",
        "images": 5,
        "unknown_truth": 0,
        "accuracy": 0.4,
        "top_2_accuracy": 0.8,
        "confusion": {"cat": {"cat": 1, "fish": 1}, "dog": {"cat": 1, "dog": 1, "fish": 1}},
    }


def test_accuracy_matches_scikit_learn() -> None:
    torch.manual_seed(0)
    output, right = torch.randn(500, 7), torch.randint(0, 7, (500,))
    report = run_metrics(ClassificationTask(top_k=3, truth="t"), output, {"t": right.tolist()}, cuts=(100, 333))
    assert report["accuracy"] == metrics.accuracy_score(right, output.argmax(1))
    assert report["top_3_accuracy"] == metrics.top_k_accuracy_score(right, output.numpy(), k=3)
    matrix = metrics.confusion_matrix(right, output.argmax(1))
    assert report["confusion"] == {
        str(a): {str(b): int(n) for b, n in enumerate(row) if n} for a, row in enumerate(matrix)
    }


@pytest.mark.parametrize(
    ("truths", "right", "unknown"),
    [
        (["cat", "dog", "fish"], 3, 0),
        ([" cat", "dog ", "Fish"], 2, 1),  # case counts, blanks around the label do not
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
def test_values_that_name_a_class(truths: Any, right: int, unknown: int) -> None:
    task = ClassificationTask(labels=ANIMALS, truth="t")
    report = run_metrics(task, make_logits(0, 1, 2), {"t": truths})
    assert (report["accuracy"] or 0) * report["images"] == pytest.approx(right)
    assert report["unknown_truth"] == unknown


def test_text_equal_to_a_label_is_not_an_id() -> None:
    task = ClassificationTask(labels=["2", "1", "0"], truth="t")
    assert run_metrics(task, make_logits(0, 1, 2), {"t": ["2", "1", "0"]})["accuracy"] == 1
    assert run_metrics(task, make_logits(0, 1, 2), {"t": [0, 1, 2]})["accuracy"] == 1
    report = run_metrics(
        ClassificationTask(labels=["10", "20", "30"], truth="t"), make_logits(0, 1, 2), {"t": ["0", "1", "2"]}
    )
    assert (report["images"], report["unknown_truth"], report["accuracy"]) == (0, 3, None)


def test_classes_with_the_same_label_count_as_one() -> None:
    task = ClassificationTask(labels=["crane", "ship", "crane"], truth="t", top_k=2)
    report = run_metrics(task, make_logits(0, 2, 1), {"t": ["crane", "crane", "ship"]})
    assert (report["accuracy"], report["confusion"]) == (1, {"crane": {"crane": 2}, "ship": {"ship": 1}})
    assert run_metrics(task, make_logits(0, 2, 1), {"t": [2, 0, 1]})["accuracy"] == 1


def test_error_rows_do_not_count_and_accepted_nan_is_wrong() -> None:
    output = torch.stack([make_logits(0)[0], torch.full((3,), NAN)])
    strict = run_metrics(ClassificationTask(labels=ANIMALS, truth="t"), output, {"t": ["cat", "cat"]})
    assert (strict["images"], strict["accuracy"]) == (1, 1)
    lenient = run_metrics(ClassificationTask(labels=ANIMALS, truth="t", allow_nan=True), output, {"t": ["cat", "cat"]})
    assert (lenient["images"], lenient["accuracy"], lenient["confusion"]) == (2, 0.5, {"cat": {"": 1, "cat": 1}})


def test_counts_replace_the_confusion_matrix_above_100_classes() -> None:
    report = run_metrics(ClassificationTask(truth="t"), make_logits(5, 5, 6, count=101), {"t": [5, 7, 6]}, cuts=(1,))
    assert "confusion" not in report
    assert report["classes"] == {
        "5": {"images": 1, "right": 1},
        "6": {"images": 1, "right": 1},
        "7": {"images": 1, "right": 0},
    }
    assert set(run_metrics(ClassificationTask(truth="t"), make_logits(5, count=2001), {"t": [5]})) == {
        "truth",
        "images",
        "unknown_truth",
        "accuracy",
    }


def test_no_metrics_without_truth_and_no_rates_without_rows() -> None:
    assert ClassificationTask().compute_metrics({}) == {} == EmbeddingTask().compute_metrics({})
    assert ClassificationTask().truth_columns == () == EmbeddingTask().truth_columns
    none = ClassificationTask(truth="t", top_k=5).compute_metrics({})
    assert none == {"truth": "t", "images": 0, "unknown_truth": 0, "accuracy": None, "top_5_accuracy": None}


# -- regression


def test_regression_errors_match_scikit_learn() -> None:
    generator = np.random.default_rng(0)
    right = generator.normal(1000, 3, 400)
    predicted = torch.tensor(right + generator.normal(0, 1, 400), dtype=torch.float32)
    report = run_metrics(RegressionTask(truth="t"), predicted, {"t": right.tolist()}, cuts=(7, 7, 300))["value"]
    assert (report["truth"], report["images"], report["not_finite"]) == ("t", 400, 0)
    assert report["mean_absolute_error"] == pytest.approx(metrics.mean_absolute_error(right, predicted))
    assert report["root_mean_squared_error"] == pytest.approx(metrics.root_mean_squared_error(right, predicted))
    assert report["r2"] == pytest.approx(metrics.r2_score(right, predicted.double()), rel=1e-9)


def test_r2_is_stable_if_the_mean_is_far_above_the_spread() -> None:
    right = [1.7e9 + 1e4 * n for n in range(100)]
    predicted = torch.tensor([value + 500 for value in right], dtype=torch.float64)
    report = run_metrics(RegressionTask(truth="t"), predicted, {"t": right}, cuts=tuple(range(1, 100)))["value"]
    assert report["r2"] == pytest.approx(metrics.r2_score(right, predicted.float().double()), abs=1e-5)


def test_truth_for_some_of_several_outputs() -> None:
    task = RegressionTask(outputs=["x", "y", "z"], truth={"y": "height", "x": "width"})
    assert task.truth_columns == ("height", "width")
    output = torch.tensor([[1.0, 10.0, 0.0], [2.0, 20.0, 0.0]])
    report = run_metrics(task, output, {"width": [1, 4], "height": [10.0, None]})
    assert list(report) == ["y", "x"]
    assert (report["x"]["images"], report["x"]["mean_absolute_error"]) == (2, 1)
    assert report["x"]["r2"] == pytest.approx(1 - 4 / 4.5)
    assert (report["y"]["images"], report["y"]["mean_absolute_error"], report["y"]["r2"]) == (1, 0, None)


def test_null_and_nan_truths_do_not_count() -> None:
    output = torch.tensor([1.0, 2.0, NAN, 4.0])
    truths = {"t": [1.0, NAN, 3.0, None]}
    assert run_metrics(RegressionTask(truth="t"), output, truths)["value"]["images"] == 1
    lenient = run_metrics(RegressionTask(truth="t", allow_nan=True), output, truths)["value"]
    assert (lenient["images"], lenient["not_finite"], lenient["mean_absolute_error"]) == (1, 1, 0)
    nothing = run_metrics(RegressionTask(truth="t"), output, {"t": pa.nulls(4, pa.float64())})["value"]
    assert (nothing["images"], nothing["root_mean_squared_error"], nothing["r2"]) == (0, None, None)
    constant = run_metrics(RegressionTask(truth="t"), output[:2], {"t": [0.1, 0.1]})["value"]
    assert constant["r2"] is None
    huge = run_metrics(RegressionTask(truth="t"), output[:2], {"t": [1e200, 2e200]})["value"]
    assert (huge["mean_absolute_error"], huge["root_mean_squared_error"]) == (pytest.approx(1.5e200), None)


def test_truth_for_several_outputs_must_name_its_output() -> None:
    with pytest.raises(InvalidJob, match=r"truth: there are 2 outputs; write \{x: column"):
        RegressionTask(outputs=["x", "y"], truth="t")
    with pytest.raises(InvalidJob, match="'z' is none of the outputs x, y"):
        RegressionTask(outputs=["x", "y"], truth={"z": "t"})


# -- multilabel


def make_multilabel_logits(*shown: str) -> torch.Tensor:
    return torch.tensor([[5.0 if name in row.split() else -5.0 for name in ANIMALS] for row in shown])


PREDICTED = ("cat dog", "cat", "", "fish dog")


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
    report = run_metrics(task, make_multilabel_logits(*PREDICTED), {"t": truths}, cuts=(1, 1, 3))
    assert report == {
        "truth": "t",
        "images": 4,
        "unknown_truth": 0,
        "precision": 4 / 5,
        "recall": 4 / 6,
        "f1": 8 / 11,
        "exact_match": 0.5,
    }


def test_micro_averages_match_scikit_learn() -> None:
    generator = random.Random(0)
    torch.manual_seed(0)
    output = torch.randn(300, 3)
    right = np.array([[generator.random() < 0.4 for _ in ANIMALS] for _ in range(300)])
    texts = [";".join(name for name, on in zip(ANIMALS, row, strict=True) if on) for row in right]
    report = run_metrics(MultilabelTask(labels=ANIMALS, truth="t"), output, {"t": texts}, cuts=(5, 200))
    predicted = (output > 0).numpy()
    precision, recall, f1, _ = metrics.precision_recall_fscore_support(right, predicted, average="micro")
    assert [report["precision"], report["recall"], report["f1"]] == pytest.approx([precision, recall, f1])
    assert report["exact_match"] == pytest.approx(metrics.accuracy_score(right, predicted))


def test_images_with_unknown_or_null_truth_do_not_count() -> None:
    task = MultilabelTask(labels=ANIMALS, truth="t")
    report = run_metrics(task, make_multilabel_logits(*PREDICTED), {"t": ["cat;unicorn", None, "cat", "dog;fish"]})
    assert (report["images"], report["unknown_truth"]) == (2, 1)
    assert (report["precision"], report["recall"], report["exact_match"]) == (1, 2 / 3, 0.5)
    nothing = run_metrics(task, make_multilabel_logits("", ""), {"t": ["", ""]})
    assert (nothing["precision"], nothing["recall"], nothing["f1"], nothing["exact_match"]) == (None, None, None, 1)


# -- checks before the run


def make_fields(**types: pa.DataType) -> list[pa.Field]:
    return [pa.field(name, kind) for name, kind in types.items()]


@pytest.mark.parametrize("task", [ClassificationTask, RegressionTask, MultilabelTask])
def test_truth_must_be_a_passthrough_column(task: Any) -> None:
    with pytest.raises(InvalidJob, match=r"task\.truth: 'lable' is no passthrough column; did you mean 'label'\?"):
        task(truth="lable").check_truth_columns(make_fields(label=pa.string()))
    with pytest.raises(InvalidJob, match=r"write input\.passthrough: \[t\]"):
        task(truth="t").check_truth_columns([])
    task().check_truth_columns([])


@pytest.mark.parametrize(
    ("task", "kind", "expected"),
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
def test_truth_of_another_type_is_refused(task: Any, kind: pa.DataType, expected: str) -> None:
    with pytest.raises(InvalidJob, match=rf"task\.truth: column 't' holds .*but this task wants {expected}"):
        task(truth="t").check_truth_columns(make_fields(t=kind))


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
def test_truth_of_a_fitting_type_is_accepted(task: Any, kind: pa.DataType) -> None:
    task(truth="t").check_truth_columns(make_fields(t=kind))


# -- a whole run
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


def test_footers_hold_the_sums_without_error_rows(tmp_path: Path) -> None:
    (tmp_path / "job.yaml").write_text(JOB)
    (tmp_path / "net.py").write_text(NET)
    for number in range(5):
        Image.new("RGB", (8, 8), (51 * number,) * 3).save(tmp_path / f"{number}.png")
    lines = [f"{number}.png,{number / 5 + 0.1}" for number in range(4)]
    (tmp_path / "images.csv").write_text("\n".join(["image,gray", *lines, "4.png,", "absent.png,1"]) + "\n")
    job = batchjob.Job.from_file(tmp_path / "job.yaml")
    result = batchjob.run(job)
    assert (result.status, result.predicted, result.failed) == ("complete", 5, 1)
    parts = read_all_footers(tmp_path / "out")
    assert [footer.truth["brightness/images"] for _, footer in sorted(parts.items())] == [3, 1]
    sums: Counter[str] = Counter()
    for footer in parts.values():
        sums.update(footer.truth)
    report = job.task.compute_metrics(sums)["brightness"]
    assert (report["truth"], report["images"]) == ("gray", 4)
    assert report["mean_absolute_error"] == pytest.approx(0.1)
