"""Rules of the language: how a docstring begins, and one name for one thing."""

from __future__ import annotations

import ast
from collections import defaultdict
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
FILES = sorted(path for tree in ("batchjob", "benchmarks", "jobs", "tests") for path in (ROOT / tree).rglob("*.py"))

# A docstring's first line is a noun phrase or an imperative. With one of these words it is half a sentence.
FORBIDDEN_FIRST_WORDS = {
    *("what", "which", "whether", "how", "where", "why", "those", "of", "as"),
    *("who", "whom", "whose", "that"),
}

Documented = ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(ROOT)))
def test_docstrings_begin_with_a_noun_phrase_or_an_imperative(path: Path) -> None:
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, Documented) and (words := (ast.get_docstring(node) or "").split()):
            line = getattr(node, "lineno", 1)
            assert words[0].lower().strip("`'\",.:;") not in FORBIDDEN_FIRST_WORDS, f"{path.name}:{line}: {words[0]} …"


def test_no_two_classes_of_the_package_share_a_name() -> None:
    places: dict[str, list[str]] = defaultdict(list)
    for path in sorted((ROOT / "batchjob").rglob("*.py")):
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.ClassDef):
                places[node.name].append(str(path.relative_to(ROOT)))
    assert {name: files for name, files in places.items() if len(files) > 1} == {}


@pytest.mark.parametrize(
    "path", sorted((ROOT / "batchjob").rglob("*.py")), ids=lambda path: str(path.relative_to(ROOT))
)
def test_every_file_says_what_it_holds(path: Path) -> None:
    text = path.read_text()
    assert not text or ast.get_docstring(ast.parse(text)), "the tree of docs/internals/architecture.md shows this line"
