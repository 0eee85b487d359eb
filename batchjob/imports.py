"""Torchvision without torch's compiler behind it, which takes seconds to import and which few jobs need."""

from __future__ import annotations

import importlib
import sys
from types import ModuleType

__all__ = ["import_torchvision"]

_COMPILER = ("torch._dynamo", "torch._dynamo.utils")


def import_torchvision() -> None:
    """Import torchvision, once a process, before whoever else does.

    `torchvision.ops` imports all of `torch._dynamo` for one function, which it calls where regions of interest are
    aligned deterministically. A stand-in takes that name meanwhile; what is asked of it is answered by the real one.
    """
    importlib.import_module("torch")
    if "torchvision" in sys.modules or _COMPILER[0] in sys.modules:
        return
    sys.modules.update({name: _StandIn(name) for name in _COMPILER})
    try:
        importlib.import_module("torchvision")
    finally:
        _step_aside()


class _StandIn(ModuleType):
    """A module that is imported when something in it is used, and not when it is named."""

    __path__: list[str] = []  # noqa: RUF012 - as of a package, so that the import system looks for submodules

    def is_compile_supported(self, device_type: str) -> bool:
        """What torchvision takes from there."""
        return bool(_real(self.__name__).is_compile_supported(device_type))

    def __getattr__(self, name: str) -> object:
        if name.startswith("__"):  # the import system's own questions
            raise AttributeError(name)
        return getattr(_real(self.__name__), name)


def _real(name: str) -> ModuleType:
    _step_aside()
    return importlib.import_module(name)


def _step_aside() -> None:
    for name in _COMPILER:
        if isinstance(sys.modules.get(name), _StandIn):
            del sys.modules[name]
