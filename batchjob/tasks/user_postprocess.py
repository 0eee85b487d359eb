"""Batches through the user's own postprocessing: what it is given, what it returns, and which image it fails on."""

from __future__ import annotations

import logging
import traceback
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pyarrow as pa

from batchjob.errors import BatchjobError, InvalidJob
from batchjob.preprocessing.geometry import ImageGeometry
from batchjob.tasks.column_types import format_arrow_type
from batchjob.tasks.postprocess import EXAMPLE_ROWS, describe_output, finite_mask, nonfinite_errors
from batchjob.types import ErrorRecord

if TYPE_CHECKING:
    import torch

__all__ = ["OutputStructure", "UserFunctions", "UserPostprocess", "infer_structure"]

_log = logging.getLogger(__name__)
_WANTED = "your own task wants a tensor with a row for each image, or a dict or a tuple of such"
_ADVICE = "pick one of several with model.output, or give the target an on_device(output) that returns tensors"


@dataclass(frozen=True)
class UserFunctions:
    """What the user's file holds, ready to be called.

    Attributes:
        where: what messages call it.
        fields: the columns it fills.
        columns: from the output on the host, and the frames, to their values.
        on_device: from the model's output to what is carried to the host; all of it where None.
    """

    where: str
    fields: tuple[pa.Field, ...]
    columns: Callable[[Any, Sequence[ImageGeometry]], Any]
    on_device: Callable[[Any], Any] | None = None

    def run_on_device(self, output: Any, base: Path) -> Any:
        """What is carried to the host of an example output. Raises InvalidJob where `on_device` does."""
        if self.on_device is None or output is None:
            return output
        try:
            return self.on_device(output)
        except (BatchjobError, MemoryError):
            raise
        except Exception as error:  # the user's code: anything may come
            raise InvalidJob(
                f"{self.where}: on_device {_said(error, base)} on {describe_output(output)}; correct it"
            ) from error


@dataclass(frozen=True)
class OutputStructure:
    """How an output is made up of tensors: taken apart to cross to the host, put together again there."""

    flatten: Callable[[Any], list[Any]]
    unflatten: Callable[[list[torch.Tensor]], Any]


def infer_structure(output: Any, code: UserFunctions) -> OutputStructure:
    """Of a tensor, a dict or a tuple of them.

    Args:
        output: for `EXAMPLE_ROWS` images.
        code: whose `on_device` may have made it.

    Raises:
        InvalidJob: it holds something else, or a tensor that has not a row for each image.
    """
    import torch

    if isinstance(output, torch.Tensor):
        made = OutputStructure(lambda whole: [whole], lambda parts: parts[0])
    elif isinstance(output, Mapping) and output:
        keys = list(output)
        made = OutputStructure(
            lambda whole: [whole[key] for key in keys], lambda parts: dict(zip(keys, parts, strict=True))
        )
    elif isinstance(output, tuple | list) and output:
        made = OutputStructure(list, getattr(type(output), "_make", type(output)))
    else:
        made = None
    source = "the model gives" if code.on_device is None or output is None else f"{code.where}: on_device returns"
    said = f"{source} {describe_output(output)} for a batch of {EXAMPLE_ROWS}, but {_WANTED}"
    if made is None:
        hint = "return something from its forward(), or " if output is None else ""
        raise InvalidJob(f"{said}; {hint}{_ADVICE}")
    for part in made.flatten(output):
        if not isinstance(part, torch.Tensor) or part.ndim == 0 or len(part) != EXAMPLE_ROWS:
            raise InvalidJob(f"{said}; {_ADVICE}")
    return made


class _InvalidColumns(ValueError):
    """What the code returned is not what is declared."""


class UserPostprocess:
    """A `Postprocess` made of the user's code.

    Args:
        code: what is called.
        layout: of what is carried to the host.
        allow_nan: whether rows that are not finite are shown to it.
    """

    def __init__(self, code: UserFunctions, layout: OutputStructure, allow_nan: bool) -> None:
        self._code, self._layout, self._allow_nan = code, layout, allow_nan
        self._failed: tuple[object, list[ErrorRecord | None]] = (None, [])  # of the last batch

    @property
    def fields(self) -> list[pa.Field]:
        return list(self._code.fields)

    @property
    def truth_columns(self) -> tuple[str, ...]:
        return ()

    def validate_on_example(self, carried: Any, base: Path) -> None:
        """Run it on the example batch and on its first image. Raises InvalidJob: it raised, or returned a misfit."""
        import torch

        tensors = [part.detach().cpu() for part in self._layout.flatten(carried)]
        for rows in (EXAMPLE_ROWS, 1):
            frames = [ImageGeometry(224, 224, 224, 224)] * rows
            try:
                with torch.inference_mode():
                    self._called([_host(tensor)[:rows] for tensor in tensors], frames)
            except (BatchjobError, MemoryError):
                raise
            except _InvalidColumns as error:
                raise InvalidJob(f"{self._code.where} {error}") from error
            except Exception as error:  # the user's code: anything may come
                said = f"{_said(error, base)} on an example batch of {rows}"
                raise InvalidJob(f"{self._code.where} {said}; correct it") from error

    def on_device(self, output: Any) -> dict[str, torch.Tensor]:
        """By place, `0`, `1` and so on, what is carried; `finite` bool `[n]`."""
        import torch

        parts = self._layout.flatten(self._code.on_device(output) if self._code.on_device else output)
        finite = torch.ones(len(parts[0]), dtype=torch.bool, device=parts[0].device)
        for part in parts:
            if part.is_floating_point() and part.numel():
                finite &= part.isfinite().reshape(len(part), -1).all(dim=1).to(finite.device)
        return {str(place): _host(part) for place, part in enumerate(parts)} | {"finite": finite}

    def columns(self, tensors: dict[str, torch.Tensor], geometries: Sequence[ImageGeometry]) -> list[pa.Array]:
        import torch

        shown = list(range(len(geometries)))
        parts = [tensors[str(place)] for place in range(len(tensors) - 1)]
        if not self._allow_nan and not tensors["finite"].all():
            good = finite_mask(tensors)
            shown = [row for row in shown if good[row]]
            parts = [part[shown] for part in parts]
        with torch.inference_mode():
            columns, failed = self._made(parts, [geometries[row] for row in shown])
        if len(shown) < len(geometries):
            entry = {row: place for place, row in enumerate(shown)}
            back = pa.array([entry.get(row) for row in range(len(geometries))], pa.int64())
            columns = [column.take(back) for column in columns]
        self._failed = tensors, _spread(failed, shown, len(geometries))
        return columns

    def find_errors(self, tensors: dict[str, torch.Tensor]) -> list[ErrorRecord | None]:
        last, failed = self._failed
        found = nonfinite_errors(tensors, self._allow_nan)
        return [own or other for own, other in zip(failed, found, strict=True)] if last is tensors else found

    def sum_metrics(self, rows: pa.RecordBatch) -> dict[str, float]:  # noqa: ARG002
        return {}

    def _made(
        self, parts: list[torch.Tensor], frames: Sequence[ImageGeometry]
    ) -> tuple[list[pa.Array], list[ErrorRecord | None]]:
        """Columns and faults of some images; where the code fails, one by one, so that only those to blame are lost."""
        rows = len(frames)
        if not rows:
            return self._nulls(0), []
        try:
            return self._called(parts, frames), [None] * rows
        except (BatchjobError, MemoryError, OSError):
            raise  # nothing that an image is to blame for: ends the attempt
        except Exception as error:  # noqa: BLE001 - the user's code failed on an image: its row says so
            if rows == 1:
                kind = "misfit" if isinstance(error, _InvalidColumns) else type(error).__name__
                return self._nulls(1), [ErrorRecord("task", kind, f"{self._code.where} {_told(error)}")]
            if isinstance(error, _InvalidColumns):
                _log.warning("%s %s; each image of that batch is asked alone, which is slow", self._code.where, error)
        singly = [self._made([part[row : row + 1] for part in parts], frames[row : row + 1]) for row in range(rows)]
        columns = [pa.concat_arrays(same) for same in zip(*(made for made, _ in singly), strict=True)]
        return columns, [fault for _, failed in singly for fault in failed]

    def _called(self, parts: list[torch.Tensor], frames: Sequence[ImageGeometry]) -> list[pa.Array]:
        returned = self._code.columns(self._layout.unflatten(parts), frames)
        values = self._by_name(returned)
        return [_array(values[field.name], field, len(frames)) for field in self._code.fields]

    def _nulls(self, rows: int) -> list[pa.Array]:
        return [pa.nulls(rows, field.type) for field in self._code.fields]

    def _by_name(self, returned: Any) -> dict[str, Any]:
        names = [field.name for field in self._code.fields]
        if isinstance(returned, pa.RecordBatch | pa.Table):
            returned = dict(zip(returned.column_names, returned.columns, strict=True))
        if isinstance(returned, Mapping):
            if set(returned) == set(names):
                return dict(returned)
            came = ", ".join(map(str, returned)) or "none"
            raise _InvalidColumns(f"returned the columns {came}; declared are {', '.join(names)}")
        if returned is not None and len(names) == 1:
            return {names[0]: returned}
        if isinstance(returned, tuple | list) and len(returned) == len(names):
            return dict(zip(names, returned, strict=True))
        raise _InvalidColumns(
            f"returned {describe_output(returned)}; it must return a dict with the columns {', '.join(names)}"
        )


def _array(values: Any, field: pa.Field, rows: int) -> pa.Array:
    """Values of whatever kind as a column."""
    import torch

    if isinstance(values, torch.Tensor):
        values = _host(values.detach().cpu()).numpy()
    if isinstance(values, str | bytes | Mapping) or not hasattr(values, "__len__") or getattr(values, "ndim", 1) == 0:
        raise _InvalidColumns(f"returned {_kind(values)} as {field.name}; it must give a value for each image")
    if len(values) != rows:
        raise _InvalidColumns(
            f"returned {len(values)} values as {field.name} for {rows} images; it must give one for each"
        )
    try:
        return _arrow(values, field.type)
    except (pa.ArrowException, TypeError, ValueError, OverflowError) as error:
        text = " ".join(str(error).split())
        declared = f"{field.name}, which is declared as {format_arrow_type(field.type)}"
        raise _InvalidColumns(f"returned {_kind(values)} as {declared}: {text}; correct one of the two") from error


def _arrow(values: Any, kind: pa.DataType) -> pa.Array:
    if isinstance(values, pa.ChunkedArray):
        values = values.combine_chunks()
    if isinstance(values, pa.Array):
        return values if values.type == kind else values.cast(kind)
    dimensions = getattr(values, "ndim", 1)
    if dimensions == 1 and hasattr(values, "dtype"):
        return pa.array(values, kind, from_pandas=False)
    return pa.array(values.tolist() if dimensions > 2 else [_plain(value) for value in values], kind)


def _plain(value: Any) -> Any:
    """A value without tensors in it."""
    import torch

    if isinstance(value, torch.Tensor):
        return value.tolist()
    if isinstance(value, Mapping):
        return {key: _plain(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(item) for item in value]
    return value


def _host(tensor: torch.Tensor) -> torch.Tensor:
    """In a type that NumPy knows."""
    import torch

    return tensor.float() if tensor.dtype in {torch.float16, torch.bfloat16} else tensor


def _kind(values: Any) -> str:
    if isinstance(values, pa.Array | pa.ChunkedArray):
        return f"Arrow {values.type}"
    if hasattr(values, "dtype"):
        return f"{values.dtype} {list(getattr(values, 'shape', ()))}"
    return (
        f"a list of {type(values[0]).__name__}"
        if isinstance(values, list | tuple) and values
        else describe_output(values)
    )


def _spread(failed: Sequence[ErrorRecord | None], shown: Sequence[int], rows: int) -> list[ErrorRecord | None]:
    spread: list[ErrorRecord | None] = [None] * rows
    for row, fault in zip(shown, failed, strict=True):
        spread[row] = fault
    return spread


def _told(error: Exception) -> str:
    return str(error) if isinstance(error, _InvalidColumns) else f"raised {_text(error)}"


def _text(error: Exception) -> str:
    return f"{type(error).__name__}: {' '.join(str(error).split())[:500]}".rstrip(": ")


def _said(error: Exception, base: Path) -> str:
    return f"raised {_text(error)}{_place(error, base)}"


def _place(error: Exception, base: Path) -> str:
    """` (net.py:7)`: the last line of the job's folder that it came through."""
    folder = base.resolve()
    frames = traceback.extract_tb(error.__traceback__)
    inside = [frame for frame in frames if Path(frame.filename).is_relative_to(folder)]
    return f" ({Path(inside[-1].filename).name}:{inside[-1].lineno})" if inside else ""
