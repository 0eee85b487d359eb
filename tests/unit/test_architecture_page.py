"""Page of the architecture: every file of the package once, and the import table as the tests check it."""

from __future__ import annotations

import importlib.util
import re
import sys
from collections import Counter
from pathlib import Path
from types import ModuleType

import pytest

ROOT = Path(__file__).parents[2]
SCRIPT = ROOT / "docs/internals/architecture.py"


@pytest.fixture
def architecture(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> ModuleType:
    """The script as a module that writes to a temporary page."""
    specification = importlib.util.spec_from_file_location("architecture_page_script", SCRIPT)
    assert specification is not None
    assert specification.loader is not None
    module = importlib.util.module_from_spec(specification)
    specification.loader.exec_module(module)
    monkeypatch.setattr(module, "PAGE", tmp_path / "architecture.md")
    monkeypatch.setattr(sys, "argv", ["architecture.py"])
    return module


def list_files_of_the_page(page: str) -> list[str]:
    """List the files of the tree by their path in `batchjob/`."""
    folder, files = "", []
    for line in page.splitlines():
        if heading := re.fullmatch(r"### `(.+)/`", line):
            folder = "" if heading[1] == "batchjob" else f"{heading[1]}/"
        elif item := re.match(r"\* `(.+?\.py)`: ", line):
            files.append(folder + item[1])
    return files


def test_page_lists_every_file_once(architecture: ModuleType) -> None:
    package = ROOT / "batchjob"
    # In folders, `__init__.py` is empty.
    files = [path.relative_to(package).as_posix() for path in package.rglob("*.py")]
    expected = [file for file in files if "/" not in file or not file.endswith("/__init__.py")]
    assert Counter(list_files_of_the_page(architecture.page())) == Counter(expected)


def test_file_is_described_by_the_first_line_of_its_docstring(architecture: ModuleType, tmp_path: Path) -> None:
    module = tmp_path / "module.py"
    module.write_text('"""One line.\n\nMore of it.\n"""\n')
    assert architecture.first_line(module) == "One line."


def test_import_table_has_a_row_for_every_package(architecture: ModuleType) -> None:
    rows = re.findall(r"^\| `(\w+)` \| (.+) \|$", architecture.import_table(), re.MULTILINE)
    folders = {path.parent.name for path in (ROOT / "batchjob").glob("*/__init__.py")}
    assert {name for name, _ in rows} >= folders
    assert dict(rows)["storage"] == "nothing"


def test_page_that_was_just_written_is_up_to_date(architecture: ModuleType) -> None:
    assert architecture.main() == 0
    sys.argv.append("--check")
    assert architecture.main() == 0


def test_check_fails_on_an_old_page_and_leaves_it_alone(architecture: ModuleType) -> None:
    sys.argv.append("--check")
    architecture.PAGE.write_text("old")
    assert architecture.main() == 1
    assert architecture.PAGE.read_text() == "old"


def test_check_fails_without_a_page(architecture: ModuleType) -> None:
    sys.argv.append("--check")
    assert architecture.main() == 1
    assert not architecture.PAGE.exists()
