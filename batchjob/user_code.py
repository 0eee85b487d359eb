"""`module:attribute` beside a job file → the object, without touching the path or the names of anybody else's imports.

Each job folder becomes a package with a private name, so two jobs' `net.py` never mix; `import other` inside such a
module finds the sibling first, as it would for a script, also when it runs later inside a function.
"""

from __future__ import annotations

import ast
import builtins
import difflib
import hashlib
import importlib
import sys
import traceback
from collections.abc import Iterator, Mapping, Sequence
from importlib.machinery import (
    EXTENSION_SUFFIXES,
    SOURCE_SUFFIXES,
    ExtensionFileLoader,
    FileFinder,
    ModuleSpec,
    SourceFileLoader,
)
from pathlib import Path
from threading import Lock
from types import ModuleType
from typing import Any

from batchjob.errors import InvalidJob

__all__ = ["is_user_module", "load_target", "source_digest"]

_PREFIX = "_batchjob_folder_"
_lock = Lock()


def load_target(target: str, base: Path) -> Any:
    """What `module:attribute` names, the module taken from the folder `base` and nowhere else.

    Loaded once per process and folder; works in any process that sees the folder.

    Raises:
        InvalidJob: no such module or attribute (with what there is), or the module fails to load.
    """
    name, _, attribute = target.partition(":")
    path = _source(base, name)
    if path is None:
        raise InvalidJob(
            f"{base / name.replace('.', '/')}.py: not there, for '{target}'; {_offer(name, _modules(base))}"
        )
    module = _load(name, base, path)
    found: Any = module
    for part in attribute.split("."):
        if not hasattr(found, part):
            public = [known for known in vars(found) if not known.startswith("_")] if hasattr(found, "__dict__") else []
            raise InvalidJob(f"{path}: has no '{attribute}', for '{target}'; {_offer(part, public)}")
        found = getattr(found, part)
    return found


def is_user_module(module: str, base: Path) -> bool:
    """Whether a dotted module lies in the folder `base`."""
    return _source(base, module) is not None


def source_digest(target: str, base: Path) -> str:
    """sha256 over the sources of the target's module and of all it imports, directly or not, from the same folder.

    Raises:
        InvalidJob: no such module, or a source that cannot be parsed.
    """
    name = target.partition(":")[0]
    if _source(base, name) is None:
        raise InvalidJob(
            f"{base / name.replace('.', '/')}.py: not there, for '{target}'; {_offer(name, _modules(base))}"
        )
    digest = hashlib.sha256()
    for path in sorted(_closure(name, base)):
        source = path.read_bytes()
        digest.update(f"{path.relative_to(base).as_posix()} {len(source)}\n".encode())
        digest.update(source)
    return digest.hexdigest()


def _load(name: str, base: Path, path: Path) -> ModuleType:
    package = _package(base)
    try:
        return importlib.import_module(f"{package}.{name}")
    except InvalidJob:
        raise
    except Exception as error:
        folder = base.resolve()
        places = [
            frame for frame in traceback.extract_tb(error.__traceback__) if Path(frame.filename).is_relative_to(folder)
        ]
        where = f"{places[-1].filename}:{places[-1].lineno}" if places else str(path)
        raise InvalidJob(f"{where}: does not load: {type(error).__name__}: {error}") from error


def _package(base: Path) -> str:
    """The private package that stands for a folder; made on first use."""
    folder = str(base.resolve())
    name = _PREFIX + hashlib.sha256(folder.encode("utf-8", "surrogateescape")).hexdigest()[:16]
    with _lock:
        if not any(isinstance(finder, _UserModuleFinder) for finder in sys.meta_path):
            sys.meta_path.insert(0, _UserModuleFinder())
        if name not in sys.modules:
            package = ModuleType(name, f"Modules of {folder}")
            package.__path__ = [folder]
            sys.modules[name] = package
    return name


class _UserModuleFinder:
    """Finds modules below the private packages, and nothing else."""

    def find_spec(self, name: str, path: Sequence[str] | None, target: ModuleType | None = None) -> ModuleSpec | None:
        if not name.startswith(_PREFIX):
            return None
        loaders = [(ExtensionFileLoader, EXTENSION_SUFFIXES), (_UserModuleLoader, SOURCE_SUFFIXES)]
        for folder in path or ():
            # A fresh finder: one that is kept would not see a file written within its folder's clock tick.
            spec = FileFinder(folder, *loaders).find_spec(name, target)
            if spec is not None and spec.loader is not None:
                return spec
        return None


class _UserModuleLoader(SourceFileLoader):
    """Gives a module an `import` of its own, which looks beside it first."""

    def exec_module(self, module: ModuleType) -> None:
        package = module.__name__.partition(".")[0]
        vars(module)["__builtins__"] = {**vars(builtins), "__import__": _SiblingFirstImport(package)}
        super().exec_module(module)


class _SiblingFirstImport:
    """`__import__` for the modules of one folder."""

    def __init__(self, package: str) -> None:
        self._package = package
        self._folder = Path(sys.modules[package].__path__[0])

    def __call__(
        self,
        name: str,
        globals: Mapping[str, object] | None = None,
        locals: Mapping[str, object] | None = None,
        fromlist: Sequence[str] | None = (),
        level: int = 0,
    ) -> ModuleType:
        top = name.partition(".")[0]
        if level or _source(self._folder, top) is None:
            return builtins.__import__(name, globals, locals, fromlist or (), level)
        private = f"{self._package}.{name}"
        if fromlist:
            return builtins.__import__(private, globals, locals, fromlist, 0)
        importlib.import_module(private)
        return sys.modules[f"{self._package}.{top}"]


def _source(base: Path, name: str) -> Path | None:
    """The file of a dotted module below `base`: `name.py`, or `name/__init__.py`."""
    stem = base.joinpath(*name.split("."))
    for path in (stem / "__init__.py", stem.with_name(stem.name + ".py")):
        if path.is_file():
            return path
    return None


def _closure(name: str, base: Path) -> set[Path]:
    found: set[Path] = set()
    waiting = [name]
    while waiting:
        name = waiting.pop()
        path = _source(base, name)
        if path is None or path in found:
            continue
        found.add(path)
        waiting += _imported(path, name)
        if "." in name:  # importing a module runs the packages above it
            waiting.append(name.rpartition(".")[0])
    return found


def _imported(path: Path, name: str) -> Iterator[str]:
    """Dotted names that may be modules beside it."""
    try:
        tree = ast.parse(path.read_bytes(), str(path))
    except (SyntaxError, ValueError) as error:
        line = getattr(error, "lineno", None) or 1
        raise InvalidJob(f"{path}:{line}: does not parse: {error.args[0]}; correct it") from error
    above = name.split(".") if path.name == "__init__.py" else name.split(".")[:-1]
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            start = above[: len(above) - node.level + 1] if node.level else []
            parts = [*start, *(node.module.split(".") if node.module else [])]
            yield from (".".join(parts),) if parts else ()
            yield from (".".join([*parts, alias.name]) for alias in node.names)


def _modules(base: Path) -> list[str]:
    if not base.is_dir():
        return []
    packages = (path.parent.name for path in base.glob("*/__init__.py"))
    return sorted({*(path.stem for path in base.glob("*.py")), *packages})


def _offer(wanted: str, known: Sequence[str]) -> str:
    if not known:
        return "there is nothing to choose from"
    near = difflib.get_close_matches(wanted, known, 1)
    if near:
        return f"did you mean '{near[0]}'?"
    return f"there is: {', '.join(sorted(known)[:20])}"
