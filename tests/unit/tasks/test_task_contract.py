"""Contract of all tasks: a fixed schema, rows independent of their batch, nulls in error rows, readable errors.

A new task adds one `Case` to `CASES`.
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
from batchjob.tasks.settings import TaskContext
from batchjob.types import ErrorRecord

ROWS = 8
LABELS = ("cat", "dog", "fish", "bird", "crow")


@dataclass(frozen=True)
class Case:
    """Task under the contract.

    Attributes:
        task: Settings of the task.
        output: Output of a model for `ROWS` images; rows are sliced from it.
        unsuitable: Other outputs that it refuses, with words of the message: the actual and the expected shape.
        one_tensor: True if it takes a single tensor only, so that a dict and a tuple are refused.
        output_with_nan: `output` with NaN for image 3; None if it holds no floats.
        labels: Class names that the weights bring.
        code: Text of `post.py` beside the job file.
    """

    task: Any
    output: Any
    unsuitable: tuple[tuple[Any, tuple[str, ...]], ...]
    one_tensor: bool = True
    output_with_nan: Any = None
    labels: tuple[str, ...] | None = None
    code: str = ""

    def prepare(self, base: Path, output: Any = ...) -> Postprocess:
        if self.code:
            (base / "post.py").write_text(self.code)
        self.task.check(Reader(), base)
        example = slice_rows(self.output, slice(0, EXAMPLE_ROWS)) if output is ... else output
        postprocess: Postprocess = self.task.build_postprocess(example, TaskContext(self.labels, Reader(), base))
        return postprocess


def slice_rows(output: Any, rows: slice) -> Any:
    """Slice rows from an output of any structure."""
    if isinstance(output, Mapping):
        return {name: slice_rows(part, rows) for name, part in output.items()}
    if isinstance(output, tuple):
        return tuple(slice_rows(part, rows) for part in output)
    return output[rows]


def with_nan(tensor: torch.Tensor) -> torch.Tensor:
    """Copy a tensor and write NaN to image 3."""
    copy = tensor.clone()
    copy[3].view(-1)[0] = float("nan")
    return copy


def make_noise(*shape: int) -> torch.Tensor:
    return torch.randn(ROWS, *shape, generator=torch.Generator().manual_seed(0))


def make_boxes(with_nan_box: bool = False) -> list[dict[str, torch.Tensor]]:
    """Make n boxes with masks for image n; optionally with NaN in a box of image 3."""
    generator = torch.Generator().manual_seed(0)
    images = []
    for image in range(ROWS):
        corner, size = torch.rand(2, image, 2, generator=generator) * 100
        images.append(
            {
                "boxes": torch.cat([corner, corner + size], 1),
                "labels": torch.arange(image) % 5,
                "scores": torch.rand(image, generator=generator),
                "masks": torch.rand(image, 1, 224, 224, generator=generator),
            }
        )
    if with_nan_box:
        images[3]["boxes"][1, 2] = float("nan")
    return images


def make_zeros(*shape: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    return torch.zeros(EXAMPLE_ROWS, *shape, dtype=dtype)


LOGITS = make_noise(5)
FUNCTION_CODE = """
def measured(output, frames):
    return {"spread": output.std(dim=1), "wide": [frame.width > 100 for frame in frames], "values": output}
"""
CLASS_CODE = """
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
        output_with_nan=with_nan(LOGITS),
        labels=LABELS,
        unsuitable=(
            (make_zeros(5, 4, 4), ("[2, 5, 4, 4]", "[n, classes]")),
            (make_zeros(), ("[2]", "[n, classes]")),
            (make_zeros(5, dtype=torch.int64), ("int64 [2, 5]", "[n, classes]")),
            (torch.zeros(3, 5), ("float32 [3, 5]", "for a batch of 2")),
        ),
    ),
    "embedding": Case(
        task=EmbeddingTask(normalize=True),
        output=make_noise(16),
        output_with_nan=with_nan(make_noise(16)),
        unsuitable=(
            (make_zeros(7, 16), ("[2, 7, 16]", "[n, d]")),
            (make_zeros(16, 4, 4), ("[2, 16, 4, 4]", "[n, d]")),
            (torch.zeros(3, 5), ("float32 [3, 5]", "for a batch of 2")),
        ),
    ),
    "multilabel": Case(
        task=MultilabelTask(threshold=(0.1, 0.5, 0.5, 0.5, 0.9), scores=True, labels=LABELS),
        output=LOGITS,
        output_with_nan=with_nan(LOGITS),
        unsuitable=(
            (make_zeros(5, 4, 4), ("[2, 5, 4, 4]", "[n, classes]")),
            (make_zeros(0), ("[2, 0]", "[n, classes]")),
            (make_zeros(5, dtype=torch.int64), ("int64 [2, 5]", "[n, classes]")),
            (make_zeros(4), ("5 thresholds", "4 classes")),
            (torch.zeros(3, 5), ("float32 [3, 5]", "for a batch of 2")),
        ),
    ),
    "regression": Case(
        task=RegressionTask(outputs=("x", "y")),
        output=make_noise(2),
        output_with_nan=with_nan(make_noise(2)),
        unsuitable=(
            (make_zeros(3), ("[2, 3]", "[n, 2]")),
            (make_zeros(), ("[2]", "[n, 2]")),
            (make_zeros(1, 2), ("[2, 1, 2]", "[n, 2]")),
            (make_zeros(2, dtype=torch.int64), ("int64 [2, 2]", "[n, 2]")),
            ({"x": make_zeros(), "y": make_zeros(2)}, ("[2], [2, 2]", "[n, 2]")),
            (torch.zeros(3, 2), ("float32 [3, 2]", "for a batch of 2")),
        ),
    ),
    "regression of one": Case(
        task=RegressionTask(),
        output=make_noise(1),
        output_with_nan=with_nan(make_noise(1)),
        unsuitable=((make_zeros(2), ("[2, 2]", "[n] or [n, 1]")),),
    ),
    "detection": Case(
        task=DetectionTask(threshold=0.2, nms=0.5, max_boxes=5),
        output=make_boxes(),
        output_with_nan=make_boxes(with_nan_box=True),
        one_tensor=False,
        labels=LABELS,
        unsuitable=(
            (make_zeros(5, 4), ("float32 [2, 5, 4]", "boxes [k, 4]", "logits [n, q, classes]", "model.output")),
            (make_boxes()[:3], ("a list of 3", "for a batch of 2")),
            ([{"boxes": make_zeros(4)}] * 2, ("a list of 2", "boxes float32 [2, 4]", "scores [k]")),
        ),
    ),
    "detection by queries": Case(
        task=DetectionTask(threshold=0.2),
        output={"logits": make_noise(9, 6), "pred_boxes": make_noise(9, 4).sigmoid()},
        output_with_nan={"logits": with_nan(make_noise(9, 6)), "pred_boxes": make_noise(9, 4).sigmoid()},
        one_tensor=False,
        labels=LABELS,
        unsuitable=(
            ({"logits": make_zeros(9, 6)}, ("logits float32 [2, 9, 6]", "pred_boxes [n, q, 4]")),
            ({"logits": make_zeros(9, 4), "pred_boxes": make_zeros(9, 4)}, ("5 labels", "3 classes")),
        ),
    ),
    "segmentation": Case(
        task=SegmentationTask(),
        output=make_noise(5, 14, 14),
        output_with_nan=with_nan(make_noise(5, 14, 14)),
        one_tensor=False,
        labels=LABELS,
        unsuitable=(
            (make_zeros(5), ("float32 [2, 5]", "[n, classes, h, w]")),
            (make_zeros(5, 4, 4, dtype=torch.int64), ("int64 [2, 5, 4, 4]", "[n, classes, h, w]")),
            (torch.zeros(3, 5, 4, 4), ("float32 [3, 5, 4, 4]", "for a batch of 2")),
            (make_zeros(4, 4, 4), ("5 labels", "4 classes")),
            ((make_zeros(5, 4, 4), make_zeros(5, 4, 4)), ("a tuple of 2", "model.output")),
        ),
    ),
    "segmentation in run lengths": Case(
        task=SegmentationTask(mask="rle", size="input"),
        output={"out": make_noise(5, 14, 14)},
        output_with_nan={"out": with_nan(make_noise(5, 14, 14))},
        one_tensor=False,
        labels=LABELS,
        unsuitable=(({"masks": make_zeros(5, 4, 4)}, ("a dict with the keys masks", "out or logits", "model.output")),),
    ),
    "instances": Case(
        task=SegmentationTask(size="input", format="instances"),
        output=make_boxes(),
        output_with_nan=make_boxes(with_nan_box=True),
        one_tensor=False,
        labels=LABELS,
        unsuitable=((make_zeros(5, 4, 4), ("float32 [2, 5, 4, 4]", "masks [k, 1, h, w]")),),
    ),
    "raw": Case(
        task=RawTask(),
        output=make_noise(2, 3).half(),
        output_with_nan=with_nan(make_noise(2, 3).half()),
        one_tensor=False,
        unsuitable=(
            (torch.zeros(3, 5), ("float32 [3, 5]", "for a batch of 2")),
            (make_zeros(3, 100, 100), ("120,001 bytes", "[3, 100, 100]", "task.row_bytes")),
            (make_zeros(4, dtype=torch.complex64), ("complex64 [2, 4]", "plain numbers")),
            (make_zeros(0), ("float32 [2, 0]", "plain numbers")),
            ({}, ("a dict",)),
            ({"uri": make_zeros(4)}, ("uri", "another name")),
            ({"a": make_zeros(4), "A": make_zeros(4)}, ("'a' and 'A'",)),
            ({"out": make_zeros(4), "aux": None}, ("aux is None", "model.output")),
            ([{"boxes": make_zeros(4)}] * 2, ("a list of 2", "output_0 is a dict with the keys boxes", "model.output")),
        ),
    ),
    "raw of several": Case(
        task=RawTask(),
        output={"logits": LOGITS, "shown": LOGITS > 0, "count": (LOGITS > 0).sum(1), "bytes": LOGITS.to(torch.uint8)},
        output_with_nan={
            "logits": with_nan(LOGITS),
            "shown": LOGITS > 0,
            "count": (LOGITS > 0).sum(1),
            "bytes": LOGITS.byte(),
        },
        one_tensor=False,
        unsuitable=(),
    ),
    "python function": Case(
        task=PythonTask(
            target="post:measured", fields={"spread": "float32", "wide": "bool", "values": "list<float32>[5]"}
        ),
        code=FUNCTION_CODE,
        output=LOGITS,
        output_with_nan=with_nan(LOGITS),
        one_tensor=False,
        unsuitable=(
            (torch.zeros(3, 5), ("float32 [3, 5]", "for a batch of 2")),
            (make_zeros(4), ("list<float32>[5]", "values")),
            ({"out": make_zeros(4), "aux": None}, ("a dict with the keys out, aux", "model.output")),
        ),
    ),
    "python class": Case(
        task=PythonTask(target="post:Tops", arguments={"most": 2}),
        code=CLASS_CODE,
        output={"logits": LOGITS},
        output_with_nan={"logits": with_nan(LOGITS)},
        one_tensor=False,
        unsuitable=(
            ({"logits": make_zeros(1)}, ("on_device", "post.py:9")),
            ({"wrong": make_zeros(5)}, ("on_device", "KeyError")),
        ),
    ),
}

ONE_TENSOR = {name: case for name, case in CASES.items() if case.one_tensor}
each_case = pytest.mark.parametrize("case", CASES.values(), ids=CASES)


def build_table_and_errors(
    postprocess: Postprocess, output: Any, rows: int = ROWS
) -> tuple[pa.Table, list[ErrorRecord | None]]:
    """Build the columns and the errors as the worker does: `on_device` in inference mode, the rest on the host."""
    with torch.inference_mode():
        tensors = {name: tensor.cpu() for name, tensor in postprocess.on_device(output).items()}
    assert tensors["finite"].dtype is torch.bool
    assert {len(tensor) for tensor in tensors.values()} == {rows}
    geometries = [ImageGeometry(640 + n, 480, 224, 224, 0.35, 0.47) for n in range(rows)]
    columns, errors = postprocess.columns(tensors, geometries), postprocess.find_errors(tensors)
    assert len(errors) == rows
    for column in columns:
        column.validate(full=True)
    return pa.Table.from_arrays(columns, schema=pa.schema(postprocess.fields)), errors


@each_case
def test_schema_is_known_in_advance_and_never_changes(case: Case, tmp_path: Path) -> None:
    postprocess = case.prepare(tmp_path)
    assert all(field.nullable for field in postprocess.fields)
    for rows in (0, 1, ROWS):
        with torch.inference_mode():
            tensors = postprocess.on_device(slice_rows(case.output, slice(0, rows)))
        columns = postprocess.columns(tensors, [ImageGeometry(9, 9, 9, 9)] * rows)
        assert [(column.type, len(column)) for column in columns] == [
            (field.type, rows) for field in postprocess.fields
        ]
    assert case.prepare(tmp_path).fields == postprocess.fields


@each_case
def test_row_does_not_depend_on_its_batch(case: Case, tmp_path: Path) -> None:
    postprocess = case.prepare(tmp_path)
    table, errors = build_table_and_errors(postprocess, case.output)
    assert errors == [None] * ROWS
    for row in range(ROWS):
        with torch.inference_mode():
            tensors = postprocess.on_device(slice_rows(case.output, slice(row, row + 1)))
        geometries = [ImageGeometry(640 + row, 480, 224, 224, 0.35, 0.47)]
        single = pa.Table.from_arrays(postprocess.columns(tensors, geometries), schema=table.schema)
        assert nearly_equal(single.to_pylist(), table.slice(row, 1).to_pylist())


@each_case
def test_rows_with_nan_are_error_rows_and_null(case: Case, tmp_path: Path) -> None:
    if case.output_with_nan is None:
        pytest.skip("no floats")
    postprocess = case.prepare(tmp_path)
    good_table, _ = build_table_and_errors(postprocess, case.output)
    table, errors = build_table_and_errors(postprocess, case.output_with_nan)
    assert [error is None for error in errors] == [row != 3 for row in range(ROWS)]
    assert errors[3] is not None
    assert (errors[3].stage, errors[3].type) == ("predict", "not_finite")
    assert set(table.slice(3, 1).to_pylist()[0].values()) == {None}
    assert nearly_equal(table.slice(0, 3).to_pylist() + table.slice(4).to_pylist(), drop_row(good_table.to_pylist(), 3))


@each_case
def test_unsuitable_outputs_are_refused_with_actual_and_expected_shape(case: Case, tmp_path: Path) -> None:
    for output, words in case.unsuitable:
        with pytest.raises(InvalidJob) as caught:
            case.prepare(tmp_path, output)
        assert [word for word in words if word not in caught.value.message] == [], caught.value.message


@each_case
def test_output_none_is_refused(case: Case, tmp_path: Path) -> None:
    with pytest.raises(InvalidJob, match=r"gives None for a batch of 2.*forward\(\)"):
        case.prepare(tmp_path, None)


@pytest.mark.parametrize("case", ONE_TENSOR.values(), ids=ONE_TENSOR)
def test_several_outputs_are_refused_with_advice_to_pick_one(case: Case, tmp_path: Path) -> None:
    example = slice_rows(case.output, slice(0, EXAMPLE_ROWS))
    for output, description in (
        ({"out": example, "aux": example}, "a dict with the keys out, aux"),
        ((example, example), "a tuple of 2"),
        ([example], "a list of 1"),
    ):
        with pytest.raises(InvalidJob) as caught:
            case.prepare(tmp_path, output)
        assert description in caught.value.message
        assert "model.output" in caught.value.message


@each_case
def test_duckdb_reads_the_rows_unchanged(case: Case, tmp_path: Path) -> None:
    postprocess = case.prepare(tmp_path)
    output = case.output if case.output_with_nan is None else case.output_with_nan
    table, _ = build_table_and_errors(postprocess, output)
    pq.write_table(table, tmp_path / "part.parquet", compression="zstd")
    read = duckdb.read_parquet(str(tmp_path / "part.parquet")).to_arrow_table()
    assert read.column_names == [field.name for field in postprocess.fields]
    assert nearly_equal(read.to_pylist(), table.to_pylist())
    assert pq.read_table(tmp_path / "part.parquet").schema.equals(table.schema)


@each_case
def test_row_bytes_bounds_the_columns(case: Case, tmp_path: Path) -> None:
    table, _ = build_table_and_errors(case.prepare(tmp_path), case.output)
    assert table.nbytes / ROWS <= case.task.row_bytes


def drop_row(rows: list[Any], index: int) -> list[Any]:
    return rows[:index] + rows[index + 1 :]


def nearly_equal(a: Any, b: Any) -> bool:
    """Compare values, floats except for their last digits: a batch of one may be summed in another order."""
    if isinstance(a, dict) and isinstance(b, dict):
        return list(a) == list(b) and all(nearly_equal(a[key], b[key]) for key in a)
    if isinstance(a, list | tuple) and isinstance(b, list | tuple):
        return len(a) == len(b) and all(map(nearly_equal, a, b))
    if isinstance(a, float) and isinstance(b, float):
        return bool(a == pytest.approx(b, rel=1e-5, abs=1e-7, nan_ok=True))
    return bool(a == b)
