"""Page of the output's columns: those of every output, then those that each task declares."""

from __future__ import annotations

import typing
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import pyarrow as pa
import torch

from batchjob.arrow_types import child_fields
from batchjob.job.job import AnyTask
from batchjob.output.schema import build_row_schema
from batchjob.storage.reader import Reader
from batchjob.tasks.classification import ClassificationTask
from batchjob.tasks.detection import DetectionTask
from batchjob.tasks.embedding import EmbeddingTask
from batchjob.tasks.multilabel import MultilabelTask
from batchjob.tasks.postprocess import EXAMPLE_ROWS
from batchjob.tasks.python import PythonTask
from batchjob.tasks.raw import RawTask
from batchjob.tasks.regression import RegressionTask
from batchjob.tasks.segmentation import SegmentationTask
from batchjob.tasks.settings import TaskContext
from docs.generate.markdown import UndocumentedError, notice, table

__all__ = ["EXAMPLES", "describe_type", "page"]

_INTRODUCTION = """\
The columns of the Parquet files in `OUT/predictions/`, in their order. There is one row for each planned image, in the
order of the plan, whether it worked or not. All columns but `position`, `uri`, `run_id` and `model_id` may be null. The
guide to [output and SQL](../guides/output-and-sql.md) shows how to read them."""
_TASK_INTRODUCTION = """\
They stand between `height` and `run_id`, and are null in error rows. Columns marked with a path such as
`top_k[].score` are fields of the structs in a list."""

# Meaning of each column of every output.
_ROW_MEANINGS = {
    "position": "Position of the image in the plan, from 0: the identity of the row. An image that a manifest names "
    "twice has two rows.",
    "id": "Only with `input.id_column`: the value of that column, in its type.",
    "uri": "Path or URI of the image, as it was listed or as the manifest gives it.",
    "passthrough columns": "Columns that `input.passthrough` names, as the manifest gives them.",
    "etag": "Tag of the version of the object that was read; null if the store has none.",
    "width": "Width of the image in pixels, as it is stored.",
    "height": "Height of the image in pixels, as it is stored.",
    "the task's columns": "See below.",
    "run_id": "Id of the plan that the row belongs to.",
    "model_id": "SHA-256 digest of the model's weights and code, in hexadecimal digits.",
    "error_stage": "Stage that failed: `fetch`, `decode`, `transform` or `predict`; null if the image worked.",
    "error_type": "Short word for the kind of fault, to group by, such as `not_found` or `truncated`; null if the "
    "image worked.",
    "error_message": "One sentence that says what is wrong with the image; null if it worked.",
}
_LABEL_ID = "Id of the class: its index in the model's output, from 0."
_LABEL = "Name of the class; null without labels."
_CLASS = {"label_id": _LABEL_ID, "label": _LABEL, "score": "Score of the class, 0 to 1 after the activation."}
_BOX = {
    "label_id": "Id of the class, as the model gives it.",
    "label": _LABEL,
    "score": "Score of the box, 0 to 1.",
    "x_min": "Left edge, in pixels of the original image.",
    "y_min": "Upper edge, in pixels of the original image.",
    "x_max": "Right edge, in pixels of the original image.",
    "y_max": "Lower edge, in pixels of the original image.",
}
_RUN_LENGTHS = {
    "size": "Height and width of the mask, in pixels.",
    "counts": "Run lengths of pixels outside and inside in turn, down each column from the top left corner, as COCO "
    "writes them uncompressed.",
}


def _within(name: str, meanings: dict[str, str]) -> dict[str, str]:
    return {f"{name}.{key}": text for key, text in meanings.items()}


_CLASS_MAP = {
    "pixels": "Classes that the image shows, the largest first.",
    **_within("pixels[]", {"label_id": _LABEL_ID, "label": _LABEL, "pixels": "Number of pixels of the class."}),
}
_INSTANCES = {
    "detections": "Instances, the best first.",
    **_within("detections[]", _BOX),
    "detections[].pixels": "Number of pixels of the instance.",
}
_BOXES = {
    "boxes": torch.zeros(1, 4),
    "labels": torch.zeros(1, dtype=torch.int64),
    "scores": torch.zeros(1),
    "masks": torch.zeros(1, 1, 8, 8),
}
# Title, task, an output of a model for `EXAMPLE_ROWS` images, and the meaning of each column.
EXAMPLES: list[tuple[str, Any, Any, dict[str, str]]] = [
    (
        "`type: classification`",
        ClassificationTask(),
        torch.zeros(EXAMPLE_ROWS, 10),
        {
            "label_id": f"The likeliest class. {_LABEL_ID}",
            "label": _LABEL,
            "score": _CLASS["score"],
            "top_k": "The `task.top_k` likeliest classes, the best first.",
            **_within("top_k[]", _CLASS),
        },
    ),
    (
        "`type: multilabel`",
        MultilabelTask(scores=True),
        torch.zeros(EXAMPLE_ROWS, 10),
        {
            "labels": "Classes whose score reaches `task.threshold`, the best first; empty if there is none.",
            **_within("labels[]", _CLASS),
            "scores": "Only with `scores: true`: the score of every class by id, for all classes, here 10.",
        },
    ),
    (
        "`type: regression`",
        RegressionTask(),
        torch.zeros(EXAMPLE_ROWS, 1),
        {"value": "One column for each name in `task.outputs`: the number that the model gives."},
    ),
    (
        "`type: embedding`",
        EmbeddingTask(),
        torch.zeros(EXAMPLE_ROWS, 512),
        {"embedding": "Vector of the image. The length is that of the model's layer, here 512."},
    ),
    (
        "`type: detection`",
        DetectionTask(format="torchvision"),
        [_BOXES] * EXAMPLE_ROWS,
        {"detections": "Boxes, the best first; empty if there is none.", **_within("detections[]", _BOX)},
    ),
    (
        "`type: segmentation`, a class for each pixel",
        SegmentationTask(),
        torch.zeros(EXAMPLE_ROWS, 3, 8, 8),
        {
            **_CLASS_MAP,
            "mask": "PNG of one channel: the id of the class of each pixel. `mask: none` has no such column.",
        },
    ),
    (
        "`type: segmentation` with `mask: rle`, a class for each pixel",
        SegmentationTask(mask="rle"),
        torch.zeros(EXAMPLE_ROWS, 3, 8, 8),
        {
            **_CLASS_MAP,
            "mask": "Mask of each class that the image shows.",
            **_within("mask[]", {"label_id": _LABEL_ID, **_RUN_LENGTHS}),
        },
    ),
    (
        "`type: segmentation`, instances",
        SegmentationTask(format="instances"),
        [_BOXES] * EXAMPLE_ROWS,
        {
            **_INSTANCES,
            "detections[].mask": "PNG of one channel: 255 inside, 0 outside. `mask: none` has no such field.",
        },
    ),
    (
        "`type: segmentation` with `mask: rle`, instances",
        SegmentationTask(format="instances", mask="rle"),
        [_BOXES] * EXAMPLE_ROWS,
        {
            **_INSTANCES,
            "detections[].mask": "Mask of the instance.",
            **_within("detections[].mask", _RUN_LENGTHS),
        },
    ),
    (
        "`type: raw`",
        RawTask(),
        torch.zeros(EXAMPLE_ROWS, 3, 4),
        {
            "output": "Output of the model, row-major, here for a shape of `[3, 4]`, which the field's metadata hold "
            "under `shape`. A model that returns a dict has one column for each key; a tuple, `output_0`, `output_1` "
            "and so on."
        },
    ),
]
# Its columns are the user's own.
_PYTHON = (
    "The columns that the target declares: `task.fields`, or the `fields` of its object, with the types given there."
)


def page() -> str:
    """Return the text of the page.

    Raises:
        UndocumentedError: A column has no meaning here, or a task no example.
    """
    _check_tasks()
    parts = ["# Output columns", notice("the schemas that the tasks declare"), _INTRODUCTION, "## Every output"]
    placeholders = [pa.field("id", pa.string()), pa.field("passthrough columns", pa.string())]
    task_columns = [pa.field("the task's columns", pa.string())]
    columns = build_row_schema(placeholders, task_columns, has_id=True)
    parts += [_column_table(columns, _ROW_MEANINGS), "## The task's columns", _TASK_INTRODUCTION]
    for title, task, output, meanings in EXAMPLES:
        postprocess = task.build_postprocess(output, TaskContext(None, Reader(), Path()))
        parts += [f"### {title}", _column_table(postprocess.fields, meanings)]
    parts += ["### `type: python`", _PYTHON]
    return "\n\n".join(parts) + "\n"


def _check_tasks() -> None:
    described = {type(task) for _, task, _, _ in EXAMPLES} | {PythonTask}
    union, *_ = typing.get_args(AnyTask)
    if missing := [task.__name__ for task in typing.get_args(union) if task not in described]:
        raise UndocumentedError(f"add an example to docs/generate/output_columns.py: {', '.join(missing)}")


def _column_table(fields: Sequence[pa.Field] | pa.Schema, meanings: dict[str, str]) -> str:
    columns = dict(_walk_fields(fields))
    if missing := [name for name in columns if name not in meanings]:
        raise UndocumentedError(f"say in docs/generate/output_columns.py what is in {', '.join(missing)}")
    rows = []
    for name, data_type in columns.items():
        is_placeholder = " " in name or name == "id"
        rows.append([name if " " in name else f"`{name}`", "" if is_placeholder else f"`{data_type}`", meanings[name]])
    return table(["column", "Arrow type", "meaning"], rows)


def _walk_fields(fields: Sequence[pa.Field] | pa.Schema, prefix: str = "") -> Iterator[tuple[str, str]]:
    """Yield the path and type of each column, and of the struct fields in it."""
    for field in fields:
        path, data_type = prefix + field.name, field.type
        yield path, describe_type(data_type)
        if _is_list(data_type):
            path, data_type = f"{path}[]", data_type.value_type
        if pa.types.is_struct(data_type):
            yield from _walk_fields(child_fields(data_type), f"{path}.")


def describe_type(data_type: pa.DataType) -> str:
    """Write an Arrow type without the fields of its structs, such as `list<struct>` or `list<float>[512]`."""
    if _is_list(data_type):
        size = f"[{data_type.list_size}]" if pa.types.is_fixed_size_list(data_type) else ""
        return f"list<{describe_type(data_type.value_type)}>{size}"
    return "struct" if pa.types.is_struct(data_type) else {"float": "float32"}.get(str(data_type), str(data_type))


def _is_list(data_type: pa.DataType) -> bool:
    return bool(pa.types.is_list(data_type) or pa.types.is_fixed_size_list(data_type))
