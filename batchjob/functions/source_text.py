"""Source text of functions and classes, also of notebook cells, checked against the code that runs."""

from __future__ import annotations

import ast
import linecache
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from types import CodeType, FunctionType

__all__ = ["NoSource", "is_made_by_dataclass", "read_class_source", "read_function_source"]

# Methods that `dataclass` makes.
_DATACLASS_METHODS = {
    *("__init__", "__repr__", "__eq__", "__lt__", "__le__", "__gt__", "__ge__", "__hash__"),
    *("__setattr__", "__delattr__", "__replace__"),
}
_Definition = ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef


class NoSource(ValueError):
    """The source of a function or class cannot be read, or is not what runs."""


@dataclass(frozen=True)
class _SourceFile:
    """Text of a file or notebook cell, and its syntax tree."""

    text: str
    tree: ast.Module

    def cut(self, first: int, last: int) -> str:
        return "\n".join(self.text.splitlines()[first - 1 : last])


def read_function_source(function: FunctionType) -> str:
    """Return the source of a function with its decorators; of a lambda, every lambda that begins on its line.

    Raises:
        NoSource: There is none (typed at a prompt or given to `python -c`), or the file was changed since.
    """
    code = function.__code__
    source = _open_source(code.co_filename, function.__qualname__)
    _check_is_current(source, code, function.__qualname__)
    if code.co_name == "<lambda>":
        lambdas = [
            node
            for node in ast.walk(source.tree)
            if isinstance(node, ast.Lambda) and node.lineno == code.co_firstlineno
        ]
        if lambdas:
            return "\n".join(ast.get_source_segment(source.text, node) or "" for node in lambdas)
    for node in ast.walk(source.tree):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef) and _find_first_line(node) == code.co_firstlineno:
            return source.cut(code.co_firstlineno, node.end_lineno or node.lineno)
    raise NoSource(f"the source of {function.__qualname__} cannot be found in {code.co_filename}")


def read_class_source(owner: type) -> str:
    """Return the source of a class with its decorators. Raises NoSource as `read_function_source`."""
    methods = [member for member in vars(owner).values() if isinstance(member, FunctionType)]
    own = [method for method in methods if method.__qualname__ == f"{owner.__qualname__}.{method.__name__}"]
    for method in own:
        code = method.__code__
        if not linecache.getlines(code.co_filename):  # Generated, such as the methods of a dataclass.
            continue
        source = _open_source(code.co_filename, owner.__qualname__)
        for node in ast.walk(source.tree):
            if not isinstance(node, ast.ClassDef) or node.name != owner.__name__:
                continue
            if node.lineno <= code.co_firstlineno <= (node.end_lineno or 0):
                _check_is_current(source, code, owner.__qualname__)
                return source.cut(_find_first_line(node), node.end_lineno or node.lineno)
    return _read_class_without_methods(owner)


def _read_class_without_methods(owner: type) -> str:
    import inspect

    try:
        return inspect.getsource(owner)
    except (OSError, TypeError) as error:
        functions = [member for member in vars(owner).values() if isinstance(member, FunctionType)]
        if not all(is_made_by_dataclass(function, owner) for function in functions):
            raise _no_source_error(owner.__qualname__) from error
    # A class of a notebook without methods of its own, such as a dataclass: its fields say all. Their values are
    # captured values.
    names = sorted(name for name in vars(owner) if not name.startswith("__"))
    facts = [getattr(owner, name, None) for name in ("__annotations__", "__dataclass_params__", "__members__")]
    return f"{owner.__qualname__} {names} {facts}"


def is_made_by_dataclass(function: FunctionType, owner: type) -> bool:
    """Return True for a method that the decorator `dataclass` has added to a class."""
    is_theirs = Path(function.__code__.co_filename).name in {"<string>", "dataclasses.py", "reprlib.py"}
    return "__dataclass_fields__" in vars(owner) and function.__name__ in _DATACLASS_METHODS and is_theirs


def _open_source(filename: str, name: str) -> _SourceFile:
    linecache.checkcache(filename)
    text = "".join(linecache.getlines(filename))
    if not text:
        raise _no_source_error(name)
    try:
        return _SourceFile(text, ast.parse(text))
    except (SyntaxError, ValueError) as error:
        raise NoSource(f"the source of {name} in {filename} does not parse") from error


def _no_source_error(name: str) -> NoSource:
    return NoSource(f"{name} has no source that can be read, as at a prompt or in `python -c`")


def _find_first_line(node: _Definition) -> int:
    return min([node.lineno, *(decorator.lineno for decorator in node.decorator_list)])


def _check_is_current(source: _SourceFile, code: CodeType, name: str) -> None:
    """Check that the code that runs is what its file says now. A notebook cell never changes."""
    if code.co_filename.startswith("<"):
        return
    compiled = compile(source.text, code.co_filename, "exec", dont_inherit=True)
    same_place = [
        found
        for found in _walk_code(compiled)
        if found.co_name == code.co_name and found.co_firstlineno == code.co_firstlineno
    ]
    if not any(_is_same_code(found, code) for found in same_place):
        raise NoSource(f"{code.co_filename} was changed since {name} was loaded from it: start the program again")


def _walk_code(code: CodeType) -> Iterator[CodeType]:
    yield code
    for constant in code.co_consts:
        if isinstance(constant, CodeType):
            yield from _walk_code(constant)


def _is_same_code(a: CodeType, b: CodeType) -> bool:
    def constants(code: CodeType) -> list[object]:
        return [repr(constant) for constant in code.co_consts if not isinstance(constant, CodeType)]

    return (a.co_code, a.co_names, a.co_varnames, constants(a)) == (
        b.co_code,
        b.co_names,
        b.co_varnames,
        constants(b),
    )
