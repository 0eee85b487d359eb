"""Modules of a job folder, in a package with a private name, that import each other by plain names.

`sys.path` stays as it is. `import other` in such a module finds the module beside it first, as in a script, also in a
function that runs later.
"""

from __future__ import annotations

import ast
import hashlib
import sys
from collections.abc import Mapping, Sequence
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
from types import CodeType, ModuleType
from typing import Any

__all__ = ["PACKAGE_PREFIX", "ensure_package", "find_source"]

PACKAGE_PREFIX = "_batchjob_folder_"
_PACKAGE_LOCK = Lock()


def find_source(folder: Path, name: str) -> Path | None:
    """Return the file of a dotted module below a folder: `name/__init__.py` or `name.py`."""
    stem = folder.joinpath(*name.split("."))
    for path in (stem / "__init__.py", stem.with_name(stem.name + ".py")):
        if path.is_file():
            return path
    return None


def ensure_package(folder: Path) -> str:
    """Return the name of the private package of a folder, which is created at its first use."""
    path = str(folder.resolve())
    name = PACKAGE_PREFIX + hashlib.sha256(path.encode("utf-8", "surrogateescape")).hexdigest()[:16]
    with _PACKAGE_LOCK:
        if not any(isinstance(finder, _UserModuleFinder) for finder in sys.meta_path):
            sys.meta_path.insert(0, _UserModuleFinder())
        if name not in sys.modules:
            package = ModuleType(name, f"Modules of {path}")
            package.__path__ = [path]
            sys.modules[name] = package
    return name


class _UserModuleFinder:
    """Finder of modules below the private packages, for `sys.meta_path`."""

    def find_spec(self, name: str, path: Sequence[str] | None, target: ModuleType | None = None) -> ModuleSpec | None:
        if not name.startswith(PACKAGE_PREFIX):
            return None
        loaders = [(ExtensionFileLoader, EXTENSION_SUFFIXES), (_UserModuleLoader, SOURCE_SUFFIXES)]
        for folder in path or ():
            # A finder that is kept caches its folder, and misses a file written within the same tick of the clock.
            spec = FileFinder(folder, *loaders).find_spec(name, target)
            if spec is not None and spec.loader is not None:
                return spec
        return None


class _UserModuleLoader(SourceFileLoader):
    """Loader that compiles a module with its imports of modules from the same folder as imports from its package.

    Example: `import blocks` and `from blocks import Stem` become `from _package import blocks` and
    `from _package.blocks import Stem` if `blocks.py` lies in the folder.
    """

    def path_stats(self, path: str) -> Mapping[str, Any]:
        """Keep no bytecode: a program of the user would take it for that of the module as it is written."""
        raise OSError(path)

    def source_to_code(self, data: Any, path: Any, **options: Any) -> CodeType:  # type: ignore[override]
        """Compile a source; see `importlib.abc.InspectLoader.source_to_code`."""
        package = self.name.partition(".")[0]
        tree = _SiblingImports(package).visit(ast.parse(data, path))
        code: CodeType = compile(ast.fix_missing_locations(tree), path, "exec", dont_inherit=True, **options)
        return code


class _SiblingImports(ast.NodeTransformer):
    """Rewrite absolute imports of modules that lie in the folder of a private package."""

    def __init__(self, package: str) -> None:
        self._package = package
        self._folder = Path(sys.modules[package].__path__[0])

    def visit_Import(self, node: ast.Import) -> list[ast.stmt]:
        """Rewrite `import a.b` to `import package.a.b` and `from package import a`, which binds `a`."""
        statements: list[ast.stmt] = []
        for alias in node.names:
            top, _, rest = alias.name.partition(".")
            if not self._is_sibling(top):
                statements.append(ast.Import([alias]))
            elif rest and alias.asname:
                parent, _, last = alias.name.rpartition(".")
                statements.append(ast.ImportFrom(f"{self._package}.{parent}", [ast.alias(last, alias.asname)], 0))
            else:
                if rest:
                    statements.append(ast.Import([ast.alias(f"{self._package}.{alias.name}", self._package)]))
                statements.append(ast.ImportFrom(self._package, [ast.alias(top, alias.asname)], 0))
        return [ast.copy_location(statement, node) for statement in statements]

    def visit_ImportFrom(self, node: ast.ImportFrom) -> ast.ImportFrom:
        """Rewrite `from a import b` to `from package.a import b`."""
        if not node.level and node.module and self._is_sibling(node.module.partition(".")[0]):
            node.module = f"{self._package}.{node.module}"
        return node

    def _is_sibling(self, top: str) -> bool:
        return find_source(self._folder, top) is not None
