"""Base of all job settings, strict and frozen; strings with rules: `Uri` and `Target`; `Decision` on a setting."""

from __future__ import annotations

import os
import re
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Self, get_args

from pydantic import (
    AfterValidator,
    BaseModel,
    BeforeValidator,
    ConfigDict,
    ValidationError,
    ValidationInfo,
    ValidatorFunctionWrapHandler,
    WrapValidator,
    model_validator,
)

from batchjob.errors import InvalidJob
from batchjob.functions.capture import capture_target
from batchjob.functions.function_target import FUNCTION_KEY, FunctionTarget, ModuleTarget
from batchjob.setting_errors import invalid_settings_error
from batchjob.system import working_directory
from batchjob.text import explain_uri_secret
from batchjob.uris import (
    expand_home,
    explain_bad_file_uri,
    explain_broken_scheme,
    is_local,
    local_path,
    lower_scheme,
    uri_scheme,
)
from batchjob.user_code import list_sources

__all__ = [
    "Architecture",
    "CommandLineText",
    "Decision",
    "OptionalTarget",
    "Settings",
    "Target",
    "Uri",
    "resolve_path",
]

_TARGET = re.compile(r"[A-Za-z_]\w*(\.[A-Za-z_]\w*)*:[A-Za-z_]\w*(\.[A-Za-z_]\w*)*")


class Settings(BaseModel):
    """Base of all settings: unknown keys are errors, values never change after validation."""

    model_config = ConfigDict(extra="forbid", frozen=True, strict=False)

    def __init__(self, /, **values: Any) -> None:
        try:
            super().__init__(**values)
        except ValidationError as error:
            raise invalid_settings_error(type(self), values, error) from None

    # Pydantic then validates sections of a job file directly, and reports the faults of all of them together.
    __init__.__pydantic_base_init__ = True  # type: ignore[attr-defined]

    if not TYPE_CHECKING:  # mypy would let any attribute be set

        def __setattr__(self, name: str, value: Any) -> None:
            if name in type(self).model_fields:
                raise InvalidJob(f"{type(self).__name__}.{name}: settings never change; build new ones")
            super().__setattr__(name, value)

    def with_values(self, values: Mapping[str, Any]) -> Self:
        """Return the settings with other values in some fields, validated; fields that this class lacks are ignored.

        Raises:
            ValidationError: A value does not fit its field.
        """
        known = {name: value for name, value in values.items() if name in type(self).model_fields}
        return type(self).model_validate(dict(self) | known) if known else self

    @model_validator(mode="before")
    @classmethod
    def _reject_bool_as_number(cls, data: Any) -> Any:
        """Replace booleans by words where a number is expected, so that pydantic refuses them (True is 1)."""
        if not isinstance(data, Mapping):
            return data
        return {name: _bools_as_words(value) if _expects_number(cls, name) else value for name, value in data.items()}


@dataclass(frozen=True)
class Decision:
    """Value found for a setting that the job leaves at `auto`. A plan keeps the value.

    Attributes:
        value: The value, as the job file could say it.
        reason: Reason in words, for people.
    """

    value: str
    reason: str


class CommandLineText(str):
    """Text from the command line: relative paths in it start at the working directory, not at the job's folder."""


def _bools_as_words(value: Any) -> Any:
    if isinstance(value, list | tuple):
        return [_bools_as_words(item) for item in value]
    return str(value).lower() if isinstance(value, bool) else value


@cache
def _expects_number(settings: type[Settings], name: str) -> bool:
    types = set(_types_in(settings.model_fields[name].annotation)) if name in settings.model_fields else set()
    return bool(types & {int, float}) and not types & {bool, str}


def _types_in(annotation: Any) -> Iterator[type]:
    """Yield the types of an annotation and of its union members, without literals and constraints.

    Example: `Annotated[int | Literal["auto"], Field(ge=1)]` yields `int`.
    """
    if isinstance(annotation, type):
        yield annotation
    for part in get_args(annotation):
        yield from _types_in(part)


def resolve_path(path: str, base: Path | None = None) -> Path:
    """Return an absolute path without `.` and `..`, with a home folder at its beginning expanded.

    Args:
        path: Path, or `file:` URI.
        base: Folder in which a relative path starts; None takes the working directory.

    Raises:
        ValueError: The URI names another host, or no path; or the path is probably a bucket's URI with a slash too few.
        InvalidJob: The path is relative, and the working directory has been deleted.
    """
    if reason := explain_bad_file_uri(path):
        raise ValueError(reason)
    expanded = Path(expand_home(str(local_path(path))))
    if expanded.is_absolute():
        return Path(os.path.normpath(expanded))
    resolved = Path(os.path.normpath((base or working_directory()) / expanded))
    if (reason := explain_broken_scheme(path)) and not os.path.lexists(resolved):
        raise ValueError(reason)
    return resolved


def _resolve_uri(value: Any, info: ValidationInfo) -> Any:
    if not isinstance(value, str):
        return value
    if not value:
        raise ValueError("is empty")
    context = None if isinstance(value, CommandLineText) else info.context
    base = Path(context["base"]) if context else None
    if is_local(value):
        path = str(resolve_path(value, base))
        return path + "/" if value.endswith("/") and path != "/" else path
    if reason := explain_uri_secret(value):
        raise ValueError(reason)
    inner, link, archive = lower_scheme(value).rpartition("::")
    if link and archive and not uri_scheme(archive) and not archive.startswith("/"):
        archive = str(resolve_path(archive, base))
    return inner + link + archive


def _validate_target(value: Any, handler: ValidatorFunctionWrapHandler, info: ValidationInfo) -> str:
    """Take a function itself, one from a serialized job, or a text that is checked by `_check_target`."""
    if isinstance(value, FunctionTarget | ModuleTarget):
        return value
    if callable(value):
        return capture_target(value, list_sources)
    functions = (info.context or {}).get("functions")
    # A job file cannot hold a function: it would be code that runs unasked.
    if functions is not None and isinstance(value, Mapping) and FUNCTION_KEY in value:
        return FunctionTarget.from_document(value, functions)
    text: str = handler(value)
    return text


def _check_target(value: str) -> str:
    if not _TARGET.fullmatch(value):
        raise ValueError("must read 'module:attribute', a module beside the job file and a name in it")
    return value


def _check_architecture(value: str) -> str:
    return _check_target(value) if ":" in value else value


Uri = Annotated[str, BeforeValidator(_resolve_uri)]
"""Path or URI. A relative path starts at the job file's folder; from the command line, at the working directory.

`~` and `$HOME` at its beginning are the home folder. A `file:` URI becomes the path that it names.
"""

if TYPE_CHECKING:

    class Target:
        """Field that is set with a text or a function, and read as a text."""

        def __get__(self, settings: Any, owner: Any) -> str: ...

        def __set__(self, settings: Any, value: str | Callable[..., Any]) -> None: ...

    class OptionalTarget:
        """Field that is set with a text, a function or None, and read as a text or None."""

        def __get__(self, settings: Any, owner: Any) -> str | None: ...

        def __set__(self, settings: Any, value: str | Callable[..., Any] | None) -> None: ...

    Architecture = Target

else:
    Target = Annotated[str, AfterValidator(_check_target), WrapValidator(_validate_target)]
    """Name of an attribute of a Python module beside the job file, as `module:attribute`; in Python also a function."""
    OptionalTarget = Target | None
    Architecture = Annotated[str, AfterValidator(_check_architecture), WrapValidator(_validate_target)]
    """Name of a torchvision model, or a target."""
