"""`type: python`: columns made by the user's own function or class beside the job file."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import pyarrow as pa
from pydantic import Field, field_validator

from batchjob.arrow_types import check_readable, parse_type
from batchjob.errors import BatchjobError, InvalidJob
from batchjob.settings import Target
from batchjob.tasks.column_names import ColumnName, TypeName, check_column_name, check_distinct_names
from batchjob.tasks.postprocess import Postprocess
from batchjob.tasks.settings import TaskContext, TaskSettings
from batchjob.tasks.user_postprocess import UserFunctions, UserPostprocess, infer_user_structure
from batchjob.text import with_article
from batchjob.user_code import catch_exit, describe_fault, list_argument_files, list_sources, load_target, source_digest

if TYPE_CHECKING:
    from batchjob.storage.reader import Reader

__all__ = ["PythonTask"]


class PythonTask(TaskSettings):
    """Columns made by the user's own code.

    With `fields` here, the target is a function `(output)` or `(output, frames)`. It is called for each batch with the
    model's output on the host: tensors, first dimension n, in the tensor, dict or tuple that the model returned. It
    returns its columns as a dict of n values each (lists, arrays, tensors, Arrow); a single column may be returned
    without the dict. `frames` are the positions of the model's input within the images, one for each image.

    Without `fields`, the target is a class, or a function that returns an object, called once. The object has `fields`
    (a dict of type names, or Arrow fields), `columns(output)` or `columns(output, frames)` like the function above, and
    optionally `on_device(output)`: what is copied to the host in place of the model's output.

    A row whose tensors hold NaN is an error row, and the code does not see it. If the code raises on a batch, it is
    called with one image at a time: the images on which it fails are error rows.

    Attributes:
        target: `module:attribute` beside the job file; in Python also the function or class itself.
        arguments: Keyword arguments of the target.
        fields: Type of each column: `{sharpness: float32, tags: "list<string>"}`.
        row_bytes: Maximum bytes of a row; decides the size of shards.
        allow_nan: True passes rows with NaN or infinity to the code too.
    """

    type: Literal["python"] = "python"
    target: Target
    arguments: dict[str, Any] = Field(default_factory=dict)
    fields: dict[ColumnName, TypeName] | None = Field(default=None, min_length=1)
    row_bytes: int = Field(default=16_384, ge=1)
    allow_nan: bool = False

    @field_validator("fields")
    @classmethod
    def _check_distinct(cls, fields: dict[str, str] | None) -> dict[str, str] | None:
        check_distinct_names(fields or ())
        return fields

    def check(self, reader: Reader, folder: Path) -> None:  # noqa: ARG002
        """Check that the module of the target exists, without running it. Raises InvalidJob."""
        source_digest(self.target, folder)

    def list_files(self, folder: Path) -> list[str]:
        """Return the URIs of the sources of the target, and of the files that its arguments name. Raises InvalidJob."""
        return [*map(str, [*list_sources(self.target, folder), *list_argument_files(self.arguments, folder)])]

    def digest(self, folder: Path) -> str | None:
        """Return the sha256 of the target's module and all it imports from the job's folder. Raises InvalidJob."""
        return source_digest(self.target, folder)

    def build_postprocess(self, output: Any, context: TaskContext) -> Postprocess:
        """Load the user's code and try it on the example batch, and on one image of it; see `TaskSettings`."""
        functions = self._load_functions(load_target(self.target, context.folder), f"task.target: {self.target}")
        copied = functions.run_on_device(output)
        postprocess = UserPostprocess(functions, infer_user_structure(copied, functions), self.allow_nan)
        postprocess.validate_on_example(copied)
        return postprocess

    def _load_functions(self, target: Any, where: str) -> UserFunctions:
        if not callable(target):
            raise InvalidJob(f"{where} is {with_article(type(target).__name__)}; name a function or a class")
        if self.fields is not None:
            fields = tuple(pa.field(name, parse_type(type_name)) for name, type_name in self.fields.items())
            if inspect.isclass(target):
                function = _call_target(target, self.arguments, where)
            else:
                function = partial(target, **self.arguments)
            return UserFunctions(where, fields, _adapt_signature(function, where))
        instance = _call_target(target, self.arguments, where)
        columns = getattr(instance, "columns", None)
        if not callable(columns) or not hasattr(instance, "fields"):
            raise InvalidJob(
                f"{where} made {with_article(type(instance).__name__)} without `fields` and "
                "`columns(output)`; give it both, or, for a function of the output, write task.fields: {name: type}"
            )
        on_device = getattr(instance, "on_device", None)
        columns = _adapt_signature(columns, f"{where}.columns")
        return UserFunctions(where, _parse_fields(instance.fields, where), columns, on_device)


def _call_target(target: Callable[..., Any], arguments: Mapping[str, Any], where: str) -> Any:
    try:
        with catch_exit():
            return target(**arguments)
    except (BatchjobError, MemoryError):
        raise
    except Exception as error:  # the user's code can raise anything
        names = ", ".join(arguments) or "none"
        raise InvalidJob(
            f"{where} cannot be called with task.arguments ({names}): {describe_fault(error)}; correct them, "
            "or, for a plain function of the output, write task.fields: {name: type}"
        ) from error


def _adapt_signature(function: Any, where: str) -> Callable[[Any, Sequence[Any]], Any]:
    """Return the function as one of (output, frames); a function of the output alone gets no frames.

    Example: `f(output)`, `f(output, frames)`, `f(output, scale=2)` and `f(output, *, frames=())` are accepted;
    `f(output, frames, scale)` is not, unless `task.arguments` binds `scale`.
    """
    if not callable(function):
        raise InvalidJob(
            f"{where} makes {with_article(type(function).__name__)} that cannot be called; give it __call__(output)"
        )
    try:
        parameters = inspect.signature(function).parameters.values()
    except (TypeError, ValueError):  # functions written in C have no signature
        return lambda output, frames: function(output)
    positional_kinds = {inspect.Parameter.POSITIONAL_ONLY, inspect.Parameter.POSITIONAL_OR_KEYWORD}
    required = [parameter for parameter in parameters if parameter.default is parameter.empty]
    positional = [parameter for parameter in required if parameter.kind in positional_kinds]
    unbound = [parameter for parameter in required if parameter.kind is parameter.KEYWORD_ONLY]
    if len(positional) == 2 and not unbound:
        return function  # type: ignore[no-any-return]
    if len(positional) == 1 and not unbound:
        if any(parameter.name == "frames" and parameter not in positional for parameter in parameters):
            return lambda output, frames: function(output, frames=frames)
        return lambda output, frames: function(output)
    takes = ", ".join(str(parameter) for parameter in parameters) or "nothing"
    raise InvalidJob(
        f"{where} takes ({takes}), but is called as (output) or (output, frames); write it so, and give what else it "
        "takes under task.arguments"
    )


def _parse_fields(fields: Any, where: str) -> tuple[pa.Field, ...]:
    """Return the `fields` of a user's object as Arrow fields. Raises InvalidJob."""
    try:
        if isinstance(fields, Mapping):
            arrow_fields = [
                pa.field(name, parse_type(data_type) if isinstance(data_type, str) else data_type)
                for name, data_type in fields.items()
            ]
        else:
            arrow_fields = list(fields)
        check_distinct_names(check_column_name(field.name) for field in arrow_fields)
        if not arrow_fields:
            raise ValueError("there are none")
        return tuple(field.with_type(check_readable(field.type)).with_nullable(True) for field in arrow_fields)
    except (AttributeError, TypeError, ValueError) as error:
        raise InvalidJob(
            f"{where}.fields: {error}; give a dict of names and types, such as {{'sharpness': 'float32'}}, or a list "
            "of pyarrow fields"
        ) from error
