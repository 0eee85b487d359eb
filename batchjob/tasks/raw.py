"""`type: raw`: the model's tensors unchanged, one fixed-size list per row and tensor."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
import pyarrow as pa
from pydantic import Field

from batchjob.errors import InvalidJob
from batchjob.tasks.column_types import check_column_name, check_distinct_names
from batchjob.tasks.model_output import check_row_shape, describe_mismatch, describe_output, widen_half_precision
from batchjob.tasks.postprocess import EXAMPLE_ROWS, Postprocess, PostprocessDefaults, finite_mask
from batchjob.tasks.settings import TaskSettings

if TYPE_CHECKING:
    import torch

    from batchjob.preprocessing.geometry import ImageGeometry
    from batchjob.storage.reader import Reader

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

    def build_postprocess(
        self,
        output: Any,
        labels: tuple[str, ...] | None,  # noqa: ARG002
        reader: Reader,  # noqa: ARG002
        folder: Path,  # noqa: ARG002
    ) -> Postprocess:
        """Build the postprocess for a model, from its output for an example batch.

        Args:
            output: Output of the model for `EXAMPLE_ROWS` images.
            labels: Not used.
            reader: Not used.
            folder: Not used.

        Raises:
            InvalidJob: If the output holds anything but tensors with a row for each image, or a key that cannot name a
                column, or more bytes than `row_bytes`.
        """
        columns = [_TensorColumn.of(name, part, output) for name, part in _split_output(output).items()]
        byte_count = sum(column.row_bytes for column in columns)
        if byte_count > self.row_bytes:
            shapes = ", ".join(f"{column.name} {list(column.shape)}" for column in columns)
            raise InvalidJob(
                f"a row takes {byte_count:,} bytes ({shapes}), but task.row_bytes is {self.row_bytes:,}; raise it, "
                "which makes shards smaller, or give out less: one of several with model.output, or another task"
            )
        return _RawPostprocess(tuple(columns), self.allow_nan)


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
        if not isinstance(tensor, torch.Tensor):
            raise InvalidJob(f"{message}, and {name} is {describe_output(tensor)}; {_ADVICE}")
        if tensor.ndim == 0 or tensor.shape[0] != EXAMPLE_ROWS:
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

    def build(self, tensor: torch.Tensor, null_rows: np.ndarray[Any, Any] | None) -> pa.Array:
        """Build the column from a tensor `[n, numbers of a row]` on the host."""
        flat = tensor.contiguous().view(-1).numpy()
        if not self.shape:
            return pa.array(flat, self.value_type, mask=null_rows)
        mask = None if null_rows is None else pa.array(null_rows)
        return pa.FixedSizeListArray.from_arrays(pa.array(flat, self.value_type), prod(self.shape), mask=mask)


@dataclass(frozen=True)
class _RawPostprocess(PostprocessDefaults):
    tensor_columns: tuple[_TensorColumn, ...]
    allow_nan: bool

    @property
    def fields(self) -> list[pa.Field]:
        return [column.field for column in self.tensor_columns]

    def on_device(self, output: Any) -> dict[str, torch.Tensor]:
        """Flatten each tensor to `[n, numbers of a row]`, under its index `0`, `1`, …; with `finite` bool `[n]`."""
        import torch

        parts = list(_split_output(output).values())
        tensors: dict[str, torch.Tensor] = {}
        finite = torch.ones(len(parts[0]), dtype=torch.bool, device=parts[0].device)
        for index, (part, column) in enumerate(zip(parts, self.tensor_columns, strict=True)):
            check_row_shape(part, column.shape)
            flat = widen_half_precision(part).reshape(len(part), prod(column.shape))
            tensors[str(index)] = flat
            if flat.is_floating_point():
                finite &= flat.isfinite().all(dim=1).to(finite.device)
        return tensors | {"finite": finite}

    def columns(self, tensors: dict[str, torch.Tensor], geometries: Sequence[ImageGeometry]) -> list[pa.Array]:  # noqa: ARG002
        null_rows = None if self.allow_nan else ~finite_mask(tensors)
        return [column.build(tensors[str(index)], null_rows) for index, column in enumerate(self.tensor_columns)]


def _split_output(output: Any) -> dict[str, Any]:
    """Return the parts of an output by the names of their columns. Raises InvalidJob if it has none."""
    import torch

    if isinstance(output, torch.Tensor):
        return {"output": output}
    named = output._asdict() if hasattr(output, "_asdict") else output
    if isinstance(named, Mapping) and named:
        parts = {str(key): part for key, part in named.items()}
        try:
            check_distinct_names(map(check_column_name, parts))
        except ValueError as error:
            raise InvalidJob(f"the model gives {describe_output(output)}: {error}; {_ADVICE}") from None
        return parts
    if isinstance(output, tuple | list) and output:
        return {f"output_{index}": part for index, part in enumerate(output)}
    hint = "return something from its forward(), or " if output is None else ""
    raise InvalidJob(f"{describe_mismatch(output, _EXPECTED)}; {hint}{_ADVICE}")
