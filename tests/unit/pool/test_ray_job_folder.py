"""Job's folder on a Ray cluster: where it lies, what is refused, and what is over Ray's limit."""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest

from batchjob import api
from batchjob.errors import InvalidJob
from batchjob.job.job import Job
from batchjob.pool.ray_job_folder import build_runtime_env, check_submission, folder_too_large_error, remote_job_dir
from tests.support.scripted_pool import make_job

SUBMITTED = "RAY_JOB_CONFIG_JSON_ENV_VAR"  # set by `ray job submit` in the environment of the driver


def test_job_folder_of_a_driver_outside_the_cluster_is_the_working_directory(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv(SUBMITTED, raising=False)
    (tmp_path / "night").mkdir()
    assert remote_job_dir(make_job(tmp_path / "night", [])) == "."


@pytest.mark.parametrize(
    ("job_folder", "expected"), [("jobs/night", "jobs/night"), (".", "."), ("../night", "../night")]
)
def test_job_folder_of_a_submitted_driver_is_relative_to_its_own(
    job_folder: str, expected: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    working_directory = tmp_path / "working_dir"
    (working_directory / job_folder).mkdir(parents=True, exist_ok=True)
    job = make_job((working_directory / job_folder).resolve(), [])
    monkeypatch.setenv(SUBMITTED, "{}")
    monkeypatch.chdir(working_directory)
    assert remote_job_dir(job) == job_folder


# -- output of a submitted job -----------------------------------------------------------------------------------------


def submit(monkeypatch: pytest.MonkeyPatch, working_directory: Path, shipped: bool = True) -> None:
    """Make this process look like the driver of a submitted job."""
    config = {"runtime_env": {"working_dir": "gcs://_ray_pkg_0123456789abcdef.zip"} if shipped else {}}
    monkeypatch.setenv(SUBMITTED, json.dumps(config))
    monkeypatch.chdir(working_directory)


def write_to(job: Job, uri: str) -> Job:
    return job.model_copy(update={"output": job.output.model_copy(update={"uri": uri})})


@pytest.mark.parametrize("uri", ["{cwd}/out", "file://{cwd}/out", "{cwd}/../job/deep/out"])
def test_output_in_the_working_directory_of_a_submitted_job_is_refused(
    uri: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = tmp_path / "job"
    folder.mkdir()
    submit(monkeypatch, folder)
    job = write_to(make_job(folder, []), uri.format(cwd=folder))
    with pytest.raises(InvalidJob, match=r"lies in the working directory of the submitted job.* output\.uri=s3://"):
        check_submission(job)
    with pytest.raises(InvalidJob, match="which Ray deletes at its end"):
        api.run(job)
    with pytest.raises(InvalidJob, match="which Ray deletes at its end"):
        api.make_plan(job)


@pytest.mark.parametrize("uri", ["s3://bucket/out", "memory://out", "{parent}/out"])
def test_output_elsewhere_outlives_a_submitted_job(uri: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = tmp_path / "job"
    folder.mkdir()
    submit(monkeypatch, folder)
    check_submission(write_to(make_job(folder, []), uri.format(parent=tmp_path)))


@pytest.mark.parametrize("shipped", [False, None])
def test_output_in_a_directory_that_stays_is_accepted(
    shipped: bool | None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A job that was submitted without a working directory, and one that was not submitted."""
    if shipped is None:
        monkeypatch.delenv(SUBMITTED, raising=False)
        monkeypatch.chdir(tmp_path)
    else:
        submit(monkeypatch, tmp_path, shipped)
    check_submission(write_to(make_job(tmp_path, []), str(tmp_path / "out")))


# -- size --------------------------------------------------------------------------------------------------------------


def test_error_of_a_large_folder_names_the_largest_files_that_are_shipped(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv(SUBMITTED, raising=False)
    job = make_job(tmp_path, [])
    for name, size in {"weights/big.pt": 5, "old.ckpt": 3, "notes.bin": 2, "ignored.bin": 9, ".git/pack": 8}.items():
        path = tmp_path / name
        path.parent.mkdir(exist_ok=True)
        path.touch()
        os.truncate(path, size << 20)
    (tmp_path / ".rayignore").write_text("ignored.bin\n")
    message = folder_too_large_error(job).message
    assert "largest: weights/big.pt (5 MiB), old.ckpt (3 MiB), notes.bin (2 MiB); " in message
    assert ".rayignore" in message
    assert "ignored.bin" not in message


def test_folder_is_shipped_without_its_output(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv(SUBMITTED, raising=False)
    job = make_job(tmp_path, [])
    runtime_env = build_runtime_env(write_to(job, str(tmp_path / "out")))
    assert runtime_env is not None
    assert runtime_env["working_dir"] == str(job.folder)
    assert {"/out", ".git"} <= set(runtime_env["excludes"])
