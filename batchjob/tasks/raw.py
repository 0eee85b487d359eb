"""`type: raw`: the model's tensors as they are, one fixed-size list a row and tensor."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import pyarrow as pa
from pydantic import Field

from batchjob.errors import InvalidJob
from batchjob.preprocessing.geometry import ImageGeometry
from batchjob.tasks.column_types import check_column_name, check_distinct_names
from batchjob.tasks.postprocess import (
    EXAMPLE_ROWS,
    Postprocess,
    check_row_shape,
    describe_output,
    finite_mask,
    nonfinite_errors,
)
from batchjob.tasks.settings import TaskSettings
from batchjob.types import ErrorRecord

if TYPE_CHECKING:
    import numpy as np
    import torch

    from batchjob.storage.reader import Reader

__all__ = ["RawTask"]

_WANTED = "raw wants a tensor with a row for each image, or a dict or a tuple of such"
_ADVICE = "pick one of several with model.output, or wrap the model so that it returns tensors (model.type: python)"


class RawTask(TaskSettings):
    """The output itself, to be looked at elsewhere.

    One tensor is the column `output`; a dict has one for each key, a tuple `output_0`, `output_1` and so on. A row of
    `[n, a, b]` is a list of `a * b` numbers, row-major; the field's metadata say `shape: [a, b]`. A row of `[n]` is a
    number. float16 and bfloat16 become float32.

    Attributes:
        row_bytes: that a row may take; shards are sized by it, for the model is not known yet then.
        allow_nan: True lets rows pass that hold NaN or infinity.
    """

    type: Literal["raw"] = "raw"
    row_bytes: int = Field(default=65_536, ge=1)
    allow_nan: bool = False

    def build_postprocess(self, output: Any, labels: tuple[str, ...] | None, reader: Reader, base: Path) -> Postprocess:  # noqa: ARG002
        """Looks at one output before work starts.

        Args:
            output: what the model gave for `EXAMPLE_ROWS` images.
            labels: of no use here, nor are `reader` and `base`.

        Raises:
            InvalidJob: it holds something else than tensors of a row for each image, a key that cannot name a column,
                or more bytes than `row_bytes`.
        """
        tensors = {name: _TensorColumn.of(name, part, output) for name, part in _named(output).items()}
        takes = sum(tensor.row_bytes for tensor in tensors.values())
        if takes > self.row_bytes:
            shapes = ", ".join(f"{name} {list(tensor.shape)}" for name, tensor in tensors.items())
            raise InvalidJob(
                f"a row takes {takes:,} bytes ({shapes}), but task.row_bytes is {self.row_bytes:,}; raise it, "
                "which makes shards smaller, or give out less: one of several with model.output, or another task"
            )
        return _RawPostprocess(tuple(tensors.values()), self.allow_nan)


def _named(output: Any) -> dict[str, Any]:
    """The parts of an output by the names of their columns. Raises InvalidJob where it has none."""
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
        return {f"output_{place}": part for place, part in enumerate(output)}
    hint = "return something from its forward(), or " if output is None else ""
    raise InvalidJob(
        f"the model gives {describe_output(output)} for a batch of {EXAMPLE_ROWS}, but {_WANTED}; {hint}{_ADVICE}"
    )


@dataclass(frozen=True)
class _TensorColumn:
    """A column: its name, the shape of a row, the type of its numbers."""

    name: str
    shape: tuple[int, ...]
    kind: pa.DataType

    @classmethod
    def of(cls, name: str, part: Any, output: Any) -> _TensorColumn:
        import torch

        said = f"the model gives {describe_output(output)} for a batch of {EXAMPLE_ROWS}, but {_WANTED}"
        if not isinstance(part, torch.Tensor):
            raise InvalidJob(f"{said}, and {name} is {describe_output(part)}; {_ADVICE}")
        if part.ndim == 0 or part.shape[0] != EXAMPLE_ROWS:
            raise InvalidJob(f"{said}, and {name} is {describe_output(part)}; {_ADVICE}")
        if not part.numel() or part.is_complex() or part.is_quantized or part.layout != torch.strided:
            raise InvalidJob(f"{said} of plain numbers, and {name} is {describe_output(part)}; {_ADVICE}")
        kind = pa.from_numpy_dtype(_plain(part[:0]).cpu().numpy().dtype)
        return cls(name, tuple(part.shape[1:]), kind)

    @property
    def field(self) -> pa.Field:
        kind = pa.list_(self.kind, prod(self.shape)) if self.shape else self.kind
        return pa.field(self.name, kind, metadata={"shape": json.dumps(self.shape)})

    @property
    def row_bytes(self) -> int:
        width: int = self.kind.bit_width
        return prod(self.shape) * max(1, width // 8) + 1

    def column(self, tensor: torch.Tensor, absent: np.ndarray[Any, Any] | None) -> pa.Array:
        flat = tensor.contiguous().view(-1).numpy()
        if not self.shape:
            return pa.array(flat, self.kind, mask=absent)
        mask = None if absent is None else pa.array(absent)
        return pa.FixedSizeListArray.from_arrays(pa.array(flat, self.kind), prod(self.shape), mask=mask)


@dataclass(frozen=True)
class _RawPostprocess:
    tensors: tuple[_TensorColumn, ...]
    allow_nan: bool
    truth_columns: tuple[str, ...] = ()

    @property
    def fields(self) -> list[pa.Field]:
        return [tensor.field for tensor in self.tensors]

    def on_device(self, output: Any) -> dict[str, torch.Tensor]:
        """By place, `0` `[n, numbers of a row]` and so on; `finite` bool `[n]`."""
        import torch

        parts = list(_named(output).values())
        made: dict[str, torch.Tensor] = {}
        finite = torch.ones(len(parts[0]), dtype=torch.bool, device=parts[0].device)
        for place, (part, tensor) in enumerate(zip(parts, self.tensors, strict=True)):
            check_row_shape(part, tensor.shape)
            made[str(place)] = plain = _plain(part).reshape(len(part), prod(tensor.shape))
            if plain.is_floating_point():
                finite &= plain.isfinite().all(dim=1).to(finite.device)
        return made | {"finite": finite}

    def columns(self, tensors: dict[str, torch.Tensor], geometries: Sequence[ImageGeometry]) -> list[pa.Array]:  # noqa: ARG002
        absent = None if self.allow_nan else ~finite_mask(tensors)
        return [tensor.column(tensors[str(place)], absent) for place, tensor in enumerate(self.tensors)]

    def find_errors(self, tensors: dict[str, torch.Tensor]) -> list[ErrorRecord | None]:
        return nonfinite_errors(tensors, self.allow_nan)

    def sum_metrics(self, rows: pa.RecordBatch) -> dict[str, float]:  # noqa: ARG002
        return {}


def _plain(tensor: torch.Tensor) -> torch.Tensor:
    """Half precision as float32, which all readers of Parquet know."""
    import torch

    return tensor.float() if tensor.dtype in {torch.float16, torch.bfloat16} else tensor
