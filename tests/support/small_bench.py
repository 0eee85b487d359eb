"""Small job to measure: a model of a few weights over twelve tiny images, and a bench worker of it."""

from __future__ import annotations

import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
from PIL import Image

from batchjob.bench.bench_worker import BenchWorker, open_bench_worker
from batchjob.job.job import Job

__all__ = ["BATCH_SIZE", "IMAGES", "open_small_bench_worker", "write_small_job"]

IMAGES = 12
BATCH_SIZE = 3

_NET = """
from torch import nn


def make():
    return nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(3, 4)).eval()
"""
_JOB = """\
input: {type: prefix, uri: images/}
model: {type: python, target: "net:make"}
preprocess: {resize: [8, 8], crop: null, mean: null, std: null}
task: {type: classification, labels: [a, b, c, d]}
runtime: {pool: local, device: cpu, batch_size: 3, cpus_per_worker: 1, tuning: "off", loader: {processes: 0}}
errors: {max_rate: 0.5}
output: {uri: out}
"""


def write_small_job(folder: Path) -> Path:
    """Write the images, the model and the job file to a folder; return the path of the job file."""
    (folder / "images").mkdir()
    for number in range(IMAGES):
        Image.new("RGB", (10, 8), (number, 0, 0)).save(folder / f"images/{number:02}.png")
    (folder / "net.py").write_text(_NET)
    (folder / "job.yaml").write_text(_JOB)
    return folder / "job.yaml"


@contextmanager
def open_small_bench_worker(folder: Path, images: int) -> Iterator[BenchWorker]:
    """Open a bench worker of the job in a folder; its temporary files lie below that folder too.

    Args:
        folder: Folder that `write_small_job` has filled.
        images: Images of a run.
    """
    with pytest.MonkeyPatch.context() as patch:
        (folder / "tmp").mkdir()
        patch.setattr(tempfile, "tempdir", str(folder / "tmp"))
        patch.setenv("XDG_CACHE_HOME", str(folder / "cache"))
        job = Job.from_file(folder / "job.yaml")
        with open_bench_worker(job, images) as worker:
            yield worker
