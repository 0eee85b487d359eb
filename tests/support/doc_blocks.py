"""Code blocks of Markdown pages: read them, check them, and run those of a page one after the other in one folder.

    ```bash                      runs under `bash -euo pipefail`
    ```python                    runs as a script
    ```python title="net.py"     becomes a file; so does a yaml block with a title
    ```yaml                      a fragment of a job file: it is laid over a smallest job, and checked
    ```sql                       runs in DuckDB
    ```text                      output or a picture

A block with a title that has `input`, `model` and `output` is checked as a job. `<!-- not run: reason -->` on the line
before a block exempts it; `<!-- images: photos 20 -->` makes 20 photographs in `photos/` before it.
"""

from __future__ import annotations

import ast
import contextlib
import os
import re
import subprocess
import sys
import textwrap
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import duckdb
import numpy as np
import pytest
import yaml
from PIL import Image

from batchjob.errors import InvalidJob
from batchjob.job.job import Job

__all__ = ["FIRST_PAGES", "PAGES", "ROOT", "Block", "check_block", "read_blocks", "run_page"]

ROOT = Path(__file__).parents[2]
# Pages that `make test` runs; `make test-slow` runs the others.
FIRST_PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", ROOT / "docs" / "getting-started.md"]
PAGES = sorted({*FIRST_PAGES, *(ROOT / "docs").rglob("*.md")})

_FENCE = re.compile(r"(?P<indent> *)(?P<fence>`{3,}|~{3,})(?P<language>[\w+-]*)(?P<options>.*)")
_TITLE = re.compile(r"""title=["'](?P<title>[^"']+)["']""")
_DIRECTIVE = re.compile(r"^ *<!--\s*(?P<name>not run|images)\b(?P<value>.*?)--> *$", re.DOTALL | re.MULTILINE)
_LANGUAGES = ("bash", "python", "sql", "text", "yaml")
_SMALLEST_JOB = {
    "input": {"type": "prefix", "uri": "photos/"},
    "model": {"type": "torchvision", "name": "resnet18", "seed": 0},
    "task": {"type": "classification"},
    "output": {"uri": "out"},
}
_EXAMPLE_VALUES = {"str": "text", "int": "1", "float": "1.0", "bool": "true", "date": "2026-11-19"}
_SECONDS = 240


@dataclass(frozen=True)
class Block:
    """Code block of a page.

    Attributes:
        page: Path of the page.
        line: Number of the line that begins the block.
        language: Language of the block.
        title: Name of the file that the block becomes; None if it has none.
        text: Text of the block, without indentation.
        not_run: Reason why it is not run; None if it is.
        images: Folder and number of the photographs that it needs; None if it needs none.
    """

    page: Path
    line: int
    language: str
    title: str | None
    text: str
    not_run: str | None = None
    images: tuple[str, int] | None = None

    def fail(self, problem: str, output: str = "") -> None:
        """Fail the test with the page, the line, the problem and the output of the block."""
        name = self.page.relative_to(ROOT) if self.page.is_relative_to(ROOT) else self.page.name
        shown = textwrap.indent(output.strip()[-4000:], "    ")
        pytest.fail(f"{name}:{self.line}: {self.language or 'code'} block: {problem}\n{shown}", pytrace=False)


# ----------------------------------------------------------------------------------------------------------- reading


def read_blocks(page: Path) -> list[Block]:
    """Read the code blocks of a page, in order."""
    lines = page.read_text().splitlines()
    blocks, before, index = [], "", 0
    while index < len(lines):
        fence = _FENCE.fullmatch(lines[index])
        if fence is None:
            before = f"{before}\n{lines[index]}"
            index += 1
            continue
        end = next(
            (number for number in range(index + 1, len(lines)) if lines[number].strip() == fence["fence"]), len(lines)
        )
        title = _TITLE.search(fence["options"])
        text = textwrap.dedent("\n".join(lines[index + 1 : end])) + "\n"
        block = Block(page, index + 1, fence["language"], title["title"] if title else None, text)
        blocks.append(_apply_directives(block, before))
        before, index = "", end + 1
    if _DIRECTIVE.search(before):
        pytest.fail(f"{page}: a comment for a code block has no block after it", pytrace=False)
    return blocks


def _apply_directives(block: Block, before: str) -> Block:
    """Return a block with the comments that stand directly before it."""
    found = {match["name"]: match for match in _DIRECTIVE.finditer(before)}
    not_run, images = None, None
    for name, match in found.items():
        if _DIRECTIVE.sub("", before[match.start() :]).strip():
            block.fail(f"text stands between the comment `{name}` and its block")
        value = match["value"].strip()
        if name == "not run":
            not_run = " ".join(value.removeprefix(":").split())
            if not value.startswith(":") or not not_run:
                block.fail("say why it is not run: <!-- not run: reason -->")
        elif (numbers := re.fullmatch(r":\s*(\S+)\s+(\d+)", value)) is not None:
            images = (numbers[1], int(numbers[2]))
        else:
            block.fail("write <!-- images: FOLDER NUMBER -->")
    return Block(block.page, block.line, block.language, block.title, block.text, not_run, images)


# ---------------------------------------------------------------------------------------------------------- checking


def check_block(block: Block, folder: Path) -> None:
    """Check a block without running it.

    Args:
        block: The block.
        folder: Folder for temporary files.
    """
    if block.not_run is not None:
        return
    if block.language not in _LANGUAGES:
        block.fail(f"its language is none of {', '.join(_LANGUAGES)}; name one, or say why it is not run")
    check = {"bash": _check_bash, "python": _check_python, "sql": _check_sql, "yaml": _check_yaml}.get(block.language)
    if check is not None:
        check(block, folder)


def _check_bash(block: Block, folder: Path) -> None:
    checked = subprocess.run(["bash", "-n"], input=block.text, text=True, capture_output=True, cwd=folder, check=False)
    if checked.returncode:
        block.fail("bash cannot read it", checked.stderr)


def _check_python(block: Block, folder: Path) -> None:
    try:
        ast.parse(block.text)
    except SyntaxError as error:
        block.fail(f"line {error.lineno} is no Python: {error.msg}")


def _check_sql(block: Block, folder: Path) -> None:
    try:
        duckdb.extract_statements(block.text)
    except duckdb.Error as error:
        block.fail("DuckDB cannot read it", str(error))


def _check_yaml(block: Block, folder: Path) -> None:
    try:
        document = yaml.safe_load(block.text)
    except yaml.YAMLError as error:
        return block.fail("it is no YAML", str(error))
    if block.title is None:
        if not isinstance(document, dict):
            return block.fail("it is no fragment of a job file; give it a title, or say why it is not run")
        document = _SMALLEST_JOB | document
    elif not isinstance(document, dict) or not {"input", "model", "output"} <= document.keys():
        return None
    path = folder / f"job-of-line-{block.line}.yaml"
    # The text itself where it is a whole job, so that a fault is reported at its line.
    path.write_text(block.text if block.title else yaml.safe_dump(document, sort_keys=False))
    try:
        Job.from_file(path, _example_values(document))
    except InvalidJob as error:
        block.fail("it is no valid job", error.message)
    finally:
        path.unlink()
    return None


def _example_values(document: dict[str, Any]) -> dict[str, str]:
    """Return a value for each parameter of a job that requires one."""
    params = document.get("params") or {}
    required = {name: param or {} for name, param in params.items() if "default" not in (param or {})}
    return {name: _EXAMPLE_VALUES[param.get("type", "str")] for name, param in required.items()}


# ----------------------------------------------------------------------------------------------------------- running


def run_page(page: Path, folder: Path) -> None:
    """Check and run the blocks of a page in order, all in one folder."""
    work, home = folder / "work", folder / "home"
    work.mkdir()
    home.mkdir()
    for block in read_blocks(page):
        check_block(block, work)
        if block.images is not None:
            _make_photographs(work / block.images[0], block.images[1])
        if block.not_run is None and block.language != "text":
            _run_block(block, work, home)


def _run_block(block: Block, work: Path, home: Path) -> None:
    if block.title is not None:
        path = work / block.title
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(block.text)
    elif block.language == "bash":
        # The trap names the command that failed; it stands before the first line, so that line numbers stay right.
        trap = "trap 'echo \"line $LINENO: $BASH_COMMAND\" >&2' ERR; "
        _run_process(block, ["bash", "-euo", "pipefail", "-c", trap + block.text], work, home)
    elif block.language == "python":
        script = work / f"script-of-line-{block.line}.py"
        script.write_text(block.text)
        _run_process(block, [sys.executable, script.name], work, home)
    elif block.language == "sql":
        try:
            with contextlib.chdir(work):
                duckdb.connect().execute(block.text).fetchall()
        except duckdb.Error as error:
            block.fail("DuckDB refuses it", str(error))


def _run_process(block: Block, arguments: list[str], work: Path, home: Path) -> None:
    try:
        done = subprocess.run(
            arguments,
            cwd=work,
            env=_environment(home),
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            timeout=_SECONDS,
            check=False,
        )
    except subprocess.TimeoutExpired as error:
        return block.fail(f"it takes more than {_SECONDS} seconds", str(error.stdout or ""))
    if done.returncode:
        block.fail(f"exit code {done.returncode}", done.stdout)
    return None


def _environment(home: Path) -> dict[str, str]:
    """Return the environment of a reader who has installed the package: no settings of clusters, clouds or tests."""
    kept = {name: value for name, value in os.environ.items() if not name.startswith(("AWS_", "BATCHJOB_", "RAY_"))}
    commands = Path(sys.executable).parent
    return kept | {"HOME": str(home), "PATH": f"{commands}{os.pathsep}{os.environ['PATH']}", "HF_HUB_OFFLINE": "1"}


def _make_photographs(folder: Path, count: int) -> None:
    """Write small JPEG photographs: smooth colours with a little noise, each one different."""
    folder.mkdir(parents=True, exist_ok=True)
    for number, pixels in zip(range(count), _photographs(), strict=False):
        Image.fromarray(pixels).save(folder / f"{number:04}.jpg", quality=90)


def _photographs() -> Iterator[np.ndarray[Any, np.dtype[np.uint8]]]:
    random = np.random.default_rng(0)
    while True:
        coarse = Image.fromarray(random.integers(0, 256, (4, 5, 3), np.uint8)).resize(
            (160, 128), Image.Resampling.BICUBIC
        )
        noise = random.integers(-8, 9, (128, 160, 3))
        yield np.clip(np.asarray(coarse, np.int16) + noise, 0, 255).astype(np.uint8)
