"""Tasks of `type: python`: the user's function or class, the values that it may return, and its errors."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from PIL import Image

import batchjob
from batchjob.errors import InvalidJob
from batchjob.preprocessing.geometry import ImageGeometry
from batchjob.storage.reader import Reader
from batchjob.tasks.postprocess import EXAMPLE_ROWS, Postprocess
from batchjob.tasks.python import PythonTask
from batchjob.tasks.settings import TaskContext
from batchjob.types import ErrorRecord
from tests.support.task_rows import run_on_device

READER = Reader()


def make_postprocess(base: Path, code: str, output: Any = None, **settings: Any) -> Postprocess:
    """Build the postprocess of this code for a tensor `[2, 3]`, unless another output is given."""
    base.mkdir(exist_ok=True)
    (base / "post.py").write_text(code)
    task = PythonTask(target="post:own", **settings)
    return task.build_postprocess(
        torch.ones(EXAMPLE_ROWS, 3) if output is None else output, TaskContext(None, READER, base)
    )


def catch_message(base: Path, code: str, output: Any = None, **settings: Any) -> str:
    with pytest.raises(InvalidJob) as caught:
        make_postprocess(base, code, output, **settings)
    assert caught.value.message.startswith("task.target: post:own")
    return caught.value.message


def build_rows_and_errors(
    postprocess: Postprocess, output: Any
) -> tuple[list[dict[str, Any]], list[ErrorRecord | None]]:
    tensors = run_on_device(postprocess, output)
    geometries = [ImageGeometry(640, 480, 224, 224, 0.35, 0.47)] * len(tensors["finite"])
    table = pa.Table.from_arrays(postprocess.columns(tensors, geometries), schema=pa.schema(postprocess.fields))
    table.validate(full=True)
    rows: list[dict[str, Any]] = table.to_pylist()
    return rows, postprocess.find_errors(tensors)


def test_function_is_a_task(tmp_path: Path) -> None:
    code = "def own(output, frames):\n    return {'sharpness': output.std(dim=1)}\n"
    postprocess = make_postprocess(tmp_path, code, fields={"sharpness": "float32"})
    output = torch.randn(4, 3)
    assert postprocess.fields == [pa.field("sharpness", pa.float32())]
    rows, errors = build_rows_and_errors(postprocess, output)
    assert [row["sharpness"] for row in rows] == output.std(dim=1).tolist()
    assert errors == [None] * 4


@pytest.mark.parametrize(
    ("value", "kind"),
    [
        ("output[:, 0]", "float32"),
        ("output[:, 0].double()", "float32"),
        ("output[:, 0].bfloat16()", "float32"),
        ("output[:, 0].numpy()", "float64"),
        ("output[:, 0].tolist()", "float32"),
        ("[value for value in output[:, 0]]", "float32"),
        ("tuple(int(value) for value in output[:, 0])", "int8"),
        ("output[:, 0] > 0", "bool"),
        ("[str(float(value)) for value in output[:, 0]]", "string"),
        ("output", "list<float32>[3]"),
        ("output", "list<float32>"),
        ("output.numpy()", "list<float64>"),
        ("output[:, None, :]", "list<list<float32>>"),
        ("[row for row in output]", "list<float32>"),
        ("[{'x': row[0], 'y': ['a']} for row in output]", "struct<x: float32, y: list<string>>"),
        ("[None for row in output]", "timestamp[us]"),
        ("pa.array(output[:, 0].tolist())", "float32"),
        ("pa.chunked_array([output[:, 0].tolist()])", "float64"),
        ("pd.Series(output[:, 0].numpy())", "float32"),
        ("pa.table({'v': output[:, 0].tolist()})", "float32"),
        ("pa.record_batch({'v': output[:, 0].tolist()})", "float32"),
        ("{'v': output[:, 0]}", "float32"),
    ],
)
def test_values_are_accepted_in_every_usual_form(value: str, kind: str, tmp_path: Path) -> None:
    code = f"import pandas as pd\nimport pyarrow as pa\ndef own(output):\n    return {value}\n"
    rows, errors = build_rows_and_errors(make_postprocess(tmp_path, code, fields={"v": kind}), torch.ones(5, 3))
    assert len(rows) == 5
    assert errors == [None] * 5


@pytest.mark.parametrize(
    ("value", "text"),
    [
        ("{'b': output}", "returned the columns b; declared are v"),
        ("{}", "returned the columns none; declared are v"),
        ("None", "returned None; it must return a dict with the columns v"),
        ("output[:1]", "returned 1 value as v for 2 images"),
        ("output.sum()", "returned float32 [] as v"),
        ("'ab'", "returned a str as v"),
        ("7", "returned an int as v"),
        ("['a', 'b'][:len(output)]", "returned a list of str as v, which is declared as float32"),
        ("output", "returned float32 [2, 3] as v, which is declared as float32"),
        ("output.squeeze()[:, 0]", "IndexError: too many indices for tensor of dimension 1 (post.py:2)"),
        ("undefined", "raised NameError: name 'undefined' is not defined (post.py:2) on an example batch of 2"),
    ],
)
def test_values_unlike_the_declaration_are_refused_on_the_example(value: str, text: str, tmp_path: Path) -> None:
    assert text in catch_message(tmp_path, f"def own(output):\n    return {value}\n", fields={"v": "float32"})


def test_fractions_in_an_integer_column_are_refused(tmp_path: Path) -> None:
    code = "def own(output):\n    return {'v': output[:, 0] + 0.5}\n"
    assert "declared as int32" in catch_message(tmp_path, code, fields={"v": "int32"})


def test_tuple_gives_columns_in_order(tmp_path: Path) -> None:
    code = "def own(output):\n    return output[:, 0], output[:, 1] > 0\n"
    rows, _ = build_rows_and_errors(
        make_postprocess(tmp_path, code, fields={"a": "float32", "b": "bool"}), torch.ones(2, 3)
    )
    assert rows == [{"a": 1.0, "b": True}] * 2
    assert "a tuple of 2" in catch_message(tmp_path / "b", code, fields={"a": "float32", "b": "bool", "c": "bool"})


@pytest.mark.parametrize(
    ("parameters", "arguments", "accepted"),
    [
        ("output", {}, True),
        ("output, frames", {}, True),
        ("output, scale=2.0", {}, True),
        ("output, scale", {"scale": 3}, True),
        ("output, frames, scale", {"scale": 3}, True),
        ("output, frames, *, scale=1", {}, True),
        ("", {}, False),
        ("output, frames, scale", {}, False),
        ("output, *, scale", {}, False),
    ],
)
def test_signatures_with_output_and_frames_are_accepted(
    parameters: str, arguments: dict[str, Any], accepted: bool, tmp_path: Path
) -> None:
    code = f"def own({parameters}):\n    return {{'v': [0] * len(output)}}\n"
    if accepted:
        assert build_rows_and_errors(
            make_postprocess(tmp_path, code, fields={"v": "int8"}, arguments=arguments), torch.ones(1, 3)
        )
    else:
        assert "is called as (output) or (output, frames)" in catch_message(
            tmp_path, code, fields={"v": "int8"}, arguments=arguments
        )


@pytest.mark.parametrize("parameter", ["frames", "where", "frames=None", "*, frames=()"])
def test_frames_are_passed_to_functions_that_take_them(parameter: str, tmp_path: Path) -> None:
    name = parameter.strip("*, ").partition("=")[0]
    code = f"def own(output, {parameter}):\n    return {{'wide': [one.width for one in {name}]}}\n"
    assert build_rows_and_errors(make_postprocess(tmp_path, code, fields={"wide": "int32"}), torch.ones(1, 3))[0] == [
        {"wide": 640}
    ]


def test_frames_map_the_input_to_the_image(tmp_path: Path) -> None:
    code = (
        "def own(output, frames):\n    return {'x': [(x + f.left) / f.scale_x for x, f in zip(output[:, 0], frames)]}\n"
    )
    rows, _ = build_rows_and_errors(make_postprocess(tmp_path, code, fields={"x": "float64"}), torch.ones(1, 3) * 35)
    assert rows[0]["x"] == pytest.approx(100)


def test_output_keeps_its_structure(tmp_path: Path) -> None:
    ones = torch.ones(EXAMPLE_ROWS, 3)
    fields = {"v": "float32"}
    make_postprocess(
        tmp_path,
        "def own(output):\n    return output['a'][:, 0] + output['b']\n",
        {"a": ones, "b": ones[:, 0]},
        fields=fields,
    )
    make_postprocess(
        tmp_path / "two", "def own(output):\n    a, b = output\n    return b[:, 0]\n", (ones, ones), fields=fields
    )
    named = torch.ones(EXAMPLE_ROWS, 3).max(dim=1)
    make_postprocess(tmp_path / "three", "def own(output):\n    return output.values\n", named, fields=fields)


def test_code_may_write_to_the_output_and_sees_finite_images_only(tmp_path: Path) -> None:
    code = "def own(output):\n    assert output.isfinite().all()\n    return {'v': output.mul_(2)[:, 0]}\n"
    postprocess = make_postprocess(tmp_path, code, fields={"v": "float32"})
    output = torch.tensor([[1.0, 1, 1], [float("nan"), 1, 1], [3, 3, 3]])
    rows, errors = build_rows_and_errors(postprocess, output)
    assert [row["v"] for row in rows] == [2, None, 6]
    assert [error and error.type for error in errors] == [None, "not_finite", None]
    rows, errors = build_rows_and_errors(postprocess, output[1:2])
    assert (rows, [error and error.type for error in errors]) == ([{"v": None}], ["not_finite"])
    lenient = make_postprocess(
        tmp_path, code.replace("    assert output.isfinite().all()\n", ""), fields={"v": "float32"}, allow_nan=True
    )
    assert lenient.find_errors(lenient.on_device(output)) == [None] * 3


def test_only_images_on_which_the_code_fails_are_error_rows(tmp_path: Path) -> None:
    code = "def own(output):\n    assert (output < 9).all(), 'nine is too much'\n    return {'v': output[:, 0]}\n"
    postprocess = make_postprocess(tmp_path, code, fields={"v": "float32"})
    output = torch.tensor([1.0, 9.0, 2.0, float("nan"), 3.0, 9.5])[:, None].repeat(1, 3)
    rows, errors = build_rows_and_errors(postprocess, output)
    assert [row["v"] for row in rows] == [1, None, 2, None, 3, None]
    assert [error and (error.stage, error.type) for error in errors] == [
        None,
        ("task", "AssertionError"),
        None,
        ("predict", "not_finite"),
        None,
        ("task", "AssertionError"),
    ]
    assert errors[1] is not None
    assert errors[1].message == "task.target: post:own raised AssertionError: nine is too much (post.py:2)"
    assert build_rows_and_errors(postprocess, output[:1])[1] == [None]


def test_image_with_invalid_values_is_an_error_row(tmp_path: Path) -> None:
    code = "def own(output):\n    return {'v': [int(value) for value in output[:, 0]]}\n"
    rows, errors = build_rows_and_errors(
        make_postprocess(tmp_path, code, fields={"v": "int8"}), torch.tensor([[1.0], [1000.0]]).repeat(1, 3)
    )
    assert [row["v"] for row in rows] == [1, None]
    assert errors[1] is not None
    assert (errors[1].type, "declared as int8" in errors[1].message) == ("misfit", True)


@pytest.mark.parametrize("error", ["OSError('disk')", "MemoryError()"])
def test_os_and_memory_errors_end_the_attempt(error: str, tmp_path: Path) -> None:
    code = f"def own(output):\n    if len(output) > 2:\n        raise {error}\n    return {{'v': output[:, 0]}}\n"
    postprocess = make_postprocess(tmp_path, code, fields={"v": "float32"})
    with pytest.raises((OSError, MemoryError)):
        build_rows_and_errors(postprocess, torch.ones(3, 3))


CLASS_WITH_FIELDS = """
import pyarrow as pa

class own:
    def __init__(self, names):
        self.names = names
        self.fields = [pa.field("best", pa.string(), nullable=False)]

    def columns(self, output):
        return {"best": [self.names[place] for place in output.argmax(dim=1).tolist()]}
"""


def test_class_declares_its_columns(tmp_path: Path) -> None:
    postprocess = make_postprocess(tmp_path, CLASS_WITH_FIELDS, arguments={"names": ["a", "b", "c"]})
    assert postprocess.fields == [pa.field("best", pa.string())]
    assert build_rows_and_errors(postprocess, torch.eye(3))[0] == [{"best": "a"}, {"best": "b"}, {"best": "c"}]


def test_class_with_fields_in_the_job_is_called_like_a_function(tmp_path: Path) -> None:
    code = (
        "class own:\n    def __init__(self, by):\n        self.by = by\n"
        "    def __call__(self, output):\n        return output[:, 0] * self.by\n"
    )
    postprocess = make_postprocess(tmp_path, code, fields={"v": "float32"}, arguments={"by": 3})
    assert build_rows_and_errors(postprocess, torch.ones(1, 3))[0] == [{"v": 3.0}]
    assert "give it __call__" in catch_message(tmp_path / "b", "class own:\n    pass\n", fields={"v": "float32"})


@pytest.mark.parametrize(
    ("code", "text"),
    [
        ("own = 7\n", "is an int; name a function or a class"),
        ("def own(output):\n    return output\n", "write task.fields"),
        ("class own:\n    fields = {'v': 'int8'}\n", "without `fields` and `columns(output)`"),
        ("class own:\n    fields = {'v': 'int9'}\n    def columns(self, output): ...\n", "'int9' is not a type"),
        (
            "class own:\n    fields = {'uri': 'int8'}\n    def columns(self, output): ...\n",
            "'uri' is what batchjob calls",
        ),
        ("class own:\n    fields = {}\n    def columns(self, output): ...\n", "there are none"),
        ("class own:\n    fields = 7\n    def columns(self, output): ...\n", "give a dict of names and types"),
        (
            "import pyarrow as pa\nclass own:\n    fields = {'v': pa.null()}\n    def columns(self, output): ...\n",
            "'null'",
        ),
        ("class own:\n    fields = {'v': 'int8'}\n    def columns(self): ...\n", "is called as (output)"),
        (
            "class own:\n    fields = {'v': 'int8'}\n    on_device = lambda s, o: o[9]\n    def columns(s, o): ...\n",
            "post.py:3",
        ),
        (
            "class own:\n    fields = {'v': 'int8'}\n    on_device = lambda s, o: o[0]\n    def columns(s, o): ...\n",
            "on_device returns float32 [3]",
        ),
    ],
)
def test_invalid_targets_are_refused(code: str, text: str, tmp_path: Path) -> None:
    assert text in catch_message(tmp_path, code)


@pytest.mark.parametrize(
    ("fields", "text"),
    [
        ({"v": "float33"}, "is not a type"),
        ({"v": "list<"}, "is not a type"),
        ({"v": "list<float32>[0]"}, "holds nothing"),
        ({"v": "struct<x>"}, "no member of a struct"),
        ({"v": "float16"}, "not read by all readers"),
        ({"v": "list<null>"}, "not read by all readers"),
        ({"error_type": "string"}, "a column of its own"),
        ({"a-b": "string"}, "no name for a column"),
        ({"a": "string", "A": "string"}, "would be one column"),
        ({}, "1 is the least"),
    ],
)
def test_invalid_fields_are_refused(fields: dict[str, str], text: str) -> None:
    with pytest.raises(InvalidJob, match=re.escape(text)):
        PythonTask(target="post:own", fields=fields)


def test_digest_follows_the_code_and_its_imports(tmp_path: Path) -> None:
    (tmp_path / "post.py").write_text("import beside\ndef own(output): ...\n")
    (tmp_path / "beside.py").write_text("A = 1\n")
    task = PythonTask(target="post:own")
    before = task.digest(tmp_path)
    assert before == task.digest(tmp_path)
    (tmp_path / "beside.py").write_text("A = 2\n")
    assert task.digest(tmp_path) != before
    with pytest.raises(InvalidJob, match=r"poost\.py: not there.*did you mean 'post'"):
        PythonTask(target="poost:own").check(READER, tmp_path)


JOB = """
input: {type: manifest, uri: images.csv, uri_column: image, passthrough: [width_in_cm]}
model: {type: python, target: "net:build"}
preprocess: {resize: null, crop: null, mean: null, std: null}
task:
  type: python
  target: "post:measured"
  fields: {brightness: float32, wide: bool, channels: "list<float32>[3]"}
  arguments: {cut: 20}
runtime: {pool: local, batch_size: 4, loader: {processes: 0}}
errors: {max_rate: 1}
output: {uri: out}
"""
NET = """
import torch

class Mean(torch.nn.Module):
    def forward(self, pixels):
        return pixels.mean(dim=(2, 3))

def build():
    return Mean()
"""
POSTPROCESS_CODE = """
def measured(output, frames, cut):
    if (output.sum(dim=1) == 0).any():
        raise ValueError("it is all black")
    return {"brightness": output.mean(dim=1), "wide": [frame.width > cut for frame in frames], "channels": output}
"""


def test_run_with_a_python_task(tmp_path: Path) -> None:
    for name, text in (("job.yaml", JOB), ("net.py", NET), ("post.py", POSTPROCESS_CODE)):
        (tmp_path / name).write_text(text)
    for number in range(6):
        Image.new("RGB", (16, 16), (250 - 50 * number,) * 3).save(tmp_path / f"{number}.png")
    lines = [f"{number}.png,{number}" for number in range(6)]
    (tmp_path / "images.csv").write_text("\n".join(["image,width_in_cm", *lines]) + "\n")
    result = batchjob.run(batchjob.Job.from_file(tmp_path / "job.yaml"))
    assert (result.status, result.predicted, result.failed) == ("complete", 5, 1)
    rows = pq.read_table(tmp_path / "out" / "predictions").to_pylist()
    assert [row["error_type"] for row in rows] == [*[None] * 5, "ValueError"]
    assert rows[5]["error_message"] == "task.target: post:measured raised ValueError: it is all black (post.py:4)"
    assert rows[5]["channels"] is None
    for number, row in enumerate(rows[:5]):
        assert row["brightness"] == pytest.approx((250 - 50 * number) / 255)
        assert (row["wide"], len(row["channels"]), row["width_in_cm"]) == (False, 3, str(number))
    report = json.loads((tmp_path / "out" / "_SUCCESS").read_text())
    assert report["errors"] == {"task/ValueError": 1}
