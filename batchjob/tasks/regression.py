"""`type: regression`: one or more numbers for each image, each a column with a name."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, Self

import pyarrow as pa
from pydantic import Field, field_validator, model_validator

from batchjob.errors import InvalidJob
from batchjob.preprocessing.geometry import ImageGeometry
from batchjob.tasks.column_types import ColumnName, check_distinct_names
from batchjob.tasks.ground_truth import ratio
from batchjob.tasks.postprocess import EXAMPLE_ROWS, Postprocess, finite_mask, nonfinite_errors, require_float_output
from batchjob.tasks.settings import TaskSettings
from batchjob.types import ErrorRecord

if TYPE_CHECKING:
    import torch

    from batchjob.storage.reader import Reader

__all__ = ["RegressionTask"]

_ADVICE = "name one output for each number under task.outputs, or wrap the model (model.type: python)"


class RegressionTask(TaskSettings):
    """Numbers for each image: an age, a price, a pair of coordinates.

    Attributes:
        outputs: a name for each number, which its column has. Where the model returns a dict, the keys to take.
        truth: the passthrough column that holds the right number, or `output: column` for several; `report.json` then
            tells the errors. Rows where it is null or NaN do not count.
        allow_nan: True lets rows pass that hold NaN or infinity.
    """

    type: Literal["regression"] = "regression"
    outputs: tuple[ColumnName, ...] = Field(default=("value",), min_length=1)
    truth: str | dict[str, str] | None = Field(default=None, min_length=1)
    allow_nan: bool = False

    @field_validator("outputs")
    @classmethod
    def _once(cls, names: tuple[str, ...]) -> tuple[str, ...]:
        check_distinct_names(names)
        return names

    @model_validator(mode="after")
    def _truth_of_outputs(self) -> Self:
        if isinstance(self.truth, str) and len(self.outputs) > 1:
            raise ValueError(f"truth: there are {len(self.outputs)} outputs; write {{{self.outputs[0]}: column, …}}")
        for name in self._truth_by_output:
            if name not in self.outputs:
                raise ValueError(f"truth: {name!r} is none of the outputs {', '.join(self.outputs)}")
        return self

    @property
    def row_bytes(self) -> int:
        """What a row's columns take."""
        return 5 * len(self.outputs)

    @property
    def truth_columns(self) -> tuple[str, ...]:
        """The columns that hold the right numbers."""
        return tuple(dict.fromkeys(self._truth_by_output.values()))

    def build_postprocess(self, output: Any, labels: tuple[str, ...] | None, reader: Reader, base: Path) -> Postprocess:  # noqa: ARG002
        """Looks at one output before work starts.

        Args:
            output: what the model gave for `EXAMPLE_ROWS` images: `[n, outputs]`, `[n]` where it is one, or a dict of
                the outputs by name, `[n]` or `[n, 1]` each.
            labels: of no use here, nor are `reader` and `base`.

        Raises:
            InvalidJob: the output holds another number of numbers, or none by these names.
        """
        post = _RegressionPostprocess(self.outputs, self._truth_by_output, self.allow_nan)
        wanted = _wanted(len(self.outputs))
        for part in post.parts(output):
            require_float_output(part, wanted, _ADVICE)
        shapes = [list(part.shape) for part in post.parts(output)]
        if sum(prod(shape[1:]) for shape in shapes) != len(self.outputs) or any(len(shape) > 2 for shape in shapes):
            came = ", ".join(map(str, shapes))
            raise InvalidJob(f"the model gives {came} for {EXAMPLE_ROWS} images, but {wanted}; {_ADVICE}")
        return post

    def compute_metrics(self, sums: Mapping[str, float]) -> dict[str, Any]:
        """By output: `truth`, `images`, `mean_absolute_error`, `root_mean_squared_error`, `r2`.

        `images` are those that count; `not_finite` others, whose prediction is NaN or infinite and was let pass. R² is
        None where all truths are alike. So is all that no image has, or that no float can hold.
        """
        return {
            name: {"truth": column, **_errors({key: sums.get(f"{name}/{key}", 0) for key in _SUMS})}
            for name, column in self._truth_by_output.items()
        }

    @property
    def _truth_by_output(self) -> dict[str, str]:
        if isinstance(self.truth, str):
            return {self.outputs[0]: self.truth}
        return self.truth or {}

    def _expected_truth_type(self, kind: pa.DataType) -> str | None:
        numeric = (pa.types.is_integer, pa.types.is_floating, pa.types.is_decimal, pa.types.is_boolean)
        return None if any(test(kind) for test in numeric) else "numbers, such as float64"


_SUMS = ("images", "not_finite", "absolute", "squared", "truth", "truth_squared")


def _wanted(outputs: int) -> str:
    shape = "[n] or [n, 1]" if outputs == 1 else f"[n, {outputs}]"
    return f"regression with {outputs} output{'s' if outputs > 1 else ''} wants {shape}"


def _errors(sums: Mapping[str, float]) -> dict[str, float | None]:
    images = sums["images"]
    told: dict[str, float | None] = {
        "mean_absolute_error": ratio(sums["absolute"], images),
        "root_mean_squared_error": math.sqrt(sums["squared"] / images) if images else None,
        "r2": _r2(sums),
    }
    finite = {name: value if value is not None and math.isfinite(value) else None for name, value in told.items()}
    return {"images": images, "not_finite": sums["not_finite"], **finite}


def _r2(sums: Mapping[str, float]) -> float | None:
    # Sums of squares cancel where the truths' mean is a million times their spread; but then so it is with
    # predictions in float32, which have no digit left to be right in.
    images, squares = sums["images"], sums["truth_squared"]
    spread = squares - sums["truth"] * sums["truth"] / images if images else 0.0
    return 1 - sums["squared"] / spread if spread > images * 1e-15 * squares else None


@dataclass(frozen=True)
class _RegressionPostprocess:
    outputs: tuple[str, ...]
    truth_by_output: Mapping[str, str]
    allow_nan: bool

    @property
    def fields(self) -> list[pa.Field]:
        return [pa.field(name, pa.float32()) for name in self.outputs]

    @property
    def truth_columns(self) -> tuple[str, ...]:
        return tuple(dict.fromkeys(self.truth_by_output.values()))

    def parts(self, output: Any) -> list[Any]:
        """The tensors that hold the numbers, in the order of their columns."""
        if isinstance(output, Mapping) and all(name in output for name in self.outputs):
            return [output[name] for name in self.outputs]
        return [output]

    def on_device(self, output: Any) -> dict[str, torch.Tensor]:
        """`values` float32 `[n, outputs]` and `finite` bool `[n]`."""
        import torch

        values = torch.cat([part.float().reshape(len(part), prod(part.shape[1:])) for part in self.parts(output)], 1)
        return {"values": values, "finite": values.isfinite().all(dim=1)}

    def columns(self, tensors: dict[str, torch.Tensor], geometries: Sequence[ImageGeometry]) -> list[pa.Array]:  # noqa: ARG002
        absent = None if self.allow_nan else ~finite_mask(tensors)
        values = tensors["values"].numpy()
        return [pa.array(values[:, number], pa.float32(), mask=absent) for number in range(len(self.outputs))]

    def find_errors(self, tensors: dict[str, torch.Tensor]) -> list[ErrorRecord | None]:
        return nonfinite_errors(tensors, self.allow_nan)

    def sum_metrics(self, rows: pa.RecordBatch) -> dict[str, float]:
        """By output, `<output>/images` and the sums that `RegressionTask.summary` makes its errors of."""
        sums: dict[str, float] = {}
        for name, column in self.truth_by_output.items():
            found = _sums(rows.column(name), rows.column(column))
            sums |= {f"{name}/{key}": value for key, value in found.items() if value}
        return sums


def _sums(values: pa.Array, truths: pa.Array) -> dict[str, float]:
    import numpy as np

    predicted, right = (
        np.asarray(column.cast(pa.float64()).to_numpy(zero_copy_only=False)) for column in (values, truths)
    )
    counts = np.isfinite(right)
    usable = counts & np.isfinite(predicted)
    error, right = predicted[usable] - right[usable], right[usable]
    with np.errstate(over="ignore"):
        return {
            "images": int(usable.sum()),
            "not_finite": int((counts & ~usable).sum()),
            "absolute": float(abs(error).sum()),
            "squared": float((error**2).sum()),
            "truth": float(right.sum()),
            "truth_squared": float((right**2).sum()),
        }
