"""Scratch folders: deleted when closed; folders of killed processes are deleted by the next process."""

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

HOLDER = """\
import sys
from batchjob.output.scratch import ScratchFolder
scratch = ScratchFolder()
(scratch.path / "7-abc.parquet").write_bytes(b"half a part")
print(scratch.path, flush=True)
sys.stdin.read()
"""


@pytest.fixture(autouse=True)
def temporary(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("TMPDIR", str(tmp_path))
    monkeypatch.setattr(tempfile, "tempdir", None)
    return tmp_path


@contextmanager
def start_holder() -> Iterator[tuple[subprocess.Popen[str], Path]]:
    """Start a process that holds a scratch folder; yield both. The folder looks old."""
    root = Path(__file__).parents[3]
    with subprocess.Popen(
        [sys.executable, "-c", HOLDER], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, cwd=root
    ) as process:
        assert process.stdout is not None
        path = Path(process.stdout.readline().strip())
        make_old(path)
        try:
            yield process, path
        finally:
            process.kill()


def make_old(path: Path) -> None:
    for file in path.iterdir():
        os.utime(file, (time.time() - 3600,) * 2)


def test_folder_exists_until_closed(temporary: Path) -> None:
    scratch = ScratchFolder()
    assert scratch.path.parent == temporary
    (scratch.path / "part").write_bytes(b"rows")
    scratch.close()
    scratch.close()
    assert not list(temporary.iterdir())


def test_folder_of_a_killed_process_is_deleted_and_of_a_running_one_kept() -> None:
    with start_holder() as (_, running), start_holder() as (victim, abandoned):
        ScratchFolder().close()
        assert running.is_dir()
        assert abandoned.is_dir()
        victim.kill()
        victim.wait()
        ScratchFolder().close()
        assert (running / "7-abc.parquet").is_file()
        assert not abandoned.exists()


def test_folder_of_this_process_is_kept() -> None:
    first = ScratchFolder()
    make_old(first.path)
    ScratchFolder().close()
    assert first.path.is_dir()
    first.close()


def test_new_folder_is_kept() -> None:
    """The process of a new folder may be about to lock it."""
    with start_holder() as (process, path):
        process.kill()
        process.wait()
        os.utime(path / "held")
        ScratchFolder().close()
        assert path.is_dir()


def test_other_files_are_kept(temporary: Path) -> None:
    other, target = temporary / "batchjob-notes", temporary / "elsewhere"
    for folder in (other, target):
        folder.mkdir()
    (other / "notes.txt").write_text("mine")
    (temporary / "batchjob-file").write_text("mine")
    (target / "held").write_text("")
    (temporary / "batchjob-link").symlink_to(target)
    for folder in (other, target):
        make_old(folder)
    ScratchFolder().close()
    assert (other / "notes.txt").is_file()
    assert (temporary / "batchjob-file").is_file()
    assert (target / "held").is_file()


def test_folder_that_cannot_be_created_is_named(monkeypatch: pytest.MonkeyPatch, temporary: Path) -> None:
    monkeypatch.setattr(tempfile, "tempdir", str(temporary / "not there"))
    with pytest.raises(InvalidJob, match=r"not there: cannot be written .* set TMPDIR"):
        ScratchFolder()


def test_no_temporary_folder_at_all_is_one_sentence(monkeypatch: pytest.MonkeyPatch) -> None:
    def find_none() -> str:
        raise FileNotFoundError(2, "No usable temporary directory found in ['/tmp', '/var/tmp']")

    monkeypatch.setattr(tempfile, "gettempdir", find_none)
    with pytest.raises(InvalidJob, match="set TMPDIR"):
        ScratchFolder()
