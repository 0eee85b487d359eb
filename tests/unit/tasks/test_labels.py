"""Labels: label files in each form, and label files and lists that are refused."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from batchjob.errors import InvalidJob
from batchjob.storage.reader import Reader
from batchjob.tasks.classification import ClassificationTask
from batchjob.tasks.postprocess import EXAMPLE_ROWS
from batchjob.tasks.settings import TaskContext
from tests.support.task_rows import build_rows

READER, BASE = Reader(), Path()
LABEL_FILES = {
    "lines.txt": "tench\ngoldfish\nwhite shark\n",
    "windows.txt": "\ufefftench\r\ngoldfish\r\nwhite shark\r\n\r\n",
    "list.json": '["tench", "goldfish", "white shark"]',
    "ids.json": '{"1": "goldfish", "0": "tench", "2": "white shark"}',
    "keras.json": '{"0": ["n01", "tench"], "1": ["n02", "goldfish"], "2": ["n03", "white shark"]}',
    "class_to_idx.json": '{"goldfish": 1, "tench": 0, "white shark": 2}',
    "list without suffix": '  ["tench", "goldfish", "white shark"]',
}


@pytest.mark.parametrize("file", LABEL_FILES)
def test_read_labels_from_each_form_of_file(file: str, tmp_path: Path) -> None:
    (tmp_path / file).write_bytes(LABEL_FILES[file].encode())
    task = ClassificationTask(labels=str(tmp_path / file))
    task.check(READER, BASE)
    postprocess = task.build_postprocess(torch.zeros(EXAMPLE_ROWS, 3), TaskContext(("x", "y"), READER, BASE))
    rows = build_rows(postprocess, torch.eye(3))
    assert [row["label"] for row in rows] == ["tench", "goldfish", "white shark"]


@pytest.mark.parametrize(
    ("content", "text"),
    [
        (b"", "is empty"),
        (b"\xff\xfe", "is not UTF-8"),
        (b"[1, 2", "is not JSON"),
        (b"7", "holds an int"),
        (b'{"0": "a", "2": "c"}', "none for id 1"),
        (b'{"a": "x"}', "keys that are not ids"),
        (b'["a", {}]', "in place of a label"),
    ],
)
def test_invalid_label_files_are_refused(content: bytes, text: str, tmp_path: Path) -> None:
    (tmp_path / "labels.json").write_bytes(content)
    with pytest.raises(InvalidJob) as caught:
        ClassificationTask(labels=str(tmp_path / "labels.json")).check(READER, BASE)
    assert text in caught.value.message
    assert str(tmp_path / "labels.json") in caught.value.message


def test_missing_label_file_is_refused(tmp_path: Path) -> None:
    with pytest.raises(InvalidJob, match=r"task\.labels: .*absent\.txt is not there"):
        ClassificationTask(labels=str(tmp_path / "absent.txt")).check(READER, BASE)


def test_wrong_number_of_labels_is_refused_with_both_numbers(tmp_path: Path) -> None:
    with pytest.raises(InvalidJob, match=r"task\.labels has 2 labels, but the model gives 3 classes"):
        prepare_classification(3, labels=["a", "b"])
    with pytest.raises(InvalidJob, match="the weights name 4 labels, but the model gives 3 classes"):
        prepare_classification(3, tuple("abcd"))
    (tmp_path / "labels.json").write_text(json.dumps(["a"]))
    with pytest.raises(InvalidJob, match=r"labels\.json has 1 labels, but the model gives 3 classes"):
        prepare_classification(3, labels=str(tmp_path / "labels.json"))


def test_whole_numbers_are_labels_but_booleans_are_not() -> None:
    assert ClassificationTask(labels=[0, 1, "two"]).labels == ("0", "1", "two")
    with pytest.raises(InvalidJob, match="must be text"):
        ClassificationTask(labels=[True, False])


def prepare_classification(classes: int, weight_labels: tuple[str, ...] | None = None, **settings: Any) -> None:
    output = torch.zeros(EXAMPLE_ROWS, classes)
    ClassificationTask(**settings).build_postprocess(output, TaskContext(weight_labels, READER, BASE))
