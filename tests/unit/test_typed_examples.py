"""Types of the Python API in a project of its own: mypy strict, without pydantic's plugin."""

from __future__ import annotations

import shutil
import subprocess
import sys
from pathlib import Path

import pytest

EXAMPLES = Path(__file__).with_name("typed_examples.py")
# Without torch's own types, which take most of the time.
MYPY_INI = """
[mypy]
strict = True
[mypy-pyarrow.*]
ignore_missing_imports = True
[mypy-torch.*]
follow_imports = skip
"""
# Each line with a bracket is an error.
WRONG = """
from batchjob import ClassificationTask, Job, Output, PrefixSource, PythonModel, TorchvisionModel, run

TorchvisionModel(nmae="resnet50")
PrefixSource()
Output(uri=3)
PythonModel(target=3)
Job(input=ClassificationTask(), model=PythonModel(target="a:b"), task=ClassificationTask(), output=Output(uri="o"))
run("job.yaml")
"""


@pytest.fixture(scope="module")
def lines(tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    """Lines of mypy on the examples and on the wrong uses."""
    folder = tmp_path_factory.mktemp("project")
    shutil.copy(EXAMPLES, folder / "examples.py")
    folder.joinpath("wrong.py").write_text(WRONG)
    folder.joinpath("mypy.ini").write_text(MYPY_INI)
    arguments = ["--config-file", "mypy.ini", "--cache-dir", "cache", "--no-error-summary", "examples.py", "wrong.py"]
    done = subprocess.run(
        [sys.executable, "-m", "mypy", *arguments], cwd=folder, capture_output=True, text=True, check=False, timeout=300
    )
    return [line for line in (done.stdout + done.stderr).splitlines() if ": note: " not in line]


def test_examples_pass_mypy_strict(lines: list[str]) -> None:
    assert [line for line in lines if not line.startswith("wrong.py")] == []


def test_wrong_uses_are_found(lines: list[str]) -> None:
    found = {int(line.split(":")[1]) for line in lines if line.startswith("wrong.py") and ": error: " in line}
    expected = {number for number, line in enumerate(WRONG.splitlines(), start=1) if "(" in line}
    assert found == expected, lines
