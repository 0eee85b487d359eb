"""User's own code: loads `module:attribute` beside a job file, and computes the digest of its sources.

Each job folder becomes a package with a private name, so that modules `net.py` of two jobs never mix.
"""

from __future__ import annotations

import ast
import hashlib
import importlib
import re
import sys
import traceback
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from importlib.machinery import PathFinder
from pathlib import Path
from types import ModuleType
from typing import Any

from batchjob.errors import InvalidJob, extract_cause
from batchjob.functions.function_target import FunctionTarget
from batchjob.functions.loading import mark_loading
from batchjob.text import closest_match
from batchjob.user_modules import PACKAGE_PREFIX, ensure_package, find_source

__all__ = [
    "ExitCalled",
    "catch_exit",
    "describe_fault",
    "enable_unpickling",
    "is_user_module",
    "list_argument_files",
    "list_names",
    "list_sources",
    "load_target",
    "name_fault",
    "source_digest",
]

_MAX_FAULT_TEXT = 300
# Lines of this package in a traceback are not the user's.
_THIS_PACKAGE = Path(__file__).resolve().parent


def load_target(target: str, folder: Path) -> Any:
    """Return the object that `module:attribute` names, from a module in one folder.

    The module is loaded once per process and folder, in any process that can read the folder.

    Example: `load_target("net:Net.build", folder)` returns `Net.build` of `folder/net.py`.

    Args:
        target: Dotted module and dotted attribute, separated by a colon.
        folder: Folder of the job file; no other folder is searched.

    Raises:
        InvalidJob: There is no such module or attribute (the message offers existing ones), or it fails to load.
    """
    if isinstance(target, FunctionTarget):
        return target.load()
    name, _, attribute = target.partition(":")
    path = _require_source(target, name, folder)
    value: Any = _import_module(name, folder, path)
    for part in attribute.split("."):
        if not hasattr(value, part):
            names = vars(value) if hasattr(value, "__dict__") else {}
            public = [known for known in names if not known.startswith("_")]
            raise InvalidJob(f"{path}: has no '{attribute}', for '{target}'; {_suggest(part, public)}")
        value = getattr(value, part)
    return value


def list_names(module: str, folder: Path) -> list[str]:
    """Return the public names of a module in a folder. Raises InvalidJob if it does not load."""
    path = _require_source(module, module, folder)
    return [name for name in vars(_import_module(module, folder, path)) if not name.startswith("_")]


def is_user_module(module: str, folder: Path) -> bool:
    """Return True if a dotted module lies in the folder of a job file."""
    return find_source(folder, module) is not None


def enable_unpickling(folder: Path) -> None:
    """Make the modules of a folder known to this process, so that objects of their classes can be unpickled."""
    ensure_package(folder)


def source_digest(target: str, folder: Path) -> str:
    """Return the sha256 of the target's module and of all modules that it imports, directly or not, from its folder.

    Args:
        target: Dotted module and dotted attribute, separated by a colon.
        folder: Folder of the job file; it is not part of the digest.

    Raises:
        InvalidJob: There is no such module, or a source that cannot be parsed.
    """
    if isinstance(target, FunctionTarget):
        return target.digest
    digest = hashlib.sha256()
    for path in list_sources(target, folder):
        source = _read_source(path)
        digest.update(f"{path.relative_to(folder).as_posix()} {len(source)}\n".encode())
        digest.update(source)
    return digest.hexdigest()


def _read_source(path: Path) -> bytes:
    try:
        return path.read_bytes()
    except OSError as error:
        raise InvalidJob(f"{path}: cannot be read ({error.strerror}); give this user access to it") from error


def list_sources(target: str, folder: Path) -> list[Path]:
    """Return the files of the target's module and of all modules that it imports, directly or not, from its folder.

    Args:
        target: Dotted module and dotted attribute, separated by a colon.
        folder: Folder of the job file; no other folder is searched.

    Raises:
        InvalidJob: There is no such module, or a source that cannot be parsed.
    """
    if isinstance(target, FunctionTarget):
        return []  # Its digest stands in the job itself.
    name = target.partition(":")[0]
    _require_source(target, name, folder)
    return sorted(_imported_sources(name, folder))


def list_argument_files(arguments: Any, folder: Path) -> list[Path]:
    """Return the files that the arguments of user code name, by absolute path or below the job's folder.

    Example: `{"weights": "net.pt", "depth": 3}` gives `[folder/net.pt]` if that file exists.

    Args:
        arguments: Keyword arguments, with lists and mappings of values.
        folder: Folder of the job file.
    """
    if isinstance(arguments, Mapping):
        return [path for value in arguments.values() for path in list_argument_files(value, folder)]
    if isinstance(arguments, list | tuple):
        return [path for value in arguments for path in list_argument_files(value, folder)]
    try:
        path = folder / arguments if isinstance(arguments, str) and arguments else None
        return [path] if path is not None and path.is_file() else []
    except (OSError, ValueError):  # No text that could be a path.
        return []


# -- faults ----------------------------------------------------------------------------------------------------


class ExitCalled(Exception):
    """Call of `sys.exit` or `exit` in the user's code, as an ordinary exception with the traceback of the call."""


@contextmanager
def catch_exit() -> Iterator[None]:
    """Raise `ExitCalled` in place of SystemExit, which would end the process or the thread without a word."""
    try:
        yield
    except SystemExit as error:
        raise ExitCalled(*error.args).with_traceback(error.__traceback__) from None


def name_fault(error: BaseException) -> str:
    """Return the name of an exception's class, `SystemExit` for `ExitCalled`."""
    return "SystemExit" if isinstance(error, ExitCalled) else type(error).__name__


def describe_fault(error: BaseException, *, in_library: bool = False) -> str:
    """Return the type and text of an exception that the user's code raised, and the line of that code.

    Example: `ValueError: it is grey (steps.py:7)`; with `in_library`, for an object of a library that the user
    only configures, `TypeError: pic should be PIL Image or ndarray (torchvision/transforms/functional.py:142)`.

    Args:
        error: Exception with its traceback.
        in_library: Where no line of the user's code is involved, name the innermost line outside this package.
    """
    cause = extract_cause(error)
    text = f"{name_fault(error)}: {' '.join(_name_as_imported(cause).split())[:_MAX_FAULT_TEXT]}".rstrip(": ")
    shadow = _explain_shadow(cause)
    frames = [
        (frame.f_globals, frame.f_code.co_filename, line) for frame, line in traceback.walk_tb(error.__traceback__)
    ]
    own = [(_relative_path(names, path), line) for names, path, line in frames if _is_own_code(names)]
    others = [(path, line) for _, path, line in frames if not Path(path).is_relative_to(_THIS_PACKAGE)]
    places = own or [(path.rpartition("site-packages/")[2], line) for path, line in others if in_library]
    return (f"{text} ({places[-1][0]}:{places[-1][1]})" if places else text) + shadow


def _is_own_code(names: Mapping[str, Any]) -> bool:
    """Return True if these are the global names of a module of a job folder, or of a script that holds a function."""
    return str(names.get("__name__", "")).startswith((PACKAGE_PREFIX, "__main__"))


def _relative_path(names: Mapping[str, Any], path: str) -> str:
    """Return the path of a module below its job folder, as in `blocks/stem.py`."""
    package = sys.modules.get(str(names["__name__"]).partition(".")[0])
    folder = next(iter(getattr(package, "__path__", ())), "")
    return Path(path).relative_to(folder).as_posix() if Path(path).is_relative_to(folder) else Path(path).name


# -- import ----------------------------------------------------------------------------------------------------


def _import_module(name: str, folder: Path, path: Path) -> ModuleType:
    package = ensure_package(folder)
    try:
        with mark_loading(path):
            return importlib.import_module(f"{package}.{name}")
    except InvalidJob:
        raise
    except (Exception, SystemExit) as error:
        # The last line of the user's own code is the one to look at.
        frames = [
            (frame, line) for frame, line in traceback.walk_tb(error.__traceback__) if _is_own_code(frame.f_globals)
        ]
        where = f"{frames[-1][0].f_code.co_filename}:{frames[-1][1]}" if frames else str(path)
        advice = ""
        if isinstance(error, SystemExit):
            advice = "; what parses arguments or ends the process belongs below `if __name__ == '__main__':`"
        text = f"{type(error).__name__}: {error}"
        raise InvalidJob(f"{where}: does not load: {_name_as_imported(text)}{advice}{_explain_shadow(text)}") from error


def _name_as_imported(text: str) -> str:
    """Return a message with the modules of a job folder under the names by which they are imported."""
    return re.sub(rf"{PACKAGE_PREFIX}\w+\.", "", text)


def _explain_shadow(text: str) -> str:
    """Return the end of a message on a fault in a module of the job's folder that hides an installed one.

    Example: a file `torch.py` beside the job, of which `from torch import nn` asks what only the package torch has.
    """
    found = re.search(rf"({PACKAGE_PREFIX}\w+)\.(\w+)", text)
    if found is None:
        return ""
    name, package = found[2], sys.modules.get(found[1])
    path = None if package is None else find_source(Path(package.__path__[0]), name)
    if path is None or not (name in sys.stdlib_module_names or name in sys.modules or PathFinder.find_spec(name)):
        return ""
    return f"; {path} hides the installed module {name}, as in any script beside it: give it another name"


# -- sources ---------------------------------------------------------------------------------------------------


def _require_source(target: str, name: str, folder: Path) -> Path:
    path = find_source(folder, name)
    if path is None:
        raise InvalidJob(
            f"{folder / name.replace('.', '/')}.py: not there, for '{target}'; {_suggest(name, _list_modules(folder))}"
        )
    return path


def _imported_sources(name: str, folder: Path) -> set[Path]:
    """Return the files of a module and of all that it imports, directly or not, from the same folder."""
    sources: set[Path] = set()
    pending = [name]
    while pending:
        name = pending.pop()
        path = find_source(folder, name)
        if path is None or path in sources:
            continue
        sources.add(path)
        pending += _imported_names(path, name)
        # The import of a module runs the packages above it.
        if "." in name:
            pending.append(name.rpartition(".")[0])
    return sources


def _imported_names(path: Path, name: str) -> Iterator[str]:
    """Yield all dotted names that a source imports and that may be modules of its folder.

    Example: in module `pkg.net`, `from .blocks import Block` yields `pkg.blocks` and `pkg.blocks.Block`.
    """
    try:
        tree = ast.parse(_read_source(path), str(path))
    except (SyntaxError, ValueError) as error:
        line = getattr(error, "lineno", None) or 1
        raise InvalidJob(f"{path}:{line}: does not parse: {error.args[0]}; correct it") from error
    package = name.split(".") if path.name == "__init__.py" else name.split(".")[:-1]
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            # Level 1 is the module's own package, level 2 the one above it.
            parent = package[: len(package) - node.level + 1] if node.level else []
            parts = [*parent, *(node.module.split(".") if node.module else [])]
            yield from (".".join(parts),) if parts else ()
            yield from (".".join([*parts, alias.name]) for alias in node.names)


def _list_modules(folder: Path) -> list[str]:
    if not folder.is_dir():
        return []
    packages = (path.parent.name for path in folder.glob("*/__init__.py"))
    return sorted({*(path.stem for path in folder.glob("*.py")), *packages})


def _suggest(name: str, known: Sequence[str]) -> str:
    """Return the end of a message on a wrong name: the most similar one, else the first 20 that exist."""
    if not known:
        return "there is nothing to choose from"
    if (match := closest_match(name, known)) is not None:
        return f"did you mean '{match}'?"
    return f"there is: {', '.join(sorted(known)[:20])}"
