"""The folder for parts in the making goes with its process, and what a killed one left goes with the next."""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from batchjob.errors import InvalidJob
from batchjob.output.scratch import ScratchFolder

HOLD = """\
import sys
from batchjob.output.scratch import ScratchFolder
spool = ScratchFolder()
(spool.path / "7-abc.parquet").write_bytes(b"half a part")
print(spool.path, flush=True)
sys.stdin.read()
"""


@pytest.fixture(autouse=True)
def temporary(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("TMPDIR", str(tmp_path))
    monkeypatch.setattr(tempfile, "tempdir", None)
    return tmp_path


@contextmanager
def held() -> Iterator[tuple[subprocess.Popen[str], Path]]:
    """Another process that holds a spool, and the spool, which looks old."""
    root = Path(__file__).parents[1]
    with subprocess.Popen(
        [sys.executable, "-c", HOLD], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, cwd=root
    ) as process:
        assert process.stdout is not None
        path = Path(process.stdout.readline().strip())
        age(path)
        try:
            yield process, path
        finally:
            process.kill()


def age(path: Path) -> None:
    for file in path.iterdir():
        os.utime(file, (time.time() - 3600,) * 2)


def test_it_is_there_until_closed(temporary: Path) -> None:
    spool = ScratchFolder()
    assert spool.path.parent == temporary
    (spool.path / "part").write_bytes(b"rows")
    spool.close()
    spool.close()
    assert not list(temporary.iterdir())


def test_what_a_killed_process_left_is_swept_and_what_a_living_one_holds_is_not() -> None:
    with held() as (_, living), held() as (victim, left):
        ScratchFolder().close()
        assert living.is_dir()
        assert left.is_dir()
        victim.kill()
        victim.wait()
        ScratchFolder().close()
        assert (living / "7-abc.parquet").is_file()
        assert not left.exists()


def test_one_of_this_process_is_not_swept() -> None:
    first = ScratchFolder()
    age(first.path)
    ScratchFolder().close()
    assert first.path.is_dir()
    first.close()


def test_a_young_one_is_left_alone() -> None:
    """Its process may be about to lock it."""
    with held() as (process, path):
        process.kill()
        process.wait()
        os.utime(path / "held")
        ScratchFolder().close()
        assert path.is_dir()


def test_nothing_else_is_swept(temporary: Path) -> None:
    other, target = temporary / "batchjob-notes", temporary / "elsewhere"
    for folder in (other, target):
        folder.mkdir()
    (other / "notes.txt").write_text("mine")
    (temporary / "batchjob-file").write_text("mine")
    (target / "held").write_text("")
    (temporary / "batchjob-link").symlink_to(target)
    for folder in (other, target):
        age(folder)
    ScratchFolder().close()
    assert (other / "notes.txt").is_file()
    assert (temporary / "batchjob-file").is_file()
    assert (target / "held").is_file()


def test_a_folder_that_cannot_be_made_is_named(monkeypatch: pytest.MonkeyPatch, temporary: Path) -> None:
    monkeypatch.setattr(tempfile, "tempdir", str(temporary / "not there"))
    with pytest.raises(InvalidJob, match=r"not there: cannot be written .* set TMPDIR"):
        ScratchFolder()
