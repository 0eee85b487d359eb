"""Postprocess around the user's own code: what the code is called with, and the images on which it fails."""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar

import pyarrow as pa

from batchjob.errors import BatchjobError, InvalidJob
from batchjob.tasks.model_output import describe_output
from batchjob.tasks.output_structure import OutputStructure, infer_structure, pack_parts, unpack_parts
from batchjob.tasks.postprocess import EXAMPLE_ROWS, Postprocess
from batchjob.tasks.user_columns import InvalidColumns, build_user_columns
from batchjob.types import ErrorRecord
from batchjob.user_code import catch_exit, describe_fault, name_fault

if TYPE_CHECKING:
    import torch

    from batchjob.preprocessing.geometry import ImageGeometry

__all__ = ["UserFunctions", "UserPostprocess", "infer_user_structure"]

_log = logging.getLogger(__name__)

_EXPECTED = "your own task wants a tensor with a row for each image, or a dict or a tuple of such"
_ADVICE = "pick one of several with model.output, or give the target an on_device(output) that returns tensors"


@dataclass(frozen=True)
class UserFunctions:
    """Functions of the user's code, ready to be called.

    Attributes:
        where: Name of the code in messages.
        fields: Columns that it fills.
        columns: Function of the output on the host and the images' geometries; returns the columns' values.
        on_device: Function of the model's output; returns what is copied to the host. None copies the whole output.
    """

    where: str
    fields: tuple[pa.Field, ...]
    columns: Callable[[Any, Sequence[ImageGeometry]], Any]
    on_device: Callable[[Any], Any] | None = None

    def run_on_device(self, output: Any) -> Any:
        """Return the part of an example output that is copied to the host. Raises InvalidJob if `on_device` raises."""
        if self.on_device is None or output is None:
            return output
        try:
            with catch_exit():
                return self.on_device(output)
        except (BatchjobError, MemoryError):
            raise
        except Exception as error:  # the user's code can raise anything
            message = f"on_device raised {describe_fault(error)} on {describe_output(output)}"
            raise InvalidJob(f"{self.where}: {message}; correct it") from error


def infer_user_structure(output: Any, functions: UserFunctions) -> OutputStructure:
    """Infer the structure of what is copied to the host from an example.

    Args:
        output: Output for `EXAMPLE_ROWS` images.
        functions: The user's functions; `on_device` may have made the output.

    Raises:
        InvalidJob: If the output holds anything but tensors with a row for each image.
    """
    import torch

    from_model = functions.on_device is None or output is None
    source = "the model gives" if from_model else f"{functions.where}: on_device returns"
    message = f"{source} {describe_output(output)} for a batch of {EXAMPLE_ROWS}, but {_EXPECTED}"
    structure = infer_structure(output, message, _ADVICE)
    for part in structure.flatten(output):
        if not isinstance(part, torch.Tensor) or part.ndim == 0 or len(part) != EXAMPLE_ROWS:
            raise InvalidJob(f"{message}; {_ADVICE}")
    return structure


class _UnknownColumns(dict[str, Any]):
    """Passthrough columns of the example batch: every value is None, and `are_read` tells if one was asked for."""

    are_read = False

    def __missing__(self, key: str) -> None:
        self.are_read = True

    def get(self, key: str, default: Any = None) -> Any:  # noqa: ARG002
        self.are_read = True
        return default


class UserPostprocess(Postprocess):
    """Postprocess that calls the user's code.

    Args:
        functions: The user's functions.
        structure: Structure of what is copied to the host.
        allow_nan: True passes rows that are not finite to the code.
    """

    names_images: ClassVar[bool] = True

    def __init__(self, functions: UserFunctions, structure: OutputStructure, allow_nan: bool) -> None:
        self._functions, self._structure, self.allow_nan = functions, structure, allow_nan
        # The tensors of the last batch, and the errors of the user's code on them, for find_errors.
        self._last_batch: tuple[object, list[ErrorRecord | None]] = (None, [])

    @property
    def fields(self) -> list[pa.Field]:
        return list(self._functions.fields)

    def validate_on_example(self, copied: Any) -> None:
        """Run the code on the example batch and on its first image.

        Args:
            copied: What is copied to the host, for `EXAMPLE_ROWS` images.

        Raises:
            InvalidJob: If the code raises, or returns something else than it declares.
        """
        import torch

        from batchjob.preprocessing.geometry import ImageGeometry

        parts = unpack_parts(pack_parts([part.detach().cpu() for part in self._structure.flatten(copied)]))
        for row_count in (EXAMPLE_ROWS, 1):
            columns = _UnknownColumns()
            geometries = [ImageGeometry(224, 224, 224, 224, passthrough=columns)] * row_count
            try:
                with torch.inference_mode():
                    self._call([part[:row_count] for part in parts], geometries)
            except (BatchjobError, MemoryError):
                raise
            except InvalidColumns as error:
                raise InvalidJob(f"{self._functions.where} {error}") from error
            except Exception as error:  # the user's code can raise anything
                if columns.are_read:  # it may well work with the values of a real image
                    _log.info("%s is not tried: it reads passthrough columns", self._functions.where)
                    return
                message = f"raised {describe_fault(error)} on an example batch of {row_count}"
                raise InvalidJob(f"{self._functions.where} {message}; correct it") from error

    def on_device(self, output: Any) -> dict[str, torch.Tensor]:
        """Take the output apart into tensors, see `pack_parts`."""
        with catch_exit():
            parts = self._structure.flatten(self._functions.on_device(output) if self._functions.on_device else output)
        return pack_parts(parts)

    def columns(self, tensors: dict[str, torch.Tensor], geometries: Sequence[ImageGeometry]) -> list[pa.Array]:
        import torch

        row_count = len(geometries)
        rows = list(range(row_count))
        parts, null_rows = unpack_parts(tensors), self.null_rows(tensors)
        if null_rows.any():
            rows = (~null_rows).nonzero()[0].tolist()
            parts = [part[rows] for part in parts]
        with torch.inference_mode():
            columns, errors = self._call_isolating_errors(parts, [geometries[row] for row in rows])
        if len(rows) < row_count:
            # Rows that the code did not see become null. Example: rows [0, 2] of 3 take the indices [0, null, 1].
            index_by_row = {row: index for index, row in enumerate(rows)}
            indices = pa.array([index_by_row.get(row) for row in range(row_count)], pa.int64())
            columns = [column.take(indices) for column in columns]
        all_errors: list[ErrorRecord | None] = [None] * row_count
        for row, error in zip(rows, errors, strict=True):
            all_errors[row] = error
        self._last_batch = tensors, all_errors
        return columns

    def find_errors(self, tensors: dict[str, torch.Tensor]) -> list[ErrorRecord | None]:
        last_tensors, code_errors = self._last_batch
        errors = super().find_errors(tensors)
        if last_tensors is not tensors:
            return errors
        return [code_error or error for code_error, error in zip(code_errors, errors, strict=True)]

    def _call_isolating_errors(
        self, parts: list[torch.Tensor], geometries: Sequence[ImageGeometry]
    ) -> tuple[list[pa.Array], list[ErrorRecord | None]]:
        """Call the code with a batch; if it fails, with one image at a time, so that only those to blame are lost."""
        row_count = len(geometries)
        if not row_count:
            return self._build_nulls(0), []
        try:
            return self._call(parts, geometries), [None] * row_count
        except (BatchjobError, MemoryError, OSError):
            # No fault of an image: these end the attempt at the shard.
            raise
        except Exception as error:  # noqa: BLE001 - the user's code failed on an image, whose row records it
            if row_count == 1:
                return self._build_nulls(1), [self._record_error(error)]
            if isinstance(error, InvalidColumns):
                message = "%s %s; calling it again with each image of the batch alone, which is slow"
                _log.warning(message, self._functions.where, error)
        results = [
            self._call_isolating_errors([part[row : row + 1] for part in parts], geometries[row : row + 1])
            for row in range(row_count)
        ]
        columns = [pa.concat_arrays(arrays) for arrays in zip(*(columns for columns, _ in results), strict=True)]
        return columns, [error for _, errors in results for error in errors]

    def _call(self, parts: list[torch.Tensor], geometries: Sequence[ImageGeometry]) -> list[pa.Array]:
        with catch_exit():
            returned = self._functions.columns(self._structure.unflatten(parts), geometries)
        return build_user_columns(returned, self._functions.fields, len(geometries))

    def _build_nulls(self, row_count: int) -> list[pa.Array]:
        return [pa.nulls(row_count, field.type) for field in self._functions.fields]

    def _record_error(self, error: Exception) -> ErrorRecord:
        where = self._functions.where
        if isinstance(error, InvalidColumns):
            return ErrorRecord("task", "misfit", f"{where} {error}")
        return ErrorRecord("task", name_fault(error), f"{where} raised {describe_fault(error)}")
