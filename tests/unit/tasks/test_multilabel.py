"""Multilabel: the classes over their threshold, sorted by score, and the scores of all classes."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
import torch

from batchjob.errors import InvalidJob
from batchjob.storage.reader import Reader
from batchjob.tasks.multilabel import MultilabelTask
from batchjob.tasks.postprocess import Postprocess
from batchjob.tasks.settings import TaskContext
from tests.support.task_rows import build_rows, find_error_types

READER, BASE = Reader(), Path()
NAN, INF = float("nan"), float("inf")


def make_postprocess(task: Any, output: Any, weight_labels: tuple[str, ...] | None = None) -> Postprocess:
    postprocess: Postprocess = task.build_postprocess(output, TaskContext(weight_labels, READER, BASE))
    return postprocess


def test_labels_over_the_threshold_are_sorted_by_score() -> None:
    output = torch.randn(50, 6)
    postprocess = make_postprocess(MultilabelTask(threshold=0.4, labels=list("abcdef"), scores=True), output[:2])
    for row, scores in zip(build_rows(postprocess, output), output.sigmoid().tolist(), strict=True):
        ranked = sorted(range(6), key=lambda number: -scores[number])
        expected = [number for number in ranked if scores[number] >= 0.4]
        assert [one["label_id"] for one in row["labels"]] == expected
        assert [one["label"] for one in row["labels"]] == ["abcdef"[number] for number in expected]
        assert [one["score"] for one in row["labels"]] == pytest.approx([scores[number] for number in expected])
        assert row["scores"] == pytest.approx(scores)


def test_threshold_per_label_and_top_k() -> None:
    output = torch.tensor([[2.0, 1.0, 0.0, -1.0]] * 2)
    each = make_postprocess(MultilabelTask(threshold=[0.95, 0.5, 0.5, 0.1]), output)
    assert [one["label_id"] for one in build_rows(each, output)[0]["labels"]] == [1, 2, 3]
    assert [one["label"] for one in build_rows(each, output)[0]["labels"]] == [None] * 3
    bound = make_postprocess(MultilabelTask(threshold=0, top_k=2), output, tuple("abcd"))
    assert [one["label"] for one in build_rows(bound, output)[0]["labels"]] == ["a", "b"]


def test_large_logits_keep_their_order_and_minus_infinity_scores_zero() -> None:
    output = torch.tensor([[90.0, 99.0, -INF]] * 2)
    postprocess = make_postprocess(MultilabelTask(threshold=[0.5, 0.5, 0.0]), output)
    assert [(one["label_id"], one["score"]) for one in build_rows(postprocess, output)[0]["labels"]] == [
        (1, 1),
        (0, 1),
        (2, 0),
    ]
    assert find_error_types(postprocess, output) == [None, None]
    hidden = make_postprocess(MultilabelTask(threshold=[0.5, 1.0, 0.0]), torch.tensor([[-INF, 1.0, -INF]] * 2))
    assert [one["label_id"] for one in build_rows(hidden, torch.tensor([[-INF, 1.0, -INF]]))[0]["labels"]] == [2]


def test_no_label_is_an_empty_list_and_an_error_row_is_null() -> None:
    output = torch.tensor([[-9.0, -9.0], [NAN, 9.0]])
    strict = make_postprocess(MultilabelTask(scores=True), output)
    assert build_rows(strict, output)[0]["labels"] == []
    assert build_rows(strict, output)[1] == {"labels": None, "scores": None}
    lenient = make_postprocess(MultilabelTask(scores=True, allow_nan=True), output)
    assert [one["label_id"] for one in build_rows(lenient, output)[1]["labels"]] == [1]
    assert find_error_types(lenient, output) == [None, None]


@pytest.mark.parametrize(
    ("settings", "text"),
    [
        ({"threshold": [0.5, 0.5]}, "task.threshold has 2 thresholds, but the model gives 3 classes"),
        ({"labels": ["a"]}, "task.labels has 1 labels, but the model gives 3 classes"),
        ({"top_k": 4}, "task.top_k is 4, but the model knows 3 classes"),
    ],
)
def test_settings_that_do_not_fit_the_classes_are_refused(settings: dict[str, Any], text: str) -> None:
    with pytest.raises(InvalidJob, match=re.escape(text)):
        make_postprocess(MultilabelTask(**settings), torch.zeros(2, 3))


def test_threshold_above_1_is_refused() -> None:
    with pytest.raises(InvalidJob):
        MultilabelTask(threshold=50)


def test_row_bytes_bounds_the_columns(tmp_path: Path) -> None:
    labels = [f"label number {n}" for n in range(40)]
    for settings in ({}, {"scores": True}, {"top_k": 3}):
        task = MultilabelTask(labels=labels, threshold=0.0, **settings)
        output = torch.randn(1000, 40)
        postprocess = make_postprocess(task, output[:2])
        assert (
            sum(column.nbytes for column in postprocess.columns(postprocess.on_device(output), [])) / 1000
            <= task.row_bytes
        )
    assert MultilabelTask(top_k=3).row_bytes < MultilabelTask().row_bytes
    (tmp_path / "labels.txt").write_text("a\nb\nc\n")
    task = MultilabelTask(labels=str(tmp_path / "labels.txt"))
    task.check(READER, BASE)
    assert build_rows(make_postprocess(task, torch.ones(2, 3)), torch.ones(1, 3))[0]["labels"][2]["label"] == "c"
