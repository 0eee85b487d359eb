"""Functions by value: everything that a function of a script uses, as a digest for the plan and pickled for workers."""

from __future__ import annotations

import dis
import hashlib
import importlib.util
import sys
import sysconfig
from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from functools import cached_property
from pathlib import Path
from types import BuiltinFunctionType, CodeType, FunctionType, MethodType, ModuleType
from typing import Any

from batchjob.errors import InvalidJob
from batchjob.functions.function_target import FunctionTarget, ModuleTarget, pickle_by_value
from batchjob.functions.source_text import NoSource, is_made_by_dataclass, read_class_source, read_function_source
from batchjob.functions.value_text import MAIN_MODULES, UnknownValue, ValueWriter, shorten_value
from batchjob.text import with_article

__all__ = ["ListSources", "capture_target"]

ListSources = Callable[[str, Path], Sequence[Path]]
"""Function that returns the files of a target's module and of all modules that it imports from a folder."""

_MAX_PICKLED_BYTES = 16 << 20
_DIGITS = 32  # of a SHA-256, so that a line of differences shows both
_INSTALLED = ("site-packages", "dist-packages")
_GLOBAL_NAMES = {"LOAD_GLOBAL", "LOAD_NAME"}


def capture_target(value: Any, list_sources: ListSources) -> ModuleTarget | FunctionTarget:
    """Return the target for a function, class or callable object.

    One that a module beside the script holds is kept by its name, so that workers import it anew. Any other (of the
    script itself, of a notebook, made by another function) is kept by value.

    Args:
        value: The function.
        list_sources: Lists the sources of a module beside the script.

    Raises:
        ValueError: It cannot be kept: its source cannot be read, or what it captures cannot be digested or pickled.
    """
    name = _find_name(value)
    if name is not None and (folder := _find_own_folder(name[0])) is not None:
        target = ModuleTarget(":".join(name))
        target.folder = folder
        return target
    label = ":".join(name or (str(getattr(value, "__module__", "__main__")), _get_label(value)))
    capture = _Capture(list_sources)
    try:
        text = capture.describe(value)
    except NoSource as error:
        raise ValueError(f"{label} cannot be kept, because {error}; put it into a module and import it") from error
    if not isinstance(value, type | FunctionType):
        capture.values["object"] = shorten_value(value, text)
    found = FunctionTarget.make(label, capture.code, capture.values, _pickle(value, label))
    found.folder = next(iter(capture.folders)) if len(capture.folders) == 1 else None
    return found


def _pickle(value: Any, label: str) -> bytes:
    try:
        pickled = pickle_by_value(value)
    except Exception as error:  # pickling runs code of the objects in it
        reason = " ".join(str(error).split())[:200]
        raise ValueError(
            f"{label} cannot be sent to workers ({type(error).__name__}: {reason}); put it into a module and import it"
        ) from error
    if len(pickled) > _MAX_PICKLED_BYTES:
        raise ValueError(
            f"{label} has {len(pickled) >> 20:,} MiB with the values that it captures, over the limit of "
            f"{_MAX_PICKLED_BYTES >> 20} MiB; read large values from a file, inside the function"
        )
    return pickled


def _get_label(value: Any) -> str:
    name = getattr(value, "__qualname__", None)
    return name if isinstance(name, str) else type(value).__qualname__


def _find_name(value: Any) -> tuple[str, str] | None:
    """Return module and name by which any process can import a function or class; None if there are none."""
    module, name = getattr(value, "__module__", None), getattr(value, "__qualname__", None)
    if not isinstance(module, str) or not isinstance(name, str) or module in MAIN_MODULES:
        return None
    found: Any = sys.modules.get(module)
    for part in name.split("."):
        found = getattr(found, part, None)
    return (module, name) if found is value else None


def _find_own_folder(module_name: str) -> Path | None:
    """Return the folder in which a module of the user lies; None for installed ones and those without a source.

    Example: for `nets.small` in `/home/ann/nets/small.py` it is `/home/ann`.
    """
    file = getattr(sys.modules.get(module_name), "__file__", None) or _find_origin(module_name)
    if not file or module_name.partition(".")[0] == __name__.partition(".")[0] or _is_installed(file):
        return None
    path = Path(file).absolute()
    names = module_name.split(".")
    parts = [*names, "__init__.py"] if path.name == "__init__.py" else [*names[:-1], f"{names[-1]}.py"]
    return path.parents[len(parts) - 1] if path.parts[-len(parts) :] == tuple(parts) else None


def _find_origin(module_name: str) -> str | None:
    """Return the file of a module that is not imported yet; None for one in a package, whose import would run it."""
    if "." in module_name:
        return None
    try:
        spec = importlib.util.find_spec(module_name)
    except (ImportError, ValueError):
        return None
    return spec.origin if spec is not None and spec.has_location else None


def _is_installed(file: str) -> bool:
    path = Path(file).absolute()
    return bool(set(path.parts) & set(_INSTALLED)) or path.is_relative_to(sysconfig.get_path("stdlib"))


class _Capture:
    """Walk through all that a function uses.

    Args:
        list_sources: Lists the sources of a module beside the script.

    Attributes:
        code: SHA-256 of the sources found, by name of the function or class, or path of the module.
        values: Captured values found, by name.
        folders: Folders of the modules found beside the script.
    """

    def __init__(self, list_sources: ListSources) -> None:
        self.code: dict[str, str] = {}
        self.values: dict[str, str] = {}
        self.folders: set[Path] = set()
        self._modules: set[str] = set()
        self._list_sources = list_sources
        self._seen: set[int] = set()

    @cached_property
    def _writer(self) -> ValueWriter:
        return ValueWriter(self.describe_code)

    def describe(self, value: Any) -> str:
        """Return a text of a value that is the same in every process, with all that belongs to it.

        Raises:
            NoSource: The source of a function or class cannot be read.
            UnknownValue: There is no such text.
        """
        return self._writer.write(value)

    def describe_code(self, value: Any) -> str | None:
        """Return the text of a function, class or module, and note its code; None for any other value."""
        match value:
            case ModuleType():
                self._add_module(value.__name__)
                return f"<module {value.__name__}>"
            case MethodType():
                return f"<method {self.describe(value.__self__)}.{self.describe(value.__func__)}>"
            case FunctionType() | type():
                return self._describe_named(value)
            case BuiltinFunctionType() if _find_name(value) is not None:
                return self._describe_named(value)
        return None

    def _describe_named(self, value: Any) -> str:
        if (name := _find_name(value)) is not None:
            self._add_module(name[0])
            return f"<{':'.join(name)}>"
        if id(value) not in self._seen:
            self._seen.add(id(value))
            if isinstance(value, FunctionType):
                self._add_function(value)
            else:
                source = read_class_source(value)
                self._add_code(value.__qualname__, source)
                self._add_members(value, source)
        return f"<{value.__qualname__}>"

    def _add_code(self, name: str, source: str) -> None:
        digest = _digest(source.encode())
        # Two functions may have one name, such as two lambdas.
        known = self.code.get(name)
        self.code[name] = digest if known is None else _digest(f"{known} {digest}".encode())

    def _add_function(self, function: FunctionType, class_source: str = "") -> None:
        """Note the source of a function, unless it stands in its class, and what it uses from outside."""
        if _is_installed(function.__code__.co_filename):
            # A decorator of a package, such as `torch.no_grad()`, around functions of the user.
            for cell in function.__closure__ or ():
                with suppress(ValueError):
                    if isinstance(value := cell.cell_contents, FunctionType | type):
                        self.describe(value)
            return
        source = read_function_source(function)
        if source not in class_source:
            self._add_code(function.__qualname__, source)
        self._add_captured(function)

    def _add_module(self, name: str) -> None:
        """Note the sources of a module beside the script, and of all that it imports there."""
        folder = _find_own_folder(name) or _find_own_folder(name.partition(".")[0])
        if folder is None or name in self._modules:
            return
        self._modules.add(name)
        self.folders.add(folder)
        for path in self._list_sources(f"{name}:*", folder):
            self.code[path.relative_to(folder).as_posix()] = _digest(path.read_bytes())

    def _add_captured(self, function: FunctionType) -> None:
        """Note what a function uses from outside: globals, closure, defaults, its own attributes, and imports."""
        for name in sorted(set(_list_imported_names(function.__code__))):
            with suppress(InvalidJob):  # A name in a module, and no module.
                self._add_module(name)
        for name in sorted(set(_list_global_names(function.__code__))):
            if name in function.__globals__:
                self._add_value(name, function.__globals__[name])
        for name, cell in zip(function.__code__.co_freevars, function.__closure__ or (), strict=True):
            try:
                value = cell.cell_contents
            except ValueError:  # It has no value yet.
                continue
            self._add_value(f"{function.__qualname__}.{name}", value)
        for name, value in (("defaults", function.__defaults__), ("kwdefaults", function.__kwdefaults__)):
            if value:
                self._add_value(f"{function.__qualname__}.{name}", value)
        attributes = {name: value for name, value in vars(function).items() if name != "__wrapped__"}
        if attributes:
            self._add_value(f"{function.__qualname__}.attributes", attributes)

    def _add_members(self, owner: type, source: str) -> None:
        """Note the bases of a class, and what its methods and attributes use from outside."""
        for base in owner.__bases__:
            self.describe(base)
        for name, value in vars(owner).items():
            for function in _list_functions(value):
                if _find_name(function) is not None:
                    self.describe(function)
                # The methods of a named tuple are of a module that there is not.
                elif function.__module__ in sys.modules and not is_made_by_dataclass(function, owner):
                    self._add_function(function, source)
            is_plain = not name.startswith("__") and not hasattr(type(value), "__get__")
            if is_plain and name != "_abc_impl" and not hasattr(owner, "__members__"):
                self._add_value(f"{owner.__qualname__}.{name}", value)

    def _add_value(self, name: str, value: Any) -> None:
        try:
            text = self.describe(value)
        except UnknownValue as error:
            raise ValueError(
                f"uses {name}, {with_article(type(value).__name__)}, of which nobody can tell whether it is the same "
                f"in the next run ({error}); make it inside the function, or put the function into a module and "
                "import it"
            ) from error
        if self.describe_code(value) is None:
            self.values[name] = shorten_value(value, text)


def _digest(source: bytes) -> str:
    return hashlib.sha256(source).hexdigest()[:_DIGITS]


def _list_global_names(code: CodeType) -> Iterator[str]:
    """Yield the global names that a code object reads, also those of functions and classes inside it."""
    for instruction in dis.get_instructions(code):
        if instruction.opname in _GLOBAL_NAMES:
            yield instruction.argval
    for constant in code.co_consts:
        if isinstance(constant, CodeType):
            yield from _list_global_names(constant)


def _list_imported_names(code: CodeType) -> Iterator[str]:
    """Yield the names that a code object imports and that may be modules, also those of functions inside it.

    Example: `from pkg import net` yields `pkg` and `pkg.net`.
    """
    module = ""
    for instruction in dis.get_instructions(code):
        if instruction.opname == "IMPORT_NAME":
            module = instruction.argval
            yield module
        elif instruction.opname == "IMPORT_FROM":
            yield f"{module}.{instruction.argval}"
    for constant in code.co_consts:
        if isinstance(constant, CodeType):
            yield from _list_imported_names(constant)


def _list_functions(member: Any) -> Iterator[FunctionType]:
    """Yield the functions that a member of a class consists of, such as those of a property."""
    parts = [member, *(getattr(member, name, None) for name in ("__func__", "fget", "fset", "fdel", "func"))]
    yield from (part for part in parts if isinstance(part, FunctionType))
