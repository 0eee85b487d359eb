"""Text of a captured value that is the same in every process, for digests."""

from __future__ import annotations

import copyreg
import hashlib
import sys
from collections.abc import Callable, Iterator
from enum import Enum
from pathlib import PurePath
from typing import Any

__all__ = ["MAIN_MODULES", "UnknownValue", "ValueWriter", "shorten_value"]

_MAX_TEXT = 60
MAIN_MODULES = {"__main__", "__mp_main__"}
"""Names of the module of a script, which no other process can import."""


class UnknownValue(ValueError):
    """Value of which no process can tell whether it is the same as in another one."""


class ValueWriter:
    """Writer of values as texts. Objects are taken apart as pickle does, down to numbers, texts and arrays.

    Example: `{"size": (8, 8)}` becomes `{'size': (int 8, int 8)}`.

    Args:
        write_code: Returns the text of a function, class or module; None for any other value.
    """

    def __init__(self, write_code: Callable[[Any], str | None]) -> None:
        self._write_code = write_code
        # Objects met in the value at hand, by id: their order of appearance. They are kept, so that no id is used anew.
        self._open: dict[int, tuple[int, Any]] = {}
        self._depth = 0

    def write(self, value: Any) -> str:
        """Return the text of a value.

        Raises:
            UnknownValue: It cannot be taken apart, like a lock or an open file.
        """
        match value:
            case Enum():
                return f"{self._require_code(type(value))}.{value.name}"
            case None | bool() | int() | float() | complex() | str() | bytes() if type(value).__module__ == "builtins":
                return f"{type(value).__name__} {value!r}"
            case PurePath():
                return f"{type(value).__name__} {str(value)!r}"
        if (code := self._write_code(value)) is not None:
            return code
        if id(value) in self._open:
            return f"#{self._open[id(value)][0]}"
        self._open[id(value)] = len(self._open), value
        self._depth += 1
        try:
            return self._write_parts(value)
        finally:
            self._depth -= 1
            if not self._depth:
                self._open.clear()

    def _write_parts(self, value: Any) -> str:
        if type(value) in {list, tuple}:
            return f"{type(value).__name__} [{', '.join(map(self.write, value))}]"
        if type(value) in {set, frozenset}:
            return f"{type(value).__name__} {{{', '.join(sorted(map(self.write, value)))}}}"
        if type(value) is dict:
            return f"{{{', '.join(f'{self.write(key)}: {self.write(item)}' for key, item in value.items())}}}"
        array = _write_array(value)
        return self._write_object(value) if array is None else array

    def _write_object(self, value: Any) -> str:
        reduce = copyreg.dispatch_table.get(type(value))
        try:
            reduced = value.__reduce_ex__(4) if reduce is None else reduce(value)
        except Exception as error:  # an object says so in its own words
            raise UnknownValue(" ".join(str(error).split())[:200] or type(error).__name__) from error
        if isinstance(reduced, str):
            module = getattr(value, "__module__", None)
            # Such as a function behind `lru_cache`, which pickle finds by its name only.
            if module in MAIN_MODULES:
                raise UnknownValue("other processes do not find it by its name in the script")
            return f"<{module}:{reduced}>"
        # Items of a subclass of list or dict are given as iterators.
        parts = [list(part) if isinstance(part, Iterator) else part for part in reduced]
        return f"object [{', '.join(map(self.write, parts))}]"

    def _require_code(self, value: Any) -> str:
        text = self._write_code(value)
        assert text is not None
        return text


def _write_array(value: Any) -> str | None:
    """Return shape, type and digest of a tensor or a NumPy array; None for any other value."""
    torch, numpy = sys.modules.get("torch"), sys.modules.get("numpy")
    if torch is not None and isinstance(value, torch.Tensor):
        try:
            data = value.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().tobytes()
        except (RuntimeError, TypeError, ValueError, NotImplementedError) as error:
            raise UnknownValue(f"a tensor of which the values cannot be read: {error}") from error
        facts = f"{type(value).__name__} {value.dtype} {tuple(value.shape)} {value.requires_grad}"
    elif numpy is not None and isinstance(value, numpy.ndarray) and not value.dtype.hasobject:
        data, facts = value.tobytes(), f"array {value.dtype} {value.shape}"
    else:
        return None
    return f"{facts} {hashlib.sha256(data).hexdigest()}"


def shorten_value(value: Any, text: str) -> str:
    """Return a value as a plan keeps it: a number as it is, anything else by type and digest, for it may be secret.

    Args:
        value: The value.
        text: Its whole text, from `ValueWriter`.
    """
    if _is_number(value) and len(shown := repr(value)) <= _MAX_TEXT:
        return shown
    return f"{type(value).__name__} {hashlib.sha256(text.encode()).hexdigest()[:16]}"


def _is_number(value: Any) -> bool:
    if type(value) in {tuple, list}:
        return all(map(_is_number, value))
    return value is None or type(value) in {bool, int, float}
