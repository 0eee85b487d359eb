"""Example jobs in jobs/."""

from __future__ import annotations

from pathlib import Path

import pytest

from batchjob.job.job import Job

JOBS = Path(__file__).parents[2] / "jobs"


@pytest.mark.parametrize("file", ["cifar10_resnet20/job.yaml", "imagenet_resnet50.yaml", "embed_resnet50.yaml"])
def test_example_job_is_valid(file: str) -> None:
    Job.from_file(JOBS / file)
