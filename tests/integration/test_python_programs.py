"""Programs that use the Python API as users write them: a script, a notebook, a prompt."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
from PIL import Image

IMAGES = 5
SCRIPT = """
import sys
import torch
from torch import nn
import batchjob
from batchjob import *

WIDTH = int(sys.argv[1])

class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.linear = nn.Linear(3, WIDTH)

    def forward(self, images):
        return self.linear(images.mean(dim=(2, 3)))

def build(seed=0):
    torch.manual_seed(seed)
    return Net()

def prepare(image):
    if image.shape[2] == 7:
        raise ValueError("seven columns")
    return image[:, :4, :4].float() / 255

class Columns:
    fields = {"top": "int64"}

    def columns(self, output):
        return {"top": output.argmax(1)}

job = Job(
    input=PrefixSource(uri="photos"),
    model=PythonModel(target=build),
    preprocess=Preprocess(transform=prepare),
    task=PythonTask(target=Columns),
    runtime=Runtime(pool="local", batch_size=2),
    errors=ErrorBudget(max_rate=0.5),
    output=Output(uri="out"),
)
"""
RUN = """
try:
    result = batchjob.run(job, progress=True).raise_for_status()
except JobError as error:
    sys.exit(f"exit {error.exit_code}: {error}")
table = result.table().to_table(columns=["uri", "top"])
print(result.status, table.num_rows, [row["error_message"] for row in result.errors()])
"""
# As ipykernel does: each cell is compiled under a name of its own, with its text in linecache, in a `__main__` without
# a file.
NOTEBOOK = """
import linecache, sys, types

def run_cells(cells):
    sys.argv = ["notebook", "2"]
    main = sys.modules["__main__"] = types.ModuleType("__main__")
    for number, cell in enumerate(cells):
        name = f"<ipython-input-{number}>"
        linecache.cache[name] = len(cell), None, cell.splitlines(keepends=True), name
        exec(compile(cell, name, "exec"), vars(main))

run_cells(open("cells.txt").read().split("# ---"))
"""


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A folder with images, one of which the transform refuses."""
    tmp_path.joinpath("photos").mkdir()
    for number in range(IMAGES):
        Image.new("RGB", (7 if number == 3 else 8, 8), (40 * number, 9, 9)).save(tmp_path / f"photos/{number}.png")
    return tmp_path


def run_python(folder: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, *arguments],
        cwd=folder,
        env={**os.environ, "COLUMNS": "300"},
        capture_output=True,
        text=True,
        check=False,
        timeout=120,
    )


def test_script_without_a_main_guard_ships_its_functions_by_value(folder: Path) -> None:
    folder.joinpath("script.py").write_text(SCRIPT + RUN)
    first = run_python(folder, "script.py", "2")
    assert first.returncode == 0, first.stderr
    assert first.stdout == "complete 5 ['ValueError: seven columns (script.py:24)']\n"
    assert "5 images, 1 error" in first.stderr

    again = run_python(folder, "script.py", "2")
    assert again.stdout.startswith("already_complete 5")

    other = run_python(folder, "script.py", "3")
    assert other.returncode == 1
    assert other.stderr.startswith("exit 2: ")
    assert "\n  model.target.values.WIDTH: 2 there, 3 here\n" in other.stderr

    folder.joinpath("script.py").write_text((SCRIPT + RUN).replace("/ 255", "/ 256"))
    edited = run_python(folder, "script.py", "2")
    assert "\n  preprocess.transform.code.prepare: " in edited.stderr

    status = run_python(folder, "-m", "batchjob", "status", "out")
    assert "out: complete" in status.stderr
    errors = run_python(folder, "-m", "batchjob", "errors", "out")
    assert "seven columns" in errors.stdout + errors.stderr
    folder.joinpath("script.py").write_text(SCRIPT)
    folder.joinpath("job.yaml").write_text(
        "input: {type: prefix, uri: photos}\nmodel: {type: python, target: 'script:build'}\n"
        "preprocess: {transform: 'script:prepare'}\ntask: {type: python, target: 'script:Columns'}\n"
        "runtime: {pool: local}\noutput: {uri: out}\n"
    )
    retry = run_python(folder, "-m", "batchjob", "retry", "job.yaml")
    assert retry.returncode == 2
    assert "model.target: a script's function __main__:build there, script:build here" in retry.stderr
    assert "the script that holds the function resumes and retries it" in retry.stderr


def test_notebook_ships_its_functions_by_value(folder: Path) -> None:
    folder.joinpath("cells.txt").write_text((SCRIPT + RUN).replace("\njob =", "\n# ---\njob ="))
    folder.joinpath("notebook.py").write_text(NOTEBOOK)
    done = run_python(folder, "notebook.py")
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith("complete 5 ['ValueError: seven columns")


def test_prompt_is_told_that_its_functions_have_no_source(folder: Path) -> None:
    code = "from batchjob import PythonModel\ndef build():\n    return 1\nPythonModel(target=build)"
    done = run_python(folder, "-c", code)
    assert done.stderr.splitlines()[-1].startswith("batchjob.errors.InvalidJob: PythonModel.target: __main__:build ")
    # Python 3.13 and later keep the text of `-c`.
    assert "put it into a module and import it" in done.stderr or sys.version_info >= (3, 13)


def test_script_that_names_itself_is_told_so(folder: Path) -> None:
    code = SCRIPT.replace("target=build", 'target="script:build"') + RUN
    folder.joinpath("script.py").write_text(code)
    done = run_python(folder, "script.py", "2")
    assert done.returncode == 1
    assert len([line for line in done.stderr.splitlines() if line.startswith("exit 2")]) == 1
    assert f"{folder}/script.py: calls batchjob.run when it is imported" in done.stderr
    assert "put the call below `if __name__ == '__main__':`, or give the function itself" in done.stderr
    assert "another driver" not in done.stderr
    assert not folder.joinpath("out").exists()
