"""Python API on an output: named by its path, its URI or its job."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from batchjob import Job, api, discard, make_plan, read_errors, status
from batchjob.errors import InvalidJob
from batchjob.inference.conversion_options import ConversionOptions

Locate = Callable[[Job], "str | Path | Job"]
LOCATIONS: dict[str, Locate] = {
    "text": lambda job: job.output.uri,
    "path": lambda job: Path(job.output.uri),
    "job": lambda job: job,
}


@pytest.fixture
def job(tmp_path: Path) -> Job:
    """A job over three files, planned and not yet run."""
    images = tmp_path / "images"
    images.mkdir()
    for number in range(3):
        (images / f"{number}.jpg").write_bytes(b"never decoded")
    job = Job.model_validate(
        {
            "input": {"type": "prefix", "uri": str(images)},
            "model": {"type": "torchvision", "name": "resnet18", "seed": 0},
            "task": {"type": "classification"},
            "output": {"uri": str(tmp_path / "out")},
        }
    )
    assert make_plan(job).images == 3
    return job


@pytest.mark.parametrize("locate", LOCATIONS.values(), ids=LOCATIONS)
def test_status_and_errors_take_a_path_a_uri_or_the_job(job: Job, locate: Locate) -> None:
    found = status(locate(job))
    assert (found.planned, found.parts) == (3, 0)
    assert list(read_errors(locate(job))) == []


@pytest.mark.parametrize("locate", LOCATIONS.values(), ids=LOCATIONS)
def test_discard_takes_a_path_a_uri_or_the_job(job: Job, locate: Locate) -> None:
    assert "discarded plan" in discard(locate(job))
    with pytest.raises(InvalidJob, match="discarded"):
        status(locate(job))


def test_convert_checks_its_file_before_it_lists_the_input(job: Job, tmp_path: Path) -> None:
    elsewhere = job.model_copy(update={"input": job.input.model_copy(update={"uri": str(tmp_path / "not-there")})})
    with pytest.raises(InvalidJob, match=r"-o .*no-folder"):
        api.convert(elsewhere, ConversionOptions("onnx", tmp_path / "no-folder" / "model.onnx"))
    (tmp_path / "model.onnx").touch()
    with pytest.raises(InvalidJob, match="add --force"):
        api.convert(elsewhere, ConversionOptions("onnx", tmp_path / "model.onnx"))
