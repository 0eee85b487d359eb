"""Packages that only some model formats need."""

from __future__ import annotations

from importlib.util import find_spec

from batchjob.errors import InvalidJob

__all__ = ["require"]


def require(kind: str, extra: str, *packages: str) -> None:
    """Raises InvalidJob where a package is missing that `model.type: kind` needs; imports none of them."""
    missing = [package for package in packages if find_spec(package) is None]
    if missing:
        raise InvalidJob(f"model.type: {kind} needs {' and '.join(missing)}; pip install 'batchjob[{extra}]'")
