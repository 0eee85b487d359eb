"""A job whose model hangs, exits or raises at a black picture, as the environment variable BATCHJOB_TEST_HARM says."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path

from PIL import Image

__all__ = ["CUDA_ASSERT", "CUDA_ECC_ERROR", "write_harmful_job"]

CUDA_ASSERT = "CUDA error: device-side assert triggered"
CUDA_ECC_ERROR = "CUDA error: uncorrectable ECC error encountered"

# BATCHJOB_TEST_HARM: with `hang` the model hangs, with `exit` it exits; any other text is the message of its error.
NET = """\
import os
import threading

from torch import nn


class Net(nn.Module):
    def forward(self, x):
        harm = os.environ.get("BATCHJOB_TEST_HARM", "")
        if harm and (x.flatten(1).amax(1) == 0).any():
            if harm == "hang":
                threading.Event().wait()
            if harm == "exit":
                os._exit(9)
            raise RuntimeError(harm)
        return x.mean(dim=(2, 3))


def make():
    return Net()
"""

JOB = """\
input: {type: manifest, uri: manifest.csv, uri_column: file}
model: {type: python, target: "net:make"}
preprocess: {resize: null, crop: [8, 8], mean: null, std: null}
task: {type: embedding}
runtime: {pool: local, device: cpu, batch_size: 4, shard_size: 8, tuning: "off", loader: {processes: 0}}
errors: {max_rate: 1}
output: {uri: out}
"""


def write_harmful_job(folder: Path, image_count: int, black_positions: Iterable[int]) -> str:
    """Write the job with its images, those at some positions black; return the path of the job file."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "net.py").write_text(NET)
    (folder / "job.yaml").write_text(JOB)
    names = ["black.png" if position in set(black_positions) else "white.png" for position in range(image_count)]
    (folder / "manifest.csv").write_text("\n".join(["file", *names, ""]))
    for name, shade in (("black", 0), ("white", 255)):
        Image.new("RGB", (8, 8), (shade, shade, shade)).save(folder / f"{name}.png")
    return str(folder / "job.yaml")
