"""Imports of the user's modules that are under way in a thread."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from threading import local

__all__ = ["find_loading_module", "mark_loading"]

_STATE = local()  # `paths`: files of the modules that a thread imports, the innermost last


@contextmanager
def mark_loading(path: Path) -> Iterator[None]:
    """Note that this thread imports a module of the user."""
    _STATE.paths = [*getattr(_STATE, "paths", ()), path]
    try:
        yield
    finally:
        _STATE.paths.pop()


def find_loading_module() -> Path | None:
    """Return the file of the user's module that this thread imports; None if there is none."""
    paths: list[Path] = getattr(_STATE, "paths", [])
    return paths[-1] if paths else None
