"""Layout of the tests: `tests/unit` mirrors the package and `docs/`, and all folders of tests are packages."""

from __future__ import annotations

from pathlib import Path

TESTS = Path(__file__).parents[1]
ROOT = TESTS.parent


def test_unit_tests_mirror_the_package() -> None:
    unit = TESTS / "unit"
    folders = {path.parent.relative_to(unit) for path in unit.rglob("test_*.py")}
    mirrored = {folder for folder in folders if (ROOT / "batchjob" / folder).is_dir() or str(folder) == "docs"}
    assert sorted(map(str, folders - mirrored)) == []


def test_tests_may_have_the_same_file_name() -> None:
    """Without an `__init__.py`, pytest and mypy would take two of them for one module."""
    folders = {path.parent for path in TESTS.rglob("test_*.py")}
    assert [str(folder) for folder in sorted(folders) if not (folder / "__init__.py").exists()] == []


def test_shared_parts_lie_in_support() -> None:
    assert {path.name for path in TESTS.glob("*.py")} == {"__init__.py", "conftest.py"}
