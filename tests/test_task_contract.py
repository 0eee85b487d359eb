"""One contract for all tasks: schema first, rows that mind no other row, nulls for faults, a sentence for misfits.

A new task is one `Case` here.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import duckdb
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch

from batchjob.errors import InvalidJob
from batchjob.preprocessing.geometry import ImageGeometry
from batchjob.storage.reader import Reader
from batchjob.tasks.classification import ClassificationTask
from batchjob.tasks.detection import DetectionTask
from batchjob.tasks.embedding import EmbeddingTask
from batchjob.tasks.multilabel import MultilabelTask
from batchjob.tasks.postprocess import EXAMPLE_ROWS, Postprocess
from batchjob.tasks.python import PythonTask
from batchjob.tasks.raw import RawTask
from batchjob.tasks.regression import RegressionTask
from batchjob.tasks.segmentation import SegmentationTask
from batchjob.types import ErrorRecord

ROWS = 8
LABELS = ("cat", "dog", "fish", "bird", "crow")


@dataclass(frozen=True)
class Case:
    """A task under the contract.

    Attributes:
        task: its settings.
        output: what a model gives it for `ROWS` images; rows are cut out of it.
        misfits: other outputs that it refuses, with words of the sentence: the shape that came, the shape it wants.
        one_tensor: it takes one tensor and nothing else, so that a dict and a tuple are refused.
        poisoned: `output` with NaN for image 3; None where it holds no floats.
        labels: what the weights bring.
        code: `post.py` beside the job file.
    """

    task: Any
    output: Any
    misfits: tuple[tuple[Any, tuple[str, ...]], ...]
    one_tensor: bool = True
    poisoned: Any = None
    labels: tuple[str, ...] | None = None
    code: str = ""

    def prepare(self, base: Path, output: Any = ...) -> Postprocess:
        if self.code:
            (base / "post.py").write_text(self.code)
        self.task.check(Reader(), base)
        example = cut(self.output, slice(0, EXAMPLE_ROWS)) if output is ... else output
        post: Postprocess = self.task.build_postprocess(example, self.labels, Reader(), base)
        return post


def cut(output: Any, rows: slice) -> Any:
    """Some images of an output, however it is made up."""
    if isinstance(output, Mapping):
        return {name: cut(part, rows) for name, part in output.items()}
    if isinstance(output, tuple):
        return tuple(cut(part, rows) for part in output)
    return output[rows]


def with_nan(tensor: torch.Tensor) -> torch.Tensor:
    """The same, with NaN somewhere in image 3."""
    poisoned = tensor.clone()
    poisoned[3].view(-1)[0] = float("nan")
    return poisoned


def noise(*shape: int) -> torch.Tensor:
    return torch.randn(ROWS, *shape, generator=torch.Generator().manual_seed(0))


def boxes(poison: bool = False) -> list[dict[str, torch.Tensor]]:
    """For each image as many boxes as its number, with masks; with NaN in one of image 3's."""
    own = torch.Generator().manual_seed(0)
    made = []
    for image in range(ROWS):
        corner, size = torch.rand(2, image, 2, generator=own) * 100
        made.append(
            {
                "boxes": torch.cat([corner, corner + size], 1),
                "labels": torch.arange(image) % 5,
                "scores": torch.rand(image, generator=own),
                "masks": torch.rand(image, 1, 224, 224, generator=own),
            }
        )
    if poison:
        made[3]["boxes"][1, 2] = float("nan")
    return made


def zeros(*shape: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    return torch.zeros(EXAMPLE_ROWS, *shape, dtype=dtype)


LOGITS = noise(5)
FUNCTION = """
def measured(output, frames):
    return {"spread": output.std(dim=1), "wide": [frame.width > 100 for frame in frames], "values": output}
"""
CLASS = """
class Tops:
    fields = {"tops": "list<struct<id: int32, score: float32>>"}

    def __init__(self, most):
        self.most = most

    def on_device(self, output):
        found = output["logits"].float().topk(self.most)
        return {"scores": found.values, "ids": found.indices}

    def columns(self, found):
        pairs = zip(found["ids"].tolist(), found["scores"].tolist())
        return [[{"id": one, "score": score} for one, score in zip(ids, scores)] for ids, scores in pairs]
"""

CASES: dict[str, Case] = {
    "classification": Case(
        task=ClassificationTask(top_k=3),
        output=LOGITS,
        poisoned=with_nan(LOGITS),
        labels=LABELS,
        misfits=(
            (zeros(5, 4, 4), ("[2, 5, 4, 4]", "[n, classes]")),
            (zeros(), ("[2]", "[n, classes]")),
            (zeros(5, dtype=torch.int64), ("int64 [2, 5]", "[n, classes]")),
            (torch.zeros(3, 5), ("float32 [3, 5]", "for a batch of 2")),
        ),
    ),
    "embedding": Case(
        task=EmbeddingTask(normalize=True),
        output=noise(16),
        poisoned=with_nan(noise(16)),
        misfits=(
            (zeros(7, 16), ("[2, 7, 16]", "[n, d]")),
            (zeros(16, 4, 4), ("[2, 16, 4, 4]", "[n, d]")),
            (torch.zeros(3, 5), ("float32 [3, 5]", "for a batch of 2")),
        ),
    ),
    "multilabel": Case(
        task=MultilabelTask(threshold=(0.1, 0.5, 0.5, 0.5, 0.9), scores=True, labels=LABELS),
        output=LOGITS,
        poisoned=with_nan(LOGITS),
        misfits=(
            (zeros(5, 4, 4), ("[2, 5, 4, 4]", "[n, classes]")),
            (zeros(0), ("[2, 0]", "[n, classes]")),
            (zeros(5, dtype=torch.int64), ("int64 [2, 5]", "[n, classes]")),
            (zeros(4), ("5 thresholds", "4 classes")),
            (torch.zeros(3, 5), ("float32 [3, 5]", "for a batch of 2")),
        ),
    ),
    "regression": Case(
        task=RegressionTask(outputs=("x", "y")),
        output=noise(2),
        poisoned=with_nan(noise(2)),
        misfits=(
            (zeros(3), ("[2, 3]", "[n, 2]")),
            (zeros(), ("[2]", "[n, 2]")),
            (zeros(1, 2), ("[2, 1, 2]", "[n, 2]")),
            (zeros(2, dtype=torch.int64), ("int64 [2, 2]", "[n, 2]")),
            ({"x": zeros(), "y": zeros(2)}, ("[2], [2, 2]", "[n, 2]")),
            (torch.zeros(3, 2), ("float32 [3, 2]", "for a batch of 2")),
        ),
    ),
    "regression of one": Case(
        task=RegressionTask(),
        output=noise(1),
        poisoned=with_nan(noise(1)),
        misfits=((zeros(2), ("[2, 2]", "[n] or [n, 1]")),),
    ),
    "detection": Case(
        task=DetectionTask(threshold=0.2, nms=0.5, max_boxes=5),
        output=boxes(),
        poisoned=boxes(poison=True),
        one_tensor=False,
        labels=LABELS,
        misfits=(
            (zeros(5, 4), ("float32 [2, 5, 4]", "boxes [k, 4]", "logits [n, q, classes]", "model.output")),
            (boxes()[:3], ("a list of 3", "for a batch of 2")),
            ([{"boxes": zeros(4)}] * 2, ("a list of 2", "boxes float32 [2, 4]", "scores [k]")),
        ),
    ),
    "detection by queries": Case(
        task=DetectionTask(threshold=0.2),
        output={"logits": noise(9, 6), "pred_boxes": noise(9, 4).sigmoid()},
        poisoned={"logits": with_nan(noise(9, 6)), "pred_boxes": noise(9, 4).sigmoid()},
        one_tensor=False,
        labels=LABELS,
        misfits=(
            ({"logits": zeros(9, 6)}, ("logits float32 [2, 9, 6]", "pred_boxes [n, q, 4]")),
            ({"logits": zeros(9, 4), "pred_boxes": zeros(9, 4)}, ("5 labels", "3 classes")),
        ),
    ),
    "segmentation": Case(
        task=SegmentationTask(),
        output=noise(5, 14, 14),
        poisoned=with_nan(noise(5, 14, 14)),
        one_tensor=False,
        labels=LABELS,
        misfits=(
            (zeros(5), ("float32 [2, 5]", "[n, classes, h, w]")),
            (zeros(5, 4, 4, dtype=torch.int64), ("int64 [2, 5, 4, 4]", "[n, classes, h, w]")),
            (torch.zeros(3, 5, 4, 4), ("float32 [3, 5, 4, 4]", "for a batch of 2")),
            (zeros(4, 4, 4), ("5 labels", "4 classes")),
            ((zeros(5, 4, 4), zeros(5, 4, 4)), ("a tuple of 2", "model.output")),
        ),
    ),
    "segmentation in run lengths": Case(
        task=SegmentationTask(mask="rle", size="input"),
        output={"out": noise(5, 14, 14)},
        poisoned={"out": with_nan(noise(5, 14, 14))},
        one_tensor=False,
        labels=LABELS,
        misfits=(({"masks": zeros(5, 4, 4)}, ("a dict with the keys masks", "out or logits", "model.output")),),
    ),
    "instances": Case(
        task=SegmentationTask(size="input", format="instances"),
        output=boxes(),
        poisoned=boxes(poison=True),
        one_tensor=False,
        labels=LABELS,
        misfits=((zeros(5, 4, 4), ("float32 [2, 5, 4, 4]", "masks [k, 1, h, w]")),),
    ),
    "raw": Case(
        task=RawTask(),
        output=noise(2, 3).half(),
        poisoned=with_nan(noise(2, 3).half()),
        one_tensor=False,
        misfits=(
            (torch.zeros(3, 5), ("float32 [3, 5]", "for a batch of 2")),
            (zeros(3, 100, 100), ("120,001 bytes", "[3, 100, 100]", "task.row_bytes")),
            (zeros(4, dtype=torch.complex64), ("complex64 [2, 4]", "plain numbers")),
            (zeros(0), ("float32 [2, 0]", "plain numbers")),
            ({}, ("a dict",)),
            ({"uri": zeros(4)}, ("uri", "another name")),
            ({"a": zeros(4), "A": zeros(4)}, ("'a' and 'A'",)),
            ({"out": zeros(4), "aux": None}, ("aux is None", "model.output")),
            ([{"boxes": zeros(4)}] * 2, ("a list of 2", "output_0 is a dict with the keys boxes", "model.output")),
        ),
    ),
    "raw of several": Case(
        task=RawTask(),
        output={"logits": LOGITS, "shown": LOGITS > 0, "count": (LOGITS > 0).sum(1), "bytes": LOGITS.to(torch.uint8)},
        poisoned={
            "logits": with_nan(LOGITS),
            "shown": LOGITS > 0,
            "count": (LOGITS > 0).sum(1),
            "bytes": LOGITS.byte(),
        },
        one_tensor=False,
        misfits=(),
    ),
    "python function": Case(
        task=PythonTask(
            target="post:measured", fields={"spread": "float32", "wide": "bool", "values": "list<float32>[5]"}
        ),
        code=FUNCTION,
        output=LOGITS,
        poisoned=with_nan(LOGITS),
        one_tensor=False,
        misfits=(
            (torch.zeros(3, 5), ("float32 [3, 5]", "for a batch of 2")),
            (zeros(4), ("list<float32>[5]", "values")),
            ({"out": zeros(4), "aux": None}, ("a dict with the keys out, aux", "model.output")),
        ),
    ),
    "python class": Case(
        task=PythonTask(target="post:Tops", arguments={"most": 2}),
        code=CLASS,
        output={"logits": LOGITS},
        poisoned={"logits": with_nan(LOGITS)},
        one_tensor=False,
        misfits=(
            ({"logits": zeros(1)}, ("on_device", "post.py:9")),
            ({"wrong": zeros(5)}, ("on_device", "KeyError")),
        ),
    ),
}

ONE_TENSOR = {name: case for name, case in CASES.items() if case.one_tensor}
every = pytest.mark.parametrize("case", CASES.values(), ids=CASES)


def outcome(post: Postprocess, output: Any, rows: int = ROWS) -> tuple[pa.Table, list[ErrorRecord | None]]:
    """Columns and faults as the worker gets them: the model's half under inference mode, the rest on the host."""
    with torch.inference_mode():
        tensors = {name: tensor.cpu() for name, tensor in post.on_device(output).items()}
    assert tensors["finite"].dtype is torch.bool
    assert {len(tensor) for tensor in tensors.values()} == {rows}
    frames = [ImageGeometry(640 + n, 480, 224, 224, 0.35, 0.47) for n in range(rows)]
    columns, faults = post.columns(tensors, frames), post.find_errors(tensors)
    assert len(faults) == rows
    for column in columns:
        column.validate(full=True)
    return pa.Table.from_arrays(columns, schema=pa.schema(post.fields)), faults


@every
def test_the_schema_is_known_before_work_and_never_another(case: Case, tmp_path: Path) -> None:
    post = case.prepare(tmp_path)
    assert all(field.nullable for field in post.fields)
    for rows in (0, 1, ROWS):
        with torch.inference_mode():
            tensors = post.on_device(cut(case.output, slice(0, rows)))
        columns = post.columns(tensors, [ImageGeometry(9, 9, 9, 9)] * rows)
        assert [(column.type, len(column)) for column in columns] == [(field.type, rows) for field in post.fields]
    assert case.prepare(tmp_path).fields == post.fields


@every
def test_a_row_does_not_depend_on_its_batch(case: Case, tmp_path: Path) -> None:
    post = case.prepare(tmp_path)
    whole, faults = outcome(post, case.output)
    assert faults == [None] * ROWS
    for row in range(ROWS):
        with torch.inference_mode():
            tensors = post.on_device(cut(case.output, slice(row, row + 1)))
        frames = [ImageGeometry(640 + row, 480, 224, 224, 0.35, 0.47)]
        one = pa.Table.from_arrays(post.columns(tensors, frames), schema=whole.schema)
        assert nearly(one.to_pylist(), whole.slice(row, 1).to_pylist())


@every
def test_rows_with_nan_are_error_rows_and_null(case: Case, tmp_path: Path) -> None:
    if case.poisoned is None:
        pytest.skip("no floats")
    post = case.prepare(tmp_path)
    good, _ = outcome(post, case.output)
    found, faults = outcome(post, case.poisoned)
    assert [fault is None for fault in faults] == [row != 3 for row in range(ROWS)]
    assert faults[3] is not None
    assert (faults[3].stage, faults[3].type) == ("predict", "not_finite")
    assert set(found.slice(3, 1).to_pylist()[0].values()) == {None}
    assert nearly(found.slice(0, 3).to_pylist() + found.slice(4).to_pylist(), without(good.to_pylist(), 3))


@every
def test_outputs_that_do_not_fit_are_refused_with_what_came_and_what_is_wanted(case: Case, tmp_path: Path) -> None:
    for output, words in case.misfits:
        with pytest.raises(InvalidJob) as caught:
            case.prepare(tmp_path, output)
        assert [word for word in words if word not in caught.value.message] == [], caught.value.message


@every
def test_an_output_of_nothing_is_refused(case: Case, tmp_path: Path) -> None:
    with pytest.raises(InvalidJob, match=r"gives None for a batch of 2.*forward\(\)"):
        case.prepare(tmp_path, None)


@pytest.mark.parametrize("case", ONE_TENSOR.values(), ids=ONE_TENSOR)
def test_several_outputs_where_one_is_wanted_are_refused_naming_how_to_pick(case: Case, tmp_path: Path) -> None:
    example = cut(case.output, slice(0, EXAMPLE_ROWS))
    for output, came in (
        ({"out": example, "aux": example}, "a dict with the keys out, aux"),
        ((example, example), "a tuple of 2"),
        ([example], "a list of 1"),
    ):
        with pytest.raises(InvalidJob) as caught:
            case.prepare(tmp_path, output)
        assert came in caught.value.message
        assert "model.output" in caught.value.message


@every
def test_duckdb_reads_the_rows_as_they_were(case: Case, tmp_path: Path) -> None:
    post = case.prepare(tmp_path)
    output = case.output if case.poisoned is None else case.poisoned
    table, _ = outcome(post, output)
    pq.write_table(table, tmp_path / "part.parquet", compression="zstd")
    found = duckdb.read_parquet(str(tmp_path / "part.parquet")).to_arrow_table()
    assert found.column_names == [field.name for field in post.fields]
    assert nearly(found.to_pylist(), table.to_pylist())
    assert pq.read_table(tmp_path / "part.parquet").schema.equals(table.schema)


@every
def test_a_task_has_a_bound_for_its_rows(case: Case, tmp_path: Path) -> None:
    table, _ = outcome(case.prepare(tmp_path), case.output)
    assert table.nbytes / ROWS <= case.task.row_bytes


def without(rows: list[Any], index: int) -> list[Any]:
    return rows[:index] + rows[index + 1 :]


def nearly(a: Any, b: Any) -> bool:
    """Equal, floats to their last digits: a batch of one may be summed in another order."""
    if isinstance(a, dict) and isinstance(b, dict):
        return list(a) == list(b) and all(nearly(a[key], b[key]) for key in a)
    if isinstance(a, list | tuple) and isinstance(b, list | tuple):
        return len(a) == len(b) and all(map(nearly, a, b))
    if isinstance(a, float) and isinstance(b, float):
        return bool(a == pytest.approx(b, rel=1e-5, abs=1e-7, nan_ok=True))
    return bool(a == b)
