"""Job over a few tiny pictures, with a model that returns the mean of each channel."""

from __future__ import annotations

import io
from pathlib import Path
from typing import Any

from PIL import Image

__all__ = ["encode_image", "encode_red_image", "write_tiny_job"]

MEAN_NET = """\
import torch
from torch import nn


class Mean(nn.Module):
    def forward(self, x):
        return x.mean(dim=(2, 3))


class Differentiates(nn.Module):
    def forward(self, x):
        with torch.enable_grad():
            x = x.detach().requires_grad_()
            (slope,) = torch.autograd.grad((x * x).sum(), x)
        return slope.mean(dim=(2, 3))


def mean():
    return Mean()


def differentiates():
    return Differentiates()
"""

MEAN_JOB = """\
input: {type: manifest, uri: manifest.csv, uri_column: file}
model: {type: python, target: "net:mean"}
preprocess: {resize: [8, 8], crop: null, mean: null, std: null, exif: apply}
task: {type: embedding}
runtime: {pool: local, device: cpu, shard_size: 5, loader: {processes: 0}}
errors: {max_rate: 1}
output: {uri: out}
"""


def encode_image(image: Image.Image, **options: Any) -> bytes:
    """Encode an image; `options` go to `Image.save`."""
    buffer = io.BytesIO()
    image.save(buffer, **options)
    return buffer.getvalue()


def encode_red_image(**options: Any) -> bytes:
    """Encode a picture of 40 by 20 pixels whose channels have the means 1, 0 and 0.2."""
    return encode_image(Image.new("RGB", (40, 20), (255, 0, 51)), **options)


def write_tiny_job(folder: Path, manifest: str) -> None:
    """Write `job.yaml`, `net.py` and `manifest.csv`; the manifest's column `file` names the images."""
    (folder / "manifest.csv").write_text(manifest)
    (folder / "net.py").write_text(MEAN_NET)
    (folder / "job.yaml").write_text(MEAN_JOB)
