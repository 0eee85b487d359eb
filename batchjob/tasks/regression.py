"""`type: regression`: one or more numbers for each image, each in a named column."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from math import prod
from typing import TYPE_CHECKING, Any, Literal, Self

import numpy as np
import pyarrow as pa
from pydantic import Field, field_validator, model_validator

from batchjob.errors import InvalidJob
from batchjob.tasks.column_names import ColumnName, check_distinct_names
from batchjob.tasks.ground_truth import ratio
from batchjob.tasks.model_output import require_float_output
from batchjob.tasks.postprocess import EXAMPLE_ROWS, Postprocess
from batchjob.tasks.settings import TaskContext, TaskSettings

if TYPE_CHECKING:
    import torch

    from batchjob.preprocessing.geometry import ImageGeometry

__all__ = ["RegressionTask"]

_ADVICE = "name one output for each number under task.outputs, or wrap the model (model.type: python)"
_SUMS = ("images", "not_finite", "absolute", "squared", "truth", "truth_squared")


class RegressionTask(TaskSettings):
    """Numbers for each image: an age, a price, a pair of coordinates.

    Attributes:
        outputs: Name of each number, which is the name of its column. If the model returns a dict, the keys to take.
        truth: Passthrough column with the true number, or `output: column` for several; `report.json` then has the
            errors. Rows where it is null or NaN do not count.
        allow_nan: True accepts rows that hold NaN or infinity.
    """

    type: Literal["regression"] = "regression"
    outputs: tuple[ColumnName, ...] = Field(default=("value",), min_length=1)
    truth: str | dict[str, str] | None = Field(default=None, min_length=1)
    allow_nan: bool = False

    @field_validator("outputs")
    @classmethod
    def _check_distinct(cls, names: tuple[str, ...]) -> tuple[str, ...]:
        check_distinct_names(names)
        return names

    @model_validator(mode="after")
    def _check_truth_outputs(self) -> Self:
        if isinstance(self.truth, str) and len(self.outputs) > 1:
            raise ValueError(f"truth: there are {len(self.outputs)} outputs; write {{{self.outputs[0]}: column, …}}")
        for name in self._truth_by_output:
            if name not in self.outputs:
                raise ValueError(f"truth: {name!r} is none of the outputs {', '.join(self.outputs)}")
        return self

    @property
    def row_bytes(self) -> int:
        """Bytes of a row's columns."""
        return 5 * len(self.outputs)

    @property
    def truth_columns(self) -> tuple[str, ...]:
        """Columns with the true numbers."""
        return tuple(dict.fromkeys(self._truth_by_output.values()))

    def build_postprocess(self, output: Any, context: TaskContext) -> Postprocess:  # noqa: ARG002
        """Build the postprocess; see `TaskSettings`.

        The output must be `[n, outputs]`, `[n]` if it is one, or a dict of the outputs by name, `[n]` or `[n, 1]` each.
        """
        postprocess = _RegressionPostprocess(self.outputs, self._truth_by_output, self.allow_nan, self.truth_columns)
        expected = _describe_expected(len(self.outputs))
        parts = [require_float_output(part, expected, _ADVICE) for part in postprocess.select_parts(output)]
        shapes = [list(part.shape) for part in parts]
        if sum(prod(shape[1:]) for shape in shapes) != len(self.outputs) or any(len(shape) > 2 for shape in shapes):
            text = ", ".join(map(str, shapes))
            raise InvalidJob(f"the model gives {text} for {EXAMPLE_ROWS} images, but {expected}; {_ADVICE}")
        return postprocess

    def compute_metrics(self, sums: Mapping[str, float]) -> dict[str, Any]:
        """Compute `mean_absolute_error`, `root_mean_squared_error` and `r2` for each output with a `truth` column.

        `images` is the number of images that count; `not_finite` is the number of those left out because `allow_nan`
        accepted a prediction of NaN or infinity. R² is None if all true numbers are equal. A metric over no images, or
        one that no float can hold, is None.
        """
        return {
            name: {"truth": column, **_compute_errors({key: sums.get(f"{name}/{key}", 0) for key in _SUMS})}
            for name, column in self._truth_by_output.items()
        }

    @property
    def _truth_by_output(self) -> dict[str, str]:
        if isinstance(self.truth, str):
            return {self.outputs[0]: self.truth}
        return self.truth or {}

    def _expected_truth_type(self, data_type: pa.DataType) -> str | None:
        numeric = (pa.types.is_integer, pa.types.is_floating, pa.types.is_decimal, pa.types.is_boolean)
        return None if any(is_kind(data_type) for is_kind in numeric) else "numbers, such as float64"


@dataclass(frozen=True)
class _RegressionPostprocess(Postprocess):
    outputs: tuple[str, ...]
    truth_by_output: Mapping[str, str]
    allow_nan: bool
    truth_columns: tuple[str, ...]

    @property
    def fields(self) -> list[pa.Field]:
        return [pa.field(name, pa.float32()) for name in self.outputs]

    def select_parts(self, output: Any) -> list[Any]:
        """Return the tensors that hold the numbers, in the order of their columns."""
        if isinstance(output, Mapping) and all(name in output for name in self.outputs):
            return [output[name] for name in self.outputs]
        return [output]

    def on_device(self, output: Any) -> dict[str, torch.Tensor]:
        """Collect the numbers in `values` float32 `[n, outputs]`, with `finite` bool `[n]`."""
        import torch

        parts = self.select_parts(output)
        values = torch.cat([part.float().reshape(len(part), prod(part.shape[1:])) for part in parts], 1)
        return {"values": values, "finite": values.isfinite().all(dim=1)}

    def columns(self, tensors: dict[str, torch.Tensor], geometries: Sequence[ImageGeometry]) -> list[pa.Array]:  # noqa: ARG002
        null_rows, values = self.null_rows(tensors), tensors["values"].numpy()
        return [pa.array(values[:, index], pa.float32(), mask=null_rows) for index in range(len(self.outputs))]

    def sum_metrics(self, rows: pa.RecordBatch) -> dict[str, float]:
        """Sum errors and true numbers of each output under the keys `<output>/<sum>`, such as `age/squared`."""
        sums: dict[str, float] = {}
        for name, column in self.truth_by_output.items():
            output_sums = _sum_errors(rows.column(name), rows.column(column))
            sums |= {f"{name}/{key}": value for key, value in output_sums.items() if value}
        return sums


def _describe_expected(output_count: int) -> str:
    shape = "[n] or [n, 1]" if output_count == 1 else f"[n, {output_count}]"
    return f"regression with {output_count} output{'s' if output_count > 1 else ''} wants {shape}"


def _sum_errors(predictions: pa.Array, truths: pa.Array) -> dict[str, float]:
    predicted, truth = (
        np.asarray(column.cast(pa.float64()).to_numpy(zero_copy_only=False)) for column in (predictions, truths)
    )
    counted = np.isfinite(truth)
    usable = counted & np.isfinite(predicted)
    error, truth = predicted[usable] - truth[usable], truth[usable]
    with np.errstate(over="ignore"):
        return {
            "images": int(usable.sum()),
            "not_finite": int((counted & ~usable).sum()),
            "absolute": float(abs(error).sum()),
            "squared": float((error**2).sum()),
            "truth": float(truth.sum()),
            "truth_squared": float((truth**2).sum()),
        }


def _compute_errors(sums: Mapping[str, float]) -> dict[str, float | None]:
    images = sums["images"]
    errors: dict[str, float | None] = {
        "mean_absolute_error": ratio(sums["absolute"], images),
        "root_mean_squared_error": math.sqrt(sums["squared"] / images) if images else None,
        "r2": _compute_r2(sums),
    }
    finite = {name: value if value is not None and math.isfinite(value) else None for name, value in errors.items()}
    return {"images": images, "not_finite": sums["not_finite"], **finite}


def _compute_r2(sums: Mapping[str, float]) -> float | None:
    # The sums of squares cancel each other if the mean of the true numbers is a million times their spread. Predictions
    # in float32 then have no digit left to be right in either, so nothing is lost.
    images, squares = sums["images"], sums["truth_squared"]
    spread = squares - sums["truth"] * sums["truth"] / images if images else 0.0
    return 1 - sums["squared"] / spread if spread > images * 1e-15 * squares else None
