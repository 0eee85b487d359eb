"""`type: raw`: the model's tensors unchanged, one fixed-size list per row and tensor."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from math import prod
from typing import TYPE_CHECKING, Any, Literal

import pyarrow as pa
from pydantic import Field

from batchjob.errors import InvalidJob
from batchjob.tasks.column_names import check_column_name, check_distinct_names
from batchjob.tasks.list_columns import build_vector_column
from batchjob.tasks.model_output import check_row_shape, describe_mismatch, describe_output, widen_half_precision
from batchjob.tasks.output_structure import OutputStructure, infer_structure, pack_parts, unpack_parts
from batchjob.tasks.postprocess import EXAMPLE_ROWS, Mask, Postprocess
from batchjob.tasks.settings import TaskContext, TaskSettings

if TYPE_CHECKING:
    import torch

    from batchjob.preprocessing.geometry import ImageGeometry

__all__ = ["RawTask"]

_EXPECTED = "raw wants a tensor with a row for each image, or a dict or a tuple of such"
_ADVICE = "pick one of several with model.output, or wrap the model so that it returns tensors (model.type: python)"


class RawTask(TaskSettings):
    """The output itself, for use elsewhere.

    One tensor becomes the column `output`; a dict has a column for each key, a tuple `output_0`, `output_1` and so on.
    A row of `[n, a, b]` is a list of `a * b` numbers, row-major; the metadata of the field hold `shape: [a, b]`. A row
    of `[n]` is a number. float16 and bfloat16 become float32.

    Attributes:
        row_bytes: Maximum bytes of a row; decides the size of shards before the model is known.
        allow_nan: True accepts rows that hold NaN or infinity.
    """

    type: Literal["raw"] = "raw"
    row_bytes: int = Field(default=65_536, ge=1)
    allow_nan: bool = False

    def build_postprocess(self, output: Any, context: TaskContext) -> Postprocess:  # noqa: ARG002
        """Build the postprocess; see `TaskSettings`.

        The output must be tensors with a row for each image, under keys that can name columns, within `row_bytes`.
        """
        structure = infer_structure(output, describe_mismatch(output, _EXPECTED), _ADVICE)
        try:
            check_distinct_names(map(check_column_name, structure.names))
        except ValueError as error:
            raise InvalidJob(f"the model gives {describe_output(output)}: {error}; {_ADVICE}") from None
        parts = zip(structure.names, structure.flatten(output), strict=True)
        columns = [_TensorColumn.of(name, part, output) for name, part in parts]
        byte_count = sum(column.row_bytes for column in columns)
        if byte_count > self.row_bytes:
            shapes = ", ".join(f"{column.name} {list(column.shape)}" for column in columns)
            raise InvalidJob(
                f"a row takes {byte_count:,} bytes ({shapes}), but task.row_bytes is {self.row_bytes:,}; raise it, "
                "which makes shards smaller, or give out less: one of several with model.output, or another task"
            )
        return _RawPostprocess(structure, tuple(columns), self.allow_nan)


@dataclass(frozen=True)
class _TensorColumn:
    """Column of one tensor.

    Attributes:
        name: Name of the column.
        shape: Shape of a row; empty if a row is a number.
        value_type: Arrow type of its numbers.
    """

    name: str
    shape: tuple[int, ...]
    value_type: pa.DataType

    @classmethod
    def of(cls, name: str, tensor: Any, output: Any) -> _TensorColumn:
        """Define the column of a tensor. Raises InvalidJob if it cannot be one; the message describes `output`."""
        import torch

        message = describe_mismatch(output, _EXPECTED)
        if not isinstance(tensor, torch.Tensor) or tensor.ndim == 0 or tensor.shape[0] != EXAMPLE_ROWS:
            raise InvalidJob(f"{message}, and {name} is {describe_output(tensor)}; {_ADVICE}")
        if not tensor.numel() or tensor.is_complex() or tensor.is_quantized or tensor.layout != torch.strided:
            raise InvalidJob(f"{message} of plain numbers, and {name} is {describe_output(tensor)}; {_ADVICE}")
        value_type = pa.from_numpy_dtype(widen_half_precision(tensor[:0]).cpu().numpy().dtype)
        return cls(name, tuple(tensor.shape[1:]), value_type)

    @property
    def field(self) -> pa.Field:
        data_type = pa.list_(self.value_type, prod(self.shape)) if self.shape else self.value_type
        return pa.field(self.name, data_type, metadata={"shape": json.dumps(self.shape)})

    @property
    def row_bytes(self) -> int:
        bit_width: int = self.value_type.bit_width
        return prod(self.shape) * max(1, bit_width // 8) + 1

    def build(self, tensor: torch.Tensor, null_rows: Mask) -> pa.Array:
        """Build the column from a tensor on the host."""
        if self.shape:
            return build_vector_column(tensor, null_rows)
        return pa.array(tensor.contiguous().numpy(), self.value_type, mask=null_rows)


@dataclass(frozen=True)
class _RawPostprocess(Postprocess):
    structure: OutputStructure
    tensor_columns: tuple[_TensorColumn, ...]
    allow_nan: bool

    @property
    def fields(self) -> list[pa.Field]:
        return [column.field for column in self.tensor_columns]

    def on_device(self, output: Any) -> dict[str, torch.Tensor]:
        """Take the output apart into its tensors, see `pack_parts`."""
        parts = self.structure.flatten(output)
        for part, column in zip(parts, self.tensor_columns, strict=True):
            check_row_shape(part, column.shape)
        return pack_parts(parts)

    def columns(self, tensors: dict[str, torch.Tensor], geometries: Sequence[ImageGeometry]) -> list[pa.Array]:  # noqa: ARG002
        null_rows = self.null_rows(tensors)
        parts = zip(self.tensor_columns, unpack_parts(tensors), strict=True)
        return [column.build(part, null_rows) for column, part in parts]
