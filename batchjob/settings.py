"""The strict, frozen form of everything a job file may say, and the two string types with rules: `Uri`, `Target`."""

from __future__ import annotations

import os
import re
from collections.abc import Iterator, Mapping
from functools import cache
from pathlib import Path
from typing import Annotated, Any, get_args

from pydantic import AfterValidator, BaseModel, BeforeValidator, ConfigDict, ValidationInfo, model_validator

from batchjob.text import explain_uri_secret

__all__ = ["CommandLineText", "Settings", "Target", "Uri", "is_local", "local_path"]

_SCHEME = re.compile(r"^[A-Za-z][A-Za-z0-9+.-]*://")
_TARGET = re.compile(r"[A-Za-z_]\w*(\.[A-Za-z_]\w*)*:[A-Za-z_]\w*(\.[A-Za-z_]\w*)*")


class Settings(BaseModel):
    """Base of all settings: unknown keys are errors, values never change."""

    model_config = ConfigDict(extra="forbid", frozen=True, strict=False)

    @model_validator(mode="before")
    @classmethod
    def _no_switch_for_a_number(cls, data: Any) -> Any:
        """True and false as words where a number is wanted, which refuses words: to Python they are 1 and 0."""
        if not isinstance(data, Mapping):
            return data
        return {name: _in_words(value) if _wants_number(cls, name) else value for name, value in data.items()}


class CommandLineText(str):
    """Text typed on the command line: relative paths in it mean the working directory, not the job's folder."""


def is_local(uri: str) -> bool:
    """True for a plain path or a `file://` URI."""
    return not _SCHEME.match(uri) or uri.startswith("file://")


def local_path(uri: str) -> Path:
    """The path that a local URI names. Plain paths are taken literally: `%20` is not decoded."""
    return Path(uri.removeprefix("file://"))


def _in_words(value: Any) -> Any:
    if isinstance(value, list | tuple):
        return [_in_words(one) for one in value]
    return str(value).lower() if isinstance(value, bool) else value


@cache
def _wants_number(kind: type[Settings], name: str) -> bool:
    wanted = set(_types_in(kind.model_fields[name].annotation)) if name in kind.model_fields else set()
    return bool(wanted & {int, float}) and not wanted & {bool, str}


def _types_in(annotation: Any) -> Iterator[type]:
    """The types that a union is made of; words and limits that stand beside them are none."""
    if isinstance(annotation, type):
        yield annotation
    for part in get_args(annotation):
        yield from _types_in(part)


def _resolve(value: Any, info: ValidationInfo) -> Any:
    if not isinstance(value, str):
        return value
    if not value:
        raise ValueError("is empty")
    if not is_local(value):
        if why := explain_uri_secret(value):
            raise ValueError(why)
        return str(value)
    given = None if isinstance(value, CommandLineText) else info.context
    base = Path(given["base"]) if given else Path.cwd()
    folder = "/" if value.endswith("/") else ""
    return os.path.normpath(base / local_path(value).expanduser()) + folder


def _check_target(value: str) -> str:
    if not _TARGET.fullmatch(value):
        raise ValueError("must read 'module:attribute', a module beside the job file and a name in it")
    return value


Uri = Annotated[str, BeforeValidator(_resolve)]
"""Where something lies. Relative paths resolve beside the job file, typed ones against the working directory."""
Target = Annotated[str, AfterValidator(_check_target)]
"""`module:attribute`, looked up beside the job file."""
