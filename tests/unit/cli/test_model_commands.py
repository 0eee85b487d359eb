"""Commands `convert` and `bench`: flags reach the work, wrong ones are usage errors, results are text or JSON."""

from __future__ import annotations

import json
import tempfile
from pathlib import Path
from typing import Any

import pytest

from batchjob.bench.bench import BenchOptions
from batchjob.cli.main import main
from batchjob.errors import CheckFailed
from batchjob.inference.conversion_options import ConversionOptions
from batchjob.job.job import Job
from tests.support.small_bench import write_small_job


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Working directory with a small job."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    write_small_job(tmp_path)
    return tmp_path


class RecordedWork:
    """Stand-in for the work of a command, which records its arguments and fails before it begins."""

    def __init__(self) -> None:
        self.calls: list[tuple[Job, Any]] = []

    def __call__(self, job: Job, options: Any) -> None:
        self.calls.append((job, options))
        raise CheckFailed("no work in this test")


def read_last_object(out: str) -> dict[str, Any]:
    found: dict[str, Any] = json.loads(out.splitlines()[-1])
    return found


# -- usage


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        (["convert"], "Missing argument 'JOB.yaml'"),
        (["convert", "job.yaml", "--to", "caffe"], "Invalid value for '--to'"),
        (["convert", "job.yaml", "--images", "1"], "Invalid value for '--images'"),
        (["convert", "job.yaml", "--tolerance", "-1"], "Invalid value for '--tolerance'"),
        (["convert", "job.yaml", "--amount", "1.5"], "Invalid value for '--amount'"),
        (["bench"], "Missing argument 'JOB.yaml'"),
        (["bench", "job.yaml", "--images", "0"], "Invalid value for '--images'"),
        (["bench", "job.yaml", "-p", "dt"], "'dt' is no parameter; write -p name=value"),
    ],
)
def test_wrong_flag_is_a_usage_error(
    folder: Path, arguments: list[str], sentence: str, capfd: pytest.CaptureFixture[str]
) -> None:
    assert main([*arguments, "--json"]) == 2
    out, err = capfd.readouterr()
    assert sentence in err
    assert read_last_object(out).items() >= {"status": "invalid", "exit_code": 2}.items()


@pytest.mark.parametrize("command", ["convert", "bench"])
def test_fault_of_the_job_file_is_one_sentence(folder: Path, command: str, capfd: pytest.CaptureFixture[str]) -> None:
    assert main([command, "job.yaml", "runtime.batch_sise=3", "--json"]) == 2
    out, err = capfd.readouterr()
    assert "did you mean 'batch_size'?" in err
    assert read_last_object(out) == {"status": "invalid", "exit_code": 2, "message": err.strip()}


# -- convert


@pytest.mark.parametrize(
    ("flags", "options"),
    [
        ([], ConversionOptions("exported", Path("model.pt2"))),
        (["--to", "onnx", "-o", "net.onnx"], ConversionOptions("onnx", Path("net.onnx"))),
        (["--images", "2", "--tolerance", "0"], ConversionOptions("exported", Path("model.pt2"), 2, 0.0)),
        (
            ["--to", "pruned", "--output", "a/b", "--amount", "0.25", "--structured", "--force"],
            ConversionOptions("pruned", Path("a/b"), amount=0.25, structured=True, force=True),
        ),
    ],
    ids=["defaults", "format and file", "images and tolerance", "pruned"],
)
def test_flags_reach_the_conversion(
    folder: Path, monkeypatch: pytest.MonkeyPatch, flags: list[str], options: ConversionOptions
) -> None:
    work = RecordedWork()
    monkeypatch.setattr("batchjob.api.convert", work)
    assert main(["convert", "job.yaml", "runtime.batch_size=7", *flags]) == 3
    ((job, given),) = work.calls
    # The file is named from the folder in which the user stands.
    assert given == ConversionOptions(**{**vars(options), "file": folder / options.file})
    assert job.runtime.batch_size == 7


def test_interrupted_conversion_is_temporary(
    folder: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    def interrupt(job: Job, options: ConversionOptions) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("batchjob.api.convert", interrupt)
    assert main(["convert", "job.yaml", "--json"]) == 75
    out, err = capfd.readouterr()
    assert "the same command begins again" in err
    assert read_last_object(out)["status"] == "temporary"


# -- bench


@pytest.mark.parametrize(
    ("flags", "options"),
    [
        ([], BenchOptions(None, None)),
        (["--images", "24"], BenchOptions(24, None)),
        (["--profile", "traces"], BenchOptions(None, Path("traces"))),
    ],
)
def test_flags_reach_the_bench(
    folder: Path, monkeypatch: pytest.MonkeyPatch, flags: list[str], options: BenchOptions
) -> None:
    work = RecordedWork()
    monkeypatch.setattr("batchjob.bench.bench.bench", work)
    assert main(["bench", "job.yaml", *flags]) == 3
    ((_, given),) = work.calls
    assert given == BenchOptions(options.images, None if options.profile is None else folder / options.profile)


@pytest.fixture
def temporary_folder(folder: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    (folder / "tmp").mkdir()
    monkeypatch.setattr(tempfile, "tempdir", str(folder / "tmp"))
    return folder / "tmp"


def test_bench_prints_json_on_stdout_and_leaves_no_file(
    folder: Path, temporary_folder: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    assert main(["bench", "job.yaml", "--images", "24", "--json"]) == 0
    result = read_last_object(capfd.readouterr().out)
    assert result.items() >= {"status": "measured", "exit_code": 0, "images": 24, "distinct": 12}.items()
    assert result["verdict"].startswith("bottleneck: ")
    assert not (folder / "out").exists()
    assert list(temporary_folder.iterdir()) == []


def test_bench_of_too_few_images_is_refused(
    folder: Path, temporary_folder: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    assert main(["bench", "job.yaml", "--images", "5", "--json"]) == 2
    assert "--images 5: fewer than two batches of 3" in read_last_object(capfd.readouterr().out)["message"]
    assert list(temporary_folder.iterdir()) == []
