"""The pool of one: what ends its worker is told for what it is, with its traceback where it is a bug."""

from __future__ import annotations

import os
import pickle
import signal
import threading
from functools import partial
from pathlib import Path
from typing import Any

import pytest
from batchjob_process import read_rows
from harmful_job import CUDA_ASSERT, CUDA_ECC_ERROR, write_harmful_job
from scripted_pool import make_job

from batchjob import Job, run
from batchjob.errors import AttemptFailed, BatchjobError, DeviceFault, InvalidJob, Unavailable, as_crash_error
from batchjob.pool.local_pool import LocalPool
from batchjob.worker.messages import WorkerFailed, WorkerSetup

NOTHING: dict[str, str] = {}


def ending(folder: Path, document: dict[str, Any]) -> BatchjobError:
    """What a pool says when its worker cannot load."""
    pool = LocalPool(1)
    pool.start(WorkerSetup(document, str(folder)))
    try:
        (event,) = pool.wait(30)
    finally:
        pool.close()
    assert isinstance(event, WorkerFailed)
    return event.error


def notes(error: BatchjobError) -> str:
    return "\n".join(getattr(error, "__notes__", ()))


def test_a_bug_is_exit_1_and_its_traceback_is_kept(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    document = dict(make_job(tmp_path, ["a.png"]).serialize())
    monkeypatch.setattr("batchjob.worker.setup.load", lambda *_: NOTHING["a bug"])
    error = ending(tmp_path, document)
    assert (type(error), error.exit_code, error.status) == (BatchjobError, 1, "crashed")
    assert error.message == "a worker crashed: KeyError: 'a bug'"
    assert "Traceback" in notes(error)
    assert "test_local_pool.py" in notes(error)


def test_user_code_that_exits_is_no_silence(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """In a thread, SystemExit is heard by nobody."""
    document = dict(make_job(tmp_path, ["a.png"]).serialize())

    def leave(*_: object) -> None:
        raise SystemExit(3)

    monkeypatch.setattr("batchjob.worker.setup.load", leave)
    assert ending(tmp_path, document).message == "a worker crashed: SystemExit: 3"


def test_a_signal_that_outlasts_a_wait_does_not_make_it_endless(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In Python 3.11 `SimpleQueue.get` waits for ever when a signal's handler ends past its deadline."""
    document, heard = dict(make_job(tmp_path, ["a.png"]).serialize()), threading.Event()
    monkeypatch.setattr("batchjob.worker.setup.load", lambda *_: NOTHING["a bug"])
    pool = LocalPool(1)
    pool.start(WorkerSetup(document, str(tmp_path)))
    assert len(pool.wait(30)) == 1

    def handler(*_: object) -> None:
        heard.wait(0.4)  # nobody sets it
        heard.set()

    before = signal.signal(signal.SIGUSR1, handler)
    alarm = threading.Timer(0.1, partial(os.kill, os.getpid(), signal.SIGUSR1))
    alarm.start()
    try:
        assert pool.wait(0.3) == []
    finally:
        signal.signal(signal.SIGUSR1, before)
        pool.close()
    alarm.join()
    assert heard.is_set()


@pytest.mark.parametrize("error", [InvalidJob("no"), Unavailable("no"), AttemptFailed("no")])
def test_our_own_errors_are_told_as_they_are(error: BatchjobError) -> None:
    assert as_crash_error(error) is error
    assert not notes(error)


def test_the_traceback_crosses_machines() -> None:
    try:
        NOTHING["a bug"]
    except KeyError as error:
        crash = as_crash_error(error)
    assert notes(pickle.loads(pickle.dumps(crash))) == notes(crash)
    assert "KeyError" in notes(crash)


def ended_with(path: str) -> BatchjobError:
    """The fault that ends a run of this job."""
    with pytest.raises(BatchjobError) as ending:
        run(Job.from_file(Path(path)))
    return ending.value


def test_a_broken_context_ends_the_run_and_the_same_command_goes_on_past_the_image_that_did_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = write_harmful_job(tmp_path, 24, black_positions=[13])
    monkeypatch.setenv("BATCHJOB_TEST_HARM", CUDA_ASSERT)
    for _ in range(2):
        error = ended_with(path)
        assert (type(error), error.exit_code, error.status) == (DeviceFault, 75, "temporary")
        assert error.message == f"cpu failed: RuntimeError: {CUDA_ASSERT}; the same command resumes"
    outcome = run(Job.from_file(Path(path)))
    assert (outcome.status, outcome.predicted, outcome.failed) == ("complete", 23, 1)
    rows = read_rows(tmp_path / "out").to_pylist()
    assert [row["position"] for row in rows] == list(range(24))
    assert {row["position"]: (row["error_stage"], row["error_type"]) for row in rows if row["error_stage"]} == {
        13: ("predict", "device")
    }


def test_hardware_that_fails_while_the_worker_loads_is_no_fault_of_the_job(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = write_harmful_job(tmp_path, 8, black_positions=[])
    (tmp_path / "net.py").write_text(f"def make():\n    raise RuntimeError({CUDA_ECC_ERROR!r})\n")
    error = ended_with(path)
    assert (type(error), error.exit_code) == (DeviceFault, 75)
    assert CUDA_ECC_ERROR in error.message


def test_an_image_that_the_model_raises_at_is_an_error_row(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = write_harmful_job(tmp_path, 24, black_positions=[0, 13, 14])
    monkeypatch.setenv("BATCHJOB_TEST_HARM", "not this one")
    outcome = run(Job.from_file(Path(path)))
    assert (outcome.status, outcome.predicted, outcome.failed) == ("complete", 21, 3)
    rows = read_rows(tmp_path / "out").to_pylist()
    assert {row["position"]: row["error_message"] for row in rows if row["error_stage"] == "predict"} == dict.fromkeys(
        [0, 13, 14], "RuntimeError: not this one"
    )
