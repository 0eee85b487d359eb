"""Doubts about models and transforms that work: rows by chance, rows of their batch, and NaN."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from batchjob.inference.doubts import doubt_model, doubt_transform
from tests.support.loaded_worker import load_worker, write_job

IMAGES = torch.rand(1, 3, 16, 16, generator=torch.Generator().manual_seed(0)).expand(2, -1, -1, -1)


class SmallNet(nn.Module):
    """Network with layers that depend on the mode."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.norm, self.dropout, self.fc = (
            nn.Conv2d(3, 8, 3),
            nn.BatchNorm2d(8),
            nn.Dropout(0.5),
            nn.Linear(8, 5),
        )

    def forward(self, images: torch.Tensor) -> Any:
        return self.fc(self.dropout(self.norm(self.conv(images)).mean((2, 3))))


class TrainingNet(SmallNet):
    """Network whose code calls `train()`."""

    def forward(self, images: torch.Tensor) -> Any:
        self.train()
        return super().forward(images)


class RandomNet(SmallNet):
    """Network with dropout that is always at work."""

    def forward(self, images: torch.Tensor) -> Any:
        return nn.functional.dropout(super().forward(images), 0.5, training=True)


class NanNet(SmallNet):
    """Network that divides zero by zero, in one of its outputs."""

    def forward(self, images: torch.Tensor) -> Any:
        scores = super().forward(images)
        return {"scores": scores, "ratio": scores * 0 / 0}


class HalfNet(SmallNet):
    """Network that rounds, and returns numbers that are no rows."""

    def forward(self, images: torch.Tensor) -> Any:
        return super().forward(images).half(), torch.arange(2.0)[None], torch.arange(2)


@pytest.mark.parametrize(
    ("module", "doubt"),
    [
        (SmallNet(), ""),
        (HalfNet(), ""),
        (TrainingNet(), "doubt: norm computes in training mode"),
        (RandomNet(), "doubt: the model gives one image two different rows"),
        (NanNet(), "doubt: the model gives NaN for an example image"),
    ],
)
def test_doubts_about_a_model(module: nn.Module, doubt: str) -> None:
    torch.manual_seed(0)
    module.eval()
    with torch.no_grad():
        doubts = doubt_model(module, module(IMAGES))
    assert [text[: len(doubt)] for text in doubts] == ([doubt] if doubt else [])


def test_transform_that_makes_other_pixels_each_time_is_doubted() -> None:
    assert doubt_transform([IMAGES[0], IMAGES[0]]) == []
    assert doubt_transform([IMAGES[0]]) == doubt_transform([]) == []
    (other_pixels,) = doubt_transform([IMAGES[0], IMAGES[0] + 1])
    (other_size,) = doubt_transform([IMAGES[0], IMAGES[0][:, 1:]])
    assert other_pixels == other_size
    assert other_pixels.startswith("doubt: preprocess.transform is random")


@pytest.mark.parametrize(("crop", "doubts"), [("RandomCrop", 1), ("CenterCrop", 0)])
def test_worker_tells_of_a_random_transform(crop: str, doubts: int, tmp_path: Path) -> None:
    job = write_job(tmp_path, "preprocess={transform: 'steps:steps'}", images=2)
    noise = "pixels + torch.arange(64).view(1, 8, 8).byte()"
    (job.folder / "steps.py").write_text(
        f"import torch\nfrom torchvision.transforms import v2\ncrop = v2.{crop}(4)\n"
        f"def steps(pixels): return crop({noise}).float()\n"
    )
    torch.manual_seed(1)
    with load_worker(job, sample=(str(tmp_path / "white.png"),)) as loaded:
        assert [note[:38] for note in loaded.info.notes] == ["doubt: preprocess.transform is random:"] * doubts
