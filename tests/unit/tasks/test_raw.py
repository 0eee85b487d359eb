"""Raw output: tensors keep their type and shape, one column for each."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch

from batchjob.errors import InvalidJob
from batchjob.storage.reader import Reader
from batchjob.tasks.postprocess import Postprocess
from batchjob.tasks.raw import RawTask
from batchjob.tasks.settings import TaskContext
from tests.support.task_rows import build_rows, find_error_types

READER, BASE = Reader(), Path()
NAN, INF = float("nan"), float("inf")


def make_postprocess(task: Any, output: Any) -> Postprocess:
    postprocess: Postprocess = task.build_postprocess(output, TaskContext(None, READER, BASE))
    return postprocess


ARROW_TYPES = {
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


@pytest.mark.parametrize("dtype", ARROW_TYPES, ids=str)
def test_tensors_keep_their_type(dtype: torch.dtype) -> None:
    output = (torch.randn(5, 4) * 50).to(dtype)
    postprocess = make_postprocess(RawTask(), output[:2])
    assert postprocess.fields[0].type == pa.list_(ARROW_TYPES[dtype], 4)
    assert [row["output"] for row in build_rows(postprocess, output)] == output.tolist()
    single = make_postprocess(RawTask(), output[:2, 0])
    assert single.fields[0].type == ARROW_TYPES[dtype]
    assert [row["output"] for row in build_rows(single, output[:, 0])] == output[:, 0].tolist()


def test_field_metadata_holds_the_shape_of_a_row(tmp_path: Path) -> None:
    output = torch.randn(5, 2, 3, 4).permute(0, 3, 1, 2)
    postprocess = make_postprocess(RawTask(), output[:2])
    table = pa.Table.from_arrays(
        postprocess.columns(postprocess.on_device(output), []), schema=pa.schema(postprocess.fields)
    )
    pq.write_table(table, tmp_path / "raw.parquet")
    read = pq.read_table(tmp_path / "raw.parquet")
    assert read.schema.field("output").metadata[b"shape"] == b"[4, 2, 3]"
    torch.testing.assert_close(torch.tensor(read["output"].to_pylist()).view(5, 4, 2, 3), output, rtol=0, atol=0)


def test_dict_and_tuple_have_a_column_for_each_tensor() -> None:
    a, b = torch.randn(2, 3), torch.arange(2)
    assert [field.name for field in make_postprocess(RawTask(), {"logits": a, "best": b}).fields] == ["logits", "best"]
    assert [field.name for field in make_postprocess(RawTask(), (a, b)).fields] == ["output_0", "output_1"]
    named = make_postprocess(RawTask(), torch.ones(2, 3).max(dim=1))
    assert build_rows(named, torch.ones(1, 3).max(dim=1)) == [{"output_0": 1.0, "output_1": 0}]


def test_row_not_finite_in_one_tensor_is_null_in_all() -> None:
    output = {"a": torch.tensor([1.0, NAN, 3.0]), "b": torch.tensor([[1.0], [1.0], [INF]]), "c": torch.arange(3)}
    postprocess = make_postprocess(RawTask(), {name: part[:2] for name, part in output.items()})
    assert build_rows(postprocess, output) == [{"a": 1, "b": [1], "c": 0}, *[{"a": None, "b": None, "c": None}] * 2]
    assert find_error_types(postprocess, output) == [None, "not_finite", "not_finite"]
    lenient = make_postprocess(RawTask(allow_nan=True), {name: part[:2] for name, part in output.items()})
    assert build_rows(lenient, output)[2] == {"a": 3, "b": [INF], "c": 2}


def test_rows_above_row_bytes_are_refused() -> None:
    output = torch.zeros(2, 64, 56, 56)
    with pytest.raises(
        InvalidJob, match=r"a row takes 802,817 bytes \(output \[64, 56, 56\]\).*task\.row_bytes is 65,536"
    ):
        make_postprocess(RawTask(), output)
    task = RawTask(row_bytes=1_000_000)
    assert (task.row_bytes, len(make_postprocess(task, output).fields)) == (1_000_000, 1)


def test_row_of_another_shape_is_refused() -> None:
    postprocess = make_postprocess(RawTask(), torch.zeros(2, 3, 4))
    with pytest.raises(InvalidJob, match=r"gives \[4, 3\] for an image where it gave \[3, 4\]"):
        postprocess.on_device(torch.zeros(2, 4, 3))
