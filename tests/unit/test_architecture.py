"""Architecture rules: the import table, light imports, sizes of files and functions, and meaningful names."""

from __future__ import annotations

import ast
import subprocess
import sys
from collections import defaultdict
from collections.abc import Iterator
from pathlib import Path

import pytest

from docs.generate import architecture

ROOT = Path(__file__).parents[2]
PACKAGE = ROOT / "batchjob"

# Every package may import these.
EVERYWHERE = [
    *("arrow_types", "errors", "text", "types", "uris", "settings", "setting_errors", "functions", "concurrency"),
    "system",
]
# Package (or module in batchjob/) -> what else it may import. `package.module` allows that one module only.
IMPORTS: dict[str, list[str]] = {
    "arrow_types": [],
    "errors": [],
    "text": [],
    "types": [],
    "uris": [],
    "settings": ["user_code"],
    "setting_errors": [],
    "functions": [],
    "concurrency": [],
    "system": [],
    "user_code": ["user_modules"],
    "user_modules": [],
    "storage": [],
    "preprocessing": ["user_code"],
    "sources": ["storage", "user_code"],
    "plan": ["storage"],
    "models": ["storage", "preprocessing", "user_code"],
    "tasks": ["storage", "preprocessing", "user_code"],
    "loader": ["storage", "preprocessing"],
    "output": ["storage", "preprocessing.geometry"],
    "job": ["sources", "models", "tasks", "loader.settings", "preprocessing.settings", "storage.options"],
    "inference": ["job", "models", "tasks", "loader", "preprocessing", "storage", "user_code"],
    "worker": ["job", "plan", "loader", "preprocessing", "inference", "output", "storage"],
    "pool": ["job", "worker"],
    "report": ["plan", "output", "storage"],
    "driver": ["job", "sources", "plan", "output", "report", "storage", "pool.pool", "worker.messages"],
    "api": [
        *("job", "sources", "models", "tasks", "loader", "preprocessing", "storage", "plan", "output"),
        *("inference", "worker", "pool", "report", "driver", "user_code"),
    ],
    "bench": [
        *("api", "job", "sources", "models", "tasks", "loader", "preprocessing", "storage", "plan", "output"),
        *("inference", "worker", "pool", "report", "driver", "user_code"),
    ],
    "cli": ["api", "bench", "report", "inference.conversion_options", "job", "driver.progress", "storage", "user_code"],
    "launch": ["api"],
    "__init__": [
        *("api", "job", "report", "sources", "models", "tasks", "loader.settings", "preprocessing.settings"),
        "storage.options",
    ],
    "__main__": ["cli"],
}
# Third-party packages that only these files may import.
ONLY = {
    "ray": ["pool/ray_"],
    "fsspec": ["storage/"],
    "obstore": ["storage/"],
    "boto3": ["storage/"],
    "botocore": ["storage/"],
    "s3fs": ["storage/"],
}
HEAVY = {"torch", "torchvision", "ray"}
# Packages in which one file holds settings and runtime: a job file is read without torch.
LIGHT = ["functions", "models", "tasks", "sources", "plan", "storage", "job", "output", "report", "driver", "cli"]
# Names that do not say what a file or class is.
EMPTY_WORDS = {
    *("utils", "util", "helpers", "helper", "common", "base", "core"),
    *("manager", "handler", "factory", "processor"),
}

MAX_LOOSE_MODULES = 15
MAX_FILES = 20
MANY_FILES = {"models", "tasks", "sources"}  # extension points: one file a kind
MAX_LINES = 400
MAX_FUNCTION_LINES = 60
MAX_FUNCTION_LINES_P90 = 25

FILES = sorted(PACKAGE.rglob("*.py"))
NAMED = sorted(path for tree in ("batchjob", "benchmarks", "jobs", "tests") for path in (ROOT / tree).rglob("*.py"))


def package_of(path: Path) -> str:
    return path.relative_to(PACKAGE).parts[0].removesuffix(".py")


def imported_modules(tree: ast.AST) -> Iterator[str]:
    """Yield the full name of each imported module, with the names that `from batchjob import …` takes."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from (name.name for name in node.names)
        elif isinstance(node, ast.ImportFrom) and node.module == "batchjob":
            yield from (f"batchjob.{name.name}" for name in node.names)
        elif isinstance(node, ast.ImportFrom):
            yield from (f"{node.module}.{name.name}" for name in node.names)


def top_level_imports(tree: ast.Module) -> Iterator[str]:
    """Yield the modules imported when the file is; a block under `if TYPE_CHECKING:` is never run."""
    for node in tree.body:
        if isinstance(node, ast.Import | ast.ImportFrom):
            yield from imported_modules(node)


def is_allowed(importer: str, name: str) -> bool:
    """Return True if a package may import `batchjob.<name>`."""
    package = name.partition(".")[0]
    allowed = [importer, *EVERYWHERE, *IMPORTS[importer]]
    return package in allowed or any(f"{name}.".startswith(f"{one}.") for one in allowed)


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(PACKAGE)))
def test_imports_follow_the_table(path: Path) -> None:
    importer = package_of(path)
    assert importer in IMPORTS, f"{importer}: add it to IMPORTS"
    for full_name in imported_modules(ast.parse(path.read_text())):
        top, _, name = full_name.partition(".")
        if top == "batchjob" and name and name != "__version__":
            assert is_allowed(importer, name), f"{path.relative_to(PACKAGE)} imports {name}: not in its line of IMPORTS"


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(PACKAGE)))
def test_clients_are_imported_where_they_belong(path: Path) -> None:
    relative = path.relative_to(PACKAGE).as_posix()
    for full_name in imported_modules(ast.parse(path.read_text())):
        places = ONLY.get(full_name.partition(".")[0], [""])
        assert any(relative.startswith(place) for place in places), f"{relative} imports {full_name}"


def test_packages_do_not_import_each_other_in_a_cycle() -> None:
    """Follow the imports from each package: the path never comes back to a package that is already on it."""
    below: dict[str, set[str]] = defaultdict(set)
    for path in FILES:
        for full_name in imported_modules(ast.parse(path.read_text())):
            top, _, name = full_name.partition(".")
            if top == "batchjob" and name:
                below[package_of(path)].add(name.partition(".")[0])
    state: dict[str, str] = {}

    def visit(package: str, trail: tuple[str, ...]) -> None:
        assert state.get(package) != "open", f"circle of imports: {' -> '.join([*trail, package])}"
        if state.get(package) is None:
            state[package] = "open"
            for other in sorted(below[package] - {package}):
                visit(other, (*trail, package))
            state[package] = "done"

    for package in sorted(IMPORTS):
        visit(package, ())


@pytest.mark.parametrize(
    "path", [path for path in FILES if package_of(path) in LIGHT], ids=lambda path: str(path.relative_to(PACKAGE))
)
def test_light_packages_import_torch_and_ray_inside_functions(path: Path) -> None:
    heavy = {name for name in top_level_imports(ast.parse(path.read_text())) if name.partition(".")[0] in HEAVY}
    assert not heavy, f"import {', '.join(heavy)} inside the functions that need it"


@pytest.mark.parametrize(
    "path",
    [path for path in FILES if path.name == "__init__.py" and path.parent != PACKAGE],
    ids=lambda path: str(path.relative_to(PACKAGE)),
)
def test_packages_re_export_nothing(path: Path) -> None:
    assert path.read_text() == "", "a package's __init__.py stays empty: settings are then imported without torch"


@pytest.mark.parametrize("path", NAMED, ids=lambda path: str(path.relative_to(ROOT)))
def test_names_of_files_and_classes_have_no_empty_words(path: Path) -> None:
    classes = [node.name for node in ast.walk(ast.parse(path.read_text())) if isinstance(node, ast.ClassDef)]
    for name in (path.stem, *classes):
        words = set("".join(f"_{c.lower()}" if c.isupper() else c for c in name).split("_"))
        assert not words & EMPTY_WORDS, f"{path.name}: {name} says nothing"


def test_folders_and_files_stay_small() -> None:
    loose = [path.name for path in PACKAGE.glob("*.py")]
    assert len(loose) <= MAX_LOOSE_MODULES, f"{len(loose)} modules lie loose in batchjob/"
    for folder in {path.parent for path in FILES} - {PACKAGE}:
        count = len([path for path in folder.glob("*.py") if path.name != "__init__.py"])
        assert count <= MAX_FILES or folder.name in MANY_FILES, f"{folder.name}/ has {count} files"
    for path in FILES:
        assert path.read_text().count("\n") <= MAX_LINES, f"{path.relative_to(PACKAGE)} has over {MAX_LINES} lines"


def test_functions_stay_short() -> None:
    lengths = sorted(
        (node.end_lineno - node.lineno + 1, f"{path.relative_to(PACKAGE)}: {node.name}")
        for path in FILES
        for node in ast.walk(ast.parse(path.read_text()))
        if isinstance(node, ast.FunctionDef) and node.end_lineno is not None
    )
    assert lengths[-1][0] <= MAX_FUNCTION_LINES, lengths[-1]
    assert lengths[int(0.9 * len(lengths))][0] <= MAX_FUNCTION_LINES_P90, lengths[int(0.9 * len(lengths))]


def test_public_names_load_neither_torch_nor_ray() -> None:
    assert not heavy_modules(["-c", "import batchjob; [getattr(batchjob, name) for name in batchjob.__all__]"])


@pytest.mark.parametrize("command", ["status", "errors", "plan"])
def test_reading_an_output_loads_neither_torch_nor_ray(command: str, tmp_path: Path) -> None:
    assert not heavy_modules(["-m", "batchjob", command, str(tmp_path / "nothing-here")])


@pytest.mark.parametrize("command", ["status", "errors"])
def test_commands_that_are_polled_do_not_import_the_driver(command: str, tmp_path: Path) -> None:
    packages = {name.split(".")[1] for name in imported_by(["-m", "batchjob", command, str(tmp_path)]) if "." in name}
    assert "report" in packages
    assert not packages & {"driver", "api", "job"}


@pytest.mark.parametrize("command", [[], ["run"], ["plan"]], ids=lambda words: " ".join(words) or "batchjob")
def test_help_loads_neither_torch_nor_ray(command: list[str]) -> None:
    assert not heavy_modules(["-m", "batchjob", *command, "--help"])


def heavy_modules(arguments: list[str]) -> set[str]:
    """Return those of torch, torchvision and ray that a fresh interpreter imports; its exit code does not matter."""
    return {name.partition(".")[0] for name in all_imported_by(arguments)} & HEAVY


def imported_by(arguments: list[str]) -> list[str]:
    """Return the modules of batchjob that a fresh interpreter imports."""
    return [name for name in all_imported_by(arguments) if name.partition(".")[0] == "batchjob"]


def all_imported_by(arguments: list[str]) -> list[str]:
    call = [sys.executable, "-X", "importtime", *arguments]
    stderr = subprocess.run(call, capture_output=True, text=True, check=False, timeout=60).stderr
    lines = [line.rpartition("|")[2].strip() for line in stderr.splitlines() if line.startswith("import time:")]
    assert "batchjob" in lines, stderr[-2000:]
    return lines


def test_the_architecture_page_is_current() -> None:
    written = (ROOT / "docs" / "internals" / "architecture.md").read_text()
    assert written == architecture.page(), "run `make docs-pages`"
