"""The strict, frozen form of everything a job file may say, and the two string types with rules: `Uri`, `Target`."""

from __future__ import annotations

import os
import re
from pathlib import Path
from typing import Annotated, Any
from urllib.parse import parse_qsl, urlsplit

from pydantic import AfterValidator, BaseModel, BeforeValidator, ConfigDict, ValidationInfo

__all__ = ["CommandLineText", "Settings", "Target", "Uri", "is_local", "local_path"]

_SCHEME = re.compile(r"^[A-Za-z][A-Za-z0-9+.-]*://")
_SIGNED = {"x-amz-signature", "x-amz-credential", "x-goog-signature", "sig", "signature", "awsaccesskeyid"}
_TARGET = re.compile(r"^[A-Za-z_][\w.]*:[A-Za-z_][\w.]*$")


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
        _refuse_secrets(value)
        return str(value)
    given = None if isinstance(value, CommandLineText) else info.context
    base = Path(given["base"]) if given else Path.cwd()
    folder = "/" if value.endswith("/") else ""
    return os.path.normpath(base / local_path(value).expanduser()) + folder


def _refuse_secrets(uri: str) -> None:
    parts = urlsplit(uri)
    if "@" in parts.netloc and parts.scheme not in {"abfs", "abfss"}:
        raise ValueError("holds credentials before '@'; a job never does: give them through the environment")
    if {key.lower() for key, _ in parse_qsl(parts.query)} & _SIGNED:
        raise ValueError("is a presigned URL; a job never holds a signature: give credentials through the environment")


def _check_target(value: str) -> str:
    if not _TARGET.match(value):
        raise ValueError("must read 'module:attribute', a module beside the job file and a name in it")
    return value


Uri = Annotated[str, BeforeValidator(_resolve)]
"""Where something lies. Relative paths resolve beside the job file, typed ones against the working directory."""

Target = Annotated[str, AfterValidator(_check_target)]
"""`module:attribute`, looked up beside the job file."""
