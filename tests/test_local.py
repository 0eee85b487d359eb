"""The pool of one: what ends its worker is told for what it is, with its traceback where it is a bug."""

from __future__ import annotations

import pickle
from pathlib import Path
from typing import Any

import pytest
from pools import job

from batchjob.errors import AttemptFailed, BatchjobError, InvalidJob, Unavailable
from batchjob.local import LocalPool, as_crash
from batchjob.pool import Setup, WorkerFailed

NOTHING: dict[str, str] = {}


def ending(folder: Path, document: dict[str, Any]) -> BatchjobError:
    """What a pool says when its worker cannot load."""
    pool = LocalPool(1)
    pool.start(Setup(document, str(folder)))
    try:
        (event,) = pool.wait(30)
    finally:
        pool.close()
    assert isinstance(event, WorkerFailed)
    return event.error


def notes(error: BatchjobError) -> str:
    return "\n".join(getattr(error, "__notes__", ()))


def test_a_bug_is_exit_1_and_its_traceback_is_kept(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    document = dict(job(tmp_path, ["a.png"]).portable())
    monkeypatch.setattr("batchjob.worker.Worker.load", lambda self: NOTHING["a bug"])
    error = ending(tmp_path, document)
    assert (type(error), error.exit_code, error.status) == (BatchjobError, 1, "crashed")
    assert error.message == "a worker crashed: KeyError: 'a bug'"
    assert "Traceback" in notes(error)
    assert "test_local.py" in notes(error)


def test_user_code_that_exits_is_no_silence(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """In a thread, SystemExit is heard by nobody."""
    document = dict(job(tmp_path, ["a.png"]).portable())

    def leave(self: object) -> None:
        raise SystemExit(3)

    monkeypatch.setattr("batchjob.worker.Worker.load", leave)
    assert ending(tmp_path, document).message == "a worker crashed: SystemExit: 3"


@pytest.mark.parametrize("error", [InvalidJob("no"), Unavailable("no"), AttemptFailed("no")])
def test_our_own_errors_are_told_as_they_are(error: BatchjobError) -> None:
    assert as_crash(error) is error
    assert not notes(error)


def test_the_traceback_crosses_machines() -> None:
    try:
        NOTHING["a bug"]
    except KeyError as error:
        crash = as_crash(error)
    assert notes(pickle.loads(pickle.dumps(crash))) == notes(crash)
    assert "KeyError" in notes(crash)
