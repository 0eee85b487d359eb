"""The house rules that a reader relies on: who may import what, what loads what, what things are not called."""

from __future__ import annotations

import ast
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PACKAGE = ROOT / "batchjob"
# From the ground up. A room imports from lower floors, and on its own floor from those named before it; on floor 2 they
# are strangers to each other.
FLOORS = [
    "redaction errors settings encoded runs records",
    (
        "targets imports preloaded heap preprocess forkserver devices forward lanes likeness machine disk parallel "
        "storage fetch schedule placement spool jpeg share formats banded resample breakage stopwatch attended strikes "
        "pulse"
    ),
    "sources models tasks plan ledger lease decode transform loader tuning recipes predict sink",
    "jobtext parameters jobfile complaints portable job",
    (
        "pool told report progress environment drain prepare turns accounting feeder planning survey dispatch takes "
        "revision assembly devicejpeg engine trial agreement convert guard passage witness loading worker layout "
        "shipping bench driver"
    ),
    "local cluster launch",
    "arguments cli",
    "__init__ __main__",
]
PLACE = {room: (floor, n) for floor, rooms in enumerate(FLOORS) for n, room in enumerate(rooms.split())}
STRANGERS = 2
ONLY = {
    "ray": {"pool"},
    "fsspec": {"storage"},
    "obstore": {"storage"},
    "boto3": {"storage"},
    "botocore": {"storage"},
    "s3fs": {"storage"},
}
HEAVY = {"torch", "torchvision", "ray"}
WORDS = {"utils", "util", "helpers", "helper", "common", "base", "core", "manager", "handler", "factory", "processor"}

FILES = sorted(PACKAGE.rglob("*.py"))
NAMED = sorted(path for tree in ("batchjob", "benchmarks", "jobs", "tests") for path in (ROOT / tree).rglob("*.py"))


def room_of(path: Path) -> str:
    return path.relative_to(PACKAGE).parts[0].removesuffix(".py")


def imports(tree: ast.AST) -> Iterator[str]:
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from (name.name for name in node.names)
        elif isinstance(node, ast.ImportFrom) and node.module == "batchjob":
            yield from (f"batchjob.{name.name}" for name in node.names)
        elif isinstance(node, ast.ImportFrom):
            yield node.module or ""


def loaded_at_import(tree: ast.Module) -> Iterator[str]:
    """What the module's own top level imports; `if TYPE_CHECKING:` is not run."""
    for node in tree.body:
        if isinstance(node, ast.Import | ast.ImportFrom):
            yield from imports(node)


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(PACKAGE)))
def test_imports_run_down_only(path: Path) -> None:
    room = room_of(path)
    assert room in PLACE, f"{path.name}: give it a floor in FLOORS"
    floor, n = PLACE[room]
    for name in imports(ast.parse(path.read_text())):
        top, _, below = name.partition(".")
        assert room in ONLY.get(top, {room}), f"{room} imports {name}: only {', '.join(ONLY[top])} may"
        other = below.partition(".")[0]
        if top != "batchjob" or not below or other in {room, "__version__"}:
            continue
        assert other in PLACE, f"{room} imports {name}, which has no floor"
        there, m = PLACE[other]
        assert there < floor or (there == floor != STRANGERS and m < n), f"{room} imports {other}: not below it"


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(PACKAGE)))
def test_no_module_loads_torch_or_ray_when_it_is_imported(path: Path) -> None:
    heavy = {name for name in loaded_at_import(ast.parse(path.read_text())) if name.partition(".")[0] in HEAVY}
    assert not heavy, f"import {', '.join(heavy)} inside the functions that need it"


@pytest.mark.parametrize("path", NAMED, ids=lambda path: str(path.relative_to(ROOT)))
def test_names_say_something(path: Path) -> None:
    classes = [node.name for node in ast.walk(ast.parse(path.read_text())) if isinstance(node, ast.ClassDef)]
    for name in (path.stem, *classes):
        words = set("".join(f"_{c.lower()}" if c.isupper() else c for c in name).split("_"))
        assert not words & WORDS, f"{path.name}: {name} says nothing"


@pytest.mark.parametrize("command", [["-c", "import batchjob; [getattr(batchjob, name) for name in batchjob.__all__]"]])
def test_the_public_face_loads_neither_torch_nor_ray(command: list[str]) -> None:
    assert not heavy_modules(command)


@pytest.mark.parametrize("command", ["status", "errors", "plan"])
def test_looking_at_an_output_loads_neither_torch_nor_ray(command: str, tmp_path: Path) -> None:
    assert not heavy_modules(["-m", "batchjob", command, str(tmp_path / "nothing-here")])


def heavy_modules(arguments: list[str]) -> set[str]:
    """Which of torch and ray a fresh interpreter imports; what it says or how it exits does not matter here."""
    call = [sys.executable, "-X", "importtime", *arguments]
    stderr = subprocess.run(call, capture_output=True, text=True, check=False, timeout=60).stderr
    lines = [line.rpartition("|")[2].strip() for line in stderr.splitlines() if line.startswith("import time:")]
    assert "batchjob" in lines, stderr[-2000:]
    return {name.partition(".")[0] for name in lines} & HEAVY
