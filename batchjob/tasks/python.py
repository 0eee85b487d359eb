"""`type: python`: the user's own function or class beside the job file makes the columns."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import pyarrow as pa
from pydantic import Field, field_validator

from batchjob.errors import BatchjobError, InvalidJob
from batchjob.settings import Target
from batchjob.tasks.column_types import (
    ColumnName,
    TypeName,
    check_column_name,
    check_column_type,
    check_distinct_names,
    parse_arrow_type,
)
from batchjob.tasks.postprocess import Postprocess
from batchjob.tasks.settings import TaskSettings
from batchjob.tasks.user_postprocess import UserFunctions, UserPostprocess, infer_structure
from batchjob.user_code import load_target, source_digest

if TYPE_CHECKING:
    from batchjob.storage.reader import Reader

__all__ = ["PythonTask"]


class PythonTask(TaskSettings):
    """Columns that the user's own code makes.

    With `fields` here, the target is a function `(output)` or `(output, frames)`, called for each batch with the
    model's output on the host: tensors, first dimension n, in the tensor, dict or tuple that the model returned. It
    returns its columns as a dict of n values each (lists, arrays, tensors, Arrow); the values alone where there is one.
    `frames` say, image by image, where the model's input lay in it.

    Without `fields`, the target is a class, or a function that returns an object, called once. The object has `fields`
    (a dict of type names, or Arrow fields), `columns(output)` or `columns(output, frames)` as above, and, if it likes,
    `on_device(output)`: what is carried to the host in place of the model's output.

    A row whose tensors hold NaN is an error row, and the code does not see it. What the code raises on a batch is
    looked for image by image: those on which it fails are error rows.

    Attributes:
        target: `module:attribute` beside the job file.
        arguments: its keyword arguments.
        fields: a type for each column: `{sharpness: float32, tags: "list<string>"}`.
        row_bytes: that a row takes at most; shards are sized by it.
        allow_nan: True shows the code rows with NaN or infinity too.
    """

    type: Literal["python"] = "python"
    target: Target
    arguments: dict[str, Any] = Field(default_factory=dict)
    fields: dict[ColumnName, TypeName] | None = Field(default=None, min_length=1)
    row_bytes: int = Field(default=16_384, ge=1)
    allow_nan: bool = False

    @field_validator("fields")
    @classmethod
    def _once(cls, fields: dict[str, str] | None) -> dict[str, str] | None:
        check_distinct_names(fields or ())
        return fields

    def check(self, reader: Reader, base: Path) -> None:  # noqa: ARG002 - one face for all tasks
        """Looks without torch whether the module is there. Raises InvalidJob."""
        source_digest(self.target, base)

    def digest(self, base: Path) -> str | None:
        """Of the target's module and all it imports from the job's folder. Raises InvalidJob."""
        return source_digest(self.target, base)

    def build_postprocess(self, output: Any, labels: tuple[str, ...] | None, reader: Reader, base: Path) -> Postprocess:  # noqa: ARG002
        """Loads the code and tries it on the example batch, and on one image of it.

        Args:
            output: what the model gave for `EXAMPLE_ROWS` images.
            labels: of no use here, nor is `reader`.
            base: the job's folder.

        Raises:
            InvalidJob: no such code, it raised, or what it returned is not what is declared.
        """
        code = self._code(load_target(self.target, base), f"task.target: {self.target}")
        carried = code.run_on_device(output, base)
        own = UserPostprocess(code, infer_structure(carried, code), self.allow_nan)
        own.validate_on_example(carried, base)
        return own

    def _code(self, found: Any, where: str) -> UserFunctions:
        if not callable(found):
            raise InvalidJob(f"{where} is a {type(found).__name__}; name a function or a class")
        if self.fields is not None:
            fields = tuple(pa.field(name, parse_arrow_type(kind)) for name, kind in self.fields.items())
            if inspect.isclass(found):
                found = _called(found, self.arguments, where)
                return UserFunctions(where, fields, _by_position(found, where))
            return UserFunctions(where, fields, _by_position(partial(found, **self.arguments), where))
        made = _called(found, self.arguments, where)
        columns = getattr(made, "columns", None)
        if not callable(columns) or not hasattr(made, "fields"):
            raise InvalidJob(
                f"{where} made a {type(made).__name__} without `fields` and `columns(output)`; give it both, or, for a "
                "plain function of the output, write task.fields: {name: type}"
            )
        on_device = getattr(made, "on_device", None)
        return UserFunctions(where, _declared(made.fields, where), _by_position(columns, f"{where}.columns"), on_device)


def _called(found: Callable[..., Any], arguments: Mapping[str, Any], where: str) -> Any:
    try:
        return found(**arguments)
    except (BatchjobError, MemoryError):
        raise
    except Exception as error:  # the user's code: anything may come
        given = ", ".join(arguments) or "none"
        raise InvalidJob(
            f"{where} cannot be called with task.arguments ({given}): {type(error).__name__}: {error}; correct them, "
            "or, for a plain function of the output, write task.fields: {name: type}"
        ) from error


def _by_position(function: Any, where: str) -> Callable[[Any, Sequence[Any]], Any]:
    """The function as one of output and frames; those that take the output alone are given no frames."""
    if not callable(function):
        raise InvalidJob(f"{where} makes a {type(function).__name__} that cannot be called; give it __call__(output)")
    try:
        parameters = inspect.signature(function).parameters.values()
    except (TypeError, ValueError):  # written in C
        return lambda output, frames: function(output)
    positional = {inspect.Parameter.POSITIONAL_ONLY, inspect.Parameter.POSITIONAL_OR_KEYWORD}
    open_ones = [one for one in parameters if one.default is one.empty]
    wanted = [one for one in open_ones if one.kind in positional]
    missing = [one.name for one in open_ones if one.kind is one.KEYWORD_ONLY]
    if len(wanted) == 2 and not missing:
        return function  # type: ignore[no-any-return]
    if len(wanted) == 1 and not missing:
        named = any(one.name == "frames" and one not in wanted for one in parameters)
        return lambda output, frames: function(output, frames=frames) if named else function(output)
    takes = ", ".join(str(one) for one in parameters) or "nothing"
    raise InvalidJob(
        f"{where} takes ({takes}), but is called as (output) or (output, frames); write it so, and give what else it "
        "takes under task.arguments"
    )


def _declared(fields: Any, where: str) -> tuple[pa.Field, ...]:
    """The `fields` of an object, as Arrow has them."""
    try:
        if isinstance(fields, Mapping):
            made = [
                pa.field(name, parse_arrow_type(kind) if isinstance(kind, str) else kind)
                for name, kind in fields.items()
            ]
        else:
            made = list(fields)
        check_distinct_names(check_column_name(field.name) for field in made)
        if not made:
            raise ValueError("there are none")
        return tuple(field.with_type(check_column_type(field.type)).with_nullable(True) for field in made)
    except (AttributeError, TypeError, ValueError) as error:
        raise InvalidJob(
            f"{where}.fields: {error}; give a dict of names and types, such as {{'sharpness': 'float32'}}, or a list "
            "of pyarrow fields"
        ) from error
