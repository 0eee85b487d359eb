"""The strict, frozen form of everything a job file may say, and the two string types with rules: `Uri`, `Target`."""

from __future__ import annotations

import os
import re
from pathlib import Path
from typing import Annotated, Any

from pydantic import AfterValidator, BaseModel, BeforeValidator, ConfigDict, ValidationInfo

from batchjob.redaction import secret_in

__all__ = ["CommandLineText", "Settings", "Target", "Uri", "is_local", "local_path"]

_SCHEME = re.compile(r"^[A-Za-z][A-Za-z0-9+.-]*://")
_TARGET = re.compile(r"[A-Za-z_]\w*(\.[A-Za-z_]\w*)*:[A-Za-z_]\w*(\.[A-Za-z_]\w*)*")


class Settings(BaseModel):
    """Base of all settings: unknown keys are errors, values never change."""

    model_config = ConfigDict(extra="forbid", frozen=True, strict=False)


class CommandLineText(str):
    """Text typed on the command line: relative paths in it mean the working directory, not the job's folder."""


def is_local(uri: str) -> bool:
    """True for a plain path or a `file://` URI."""
    return not _SCHEME.match(uri) or uri.startswith("file://")


def local_path(uri: str) -> Path:
    """The path that a local URI names. Plain paths are taken literally: `%20` is not decoded."""
    return Path(uri.removeprefix("file://"))


def _resolve(value: Any, info: ValidationInfo) -> Any:
    if not isinstance(value, str):
        return value
    if not value:
        raise ValueError("is empty")
    if not is_local(value):
        if why := secret_in(value):
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
