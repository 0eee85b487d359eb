"""Rows of a task's output, as a reader of Parquet sees them."""

from __future__ import annotations

import io
from collections.abc import Sequence
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import torch

from batchjob.preprocessing.geometry import ImageGeometry
from batchjob.tasks.postprocess import Postprocess

__all__ = ["build_rows", "build_table", "find_error_types", "run_on_device"]


def run_on_device(postprocess: Postprocess, output: Any) -> dict[str, torch.Tensor]:
    """Return the tensors that a worker copies to the host."""
    with torch.inference_mode():
        tensors = {name: tensor.cpu() for name, tensor in postprocess.on_device(output).items()}
    assert tensors["finite"].dtype is torch.bool
    assert {len(tensor) for tensor in tensors.values()} == {len(tensors["finite"])}
    assert not isinstance(output, torch.Tensor) or len(output) == len(tensors["finite"])
    return tensors


def build_table(postprocess: Postprocess, output: Any, geometries: Sequence[ImageGeometry] = ()) -> pa.Table:
    """Build the columns, check them against the declared fields, and write and read them as Parquet."""
    tensors = run_on_device(postprocess, output)
    columns = postprocess.columns(tensors, geometries)
    for column, field in zip(columns, postprocess.fields, strict=True):
        column.validate(full=True)
        assert (column.type, len(column), field.nullable) == (field.type, len(tensors["finite"]), True)
    table = pa.Table.from_arrays(columns, schema=pa.schema(postprocess.fields))
    file = io.BytesIO()
    pq.write_table(table, file)
    read = pq.read_table(file)
    assert read.schema.equals(table.schema)
    return read


def build_rows(postprocess: Postprocess, output: Any, geometries: Sequence[ImageGeometry] = ()) -> list[dict[str, Any]]:
    rows: list[dict[str, Any]] = build_table(postprocess, output, geometries).to_pylist()
    return rows


def find_error_types(postprocess: Postprocess, output: Any) -> list[str | None]:
    """Return the type of each row's error, None for good rows."""
    errors = postprocess.find_errors(run_on_device(postprocess, output))
    return [error.type if error else None for error in errors]
