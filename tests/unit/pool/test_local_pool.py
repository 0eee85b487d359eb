"""Local pool: reports why its worker ended, with the traceback of a bug; images and hardware that break the worker."""

from __future__ import annotations

import os
import pickle
import signal
import threading
from functools import partial
from pathlib import Path
from typing import Any

import pytest

from batchjob import Job, run
from batchjob.errors import AttemptFailed, BatchjobError, DeviceFault, InvalidJob, Unavailable, as_crash_error
from batchjob.pool.local_pool import LocalPool
from batchjob.worker.messages import WorkerFailed, WorkerSetup
from tests.support.batchjob_process import read_rows
from tests.support.harmful_job import CUDA_ASSERT, CUDA_ECC_ERROR, write_harmful_job
from tests.support.scripted_pool import make_job

EMPTY: dict[str, str] = {}


def load_error(folder: Path, serialized_job: dict[str, Any]) -> BatchjobError:
    """Return the error that a pool reports if its worker cannot load."""
    pool = LocalPool(1)
    pool.start(WorkerSetup(serialized_job, str(folder)))
    try:
        (event,) = pool.wait(30)
    finally:
        pool.close()
    assert isinstance(event, WorkerFailed)
    return event.error


def notes(error: BatchjobError) -> str:
    return "\n".join(getattr(error, "__notes__", ()))


def test_bug_ends_with_exit_code_1_and_its_traceback(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    serialized_job = dict(make_job(tmp_path, ["a.png"]).serialize())
    monkeypatch.setattr("batchjob.worker.setup.load", lambda *_: EMPTY["a bug"])
    error = load_error(tmp_path, serialized_job)
    assert (type(error), error.exit_code, error.status) == (BatchjobError, 1, "crashed")
    assert error.message == "a worker crashed: KeyError: 'a bug'"
    assert "Traceback" in notes(error)
    assert "test_local_pool.py" in notes(error)


def test_exit_in_user_code_is_reported(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Outside the main thread, SystemExit ends a thread without any message."""
    serialized_job = dict(make_job(tmp_path, ["a.png"]).serialize())

    def call_exit(*_: object) -> None:
        raise SystemExit(3)

    monkeypatch.setattr("batchjob.worker.setup.load", call_exit)
    assert load_error(tmp_path, serialized_job).message == "a worker crashed: SystemExit: 3"


def test_wait_returns_although_a_signal_handler_outlasts_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """In Python 3.11, `SimpleQueue.get` never returns if a signal handler ends after its deadline."""
    serialized_job, handled = dict(make_job(tmp_path, ["a.png"]).serialize()), threading.Event()
    monkeypatch.setattr("batchjob.worker.setup.load", lambda *_: EMPTY["a bug"])
    pool = LocalPool(1)
    pool.start(WorkerSetup(serialized_job, str(tmp_path)))
    assert len(pool.wait(30)) == 1

    def handler(*_: object) -> None:
        handled.wait(0.4)  # no other thread sets it
        handled.set()

    before = signal.signal(signal.SIGUSR1, handler)
    alarm = threading.Timer(0.1, partial(os.kill, os.getpid(), signal.SIGUSR1))
    alarm.start()
    try:
        assert pool.wait(0.3) == []
    finally:
        signal.signal(signal.SIGUSR1, before)
        pool.close()
    alarm.join()
    assert handled.is_set()


@pytest.mark.parametrize("error", [InvalidJob("no"), Unavailable("no"), AttemptFailed("no")])
def test_classified_errors_stay_as_they_are(error: BatchjobError) -> None:
    assert as_crash_error(error) is error
    assert not notes(error)


def test_traceback_survives_pickling() -> None:
    try:
        EMPTY["a bug"]
    except KeyError as error:
        crash = as_crash_error(error)
    assert notes(pickle.loads(pickle.dumps(crash))) == notes(crash)
    assert "KeyError" in notes(crash)


def run_error(path: str) -> BatchjobError:
    """Run the job; return the error that ends it."""
    with pytest.raises(BatchjobError) as error:
        run(Job.from_file(Path(path)))
    return error.value


def test_run_resumes_past_an_image_that_breaks_the_device_context(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = write_harmful_job(tmp_path, 24, black_positions=[13])
    monkeypatch.setenv("BATCHJOB_TEST_HARM", CUDA_ASSERT)
    for _ in range(2):
        error = run_error(path)
        assert (type(error), error.exit_code, error.status) == (DeviceFault, 75, "temporary")
        assert error.message == f"cpu failed: RuntimeError: {CUDA_ASSERT}; the same command resumes"
    result = run(Job.from_file(Path(path)))
    assert (result.status, result.predicted, result.failed) == ("complete", 23, 1)
    rows = read_rows(tmp_path / "out").to_pylist()
    assert [row["position"] for row in rows] == list(range(24))
    assert {row["position"]: (row["error_stage"], row["error_type"]) for row in rows if row["error_stage"]} == {
        13: ("predict", "device")
    }


def test_hardware_fault_during_loading_is_temporary(tmp_path: Path) -> None:
    path = write_harmful_job(tmp_path, 8, black_positions=[])
    (tmp_path / "net.py").write_text(f"def make():\n    raise RuntimeError({CUDA_ECC_ERROR!r})\n")
    error = run_error(path)
    assert (type(error), error.exit_code) == (DeviceFault, 75)
    assert CUDA_ECC_ERROR in error.message


def test_image_on_which_the_model_raises_is_an_error_row(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = write_harmful_job(tmp_path, 24, black_positions=[0, 13, 14])
    monkeypatch.setenv("BATCHJOB_TEST_HARM", "not this one")
    result = run(Job.from_file(Path(path)))
    assert (result.status, result.predicted, result.failed) == ("complete", 21, 3)
    rows = read_rows(tmp_path / "out").to_pylist()
    assert {row["position"]: row["error_message"] for row in rows if row["error_stage"] == "predict"} == dict.fromkeys(
        [0, 13, 14], "RuntimeError: not this one (net.py:15)"
    )
