"""Train the demo's network on one half of the digits; save its weights as safetensors, print its accuracy on the other.

This is the plain PyTorch that a user brings: nothing of batchjob is in it. The job file repeats the preprocessing.
"""

from __future__ import annotations

import argparse
import csv
from pathlib import Path

import numpy as np
import torch
from make_data import OUT
from net import digits_cnn
from PIL import Image
from safetensors.torch import save_file
from torch import Tensor, nn

__all__ = ["main"]

MEAN, STD = 0.3, 0.38  # as in digits.yaml
EPOCHS, BATCH = 15, 32


def main() -> None:
    parser = argparse.ArgumentParser(description="Train on train.csv, save digits_cnn.safetensors.")
    parser.add_argument("--data", type=Path, default=OUT, help="folder that make_data.py filled (default: %(default)s)")
    data: Path = parser.parse_args().data
    weights = data / "digits_cnn.safetensors"
    if weights.exists():  # new weights would make it another job, which the old output refuses
        print(f"{weights} is there already")
        return
    torch.manual_seed(0)
    model = fit(digits_cnn(), *load(data / "train.csv"))
    pixels, truth = load(data / "manifest.csv")
    with torch.inference_mode():
        right = int((model(pixels).argmax(1) == truth).sum())
    unfinished = weights.with_suffix(".unfinished")
    save_file(model.state_dict(), unfinished)
    unfinished.rename(weights)
    print(f"held-out accuracy {right / len(truth):.4f} ({right} of {len(truth)}); weights in {weights}")


def load(manifest: Path) -> tuple[Tensor, Tensor]:
    """Images as normalised float `[n, 1, 8, 8]`, and their digits."""
    with manifest.open(newline="") as file:
        rows = list(csv.DictReader(file))
    images = [np.asarray(Image.open(manifest.parent / row["path"])) for row in rows]
    pixels = torch.from_numpy(np.stack(images)).unsqueeze(1).float() / 255
    return (pixels - MEAN) / STD, torch.tensor([int(row["truth"]) for row in rows])


def fit(model: nn.Module, pixels: Tensor, truth: Tensor) -> nn.Module:
    optimiser = torch.optim.AdamW(model.parameters(), lr=3e-3)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimiser, EPOCHS)
    for _ in range(EPOCHS):
        for batch in torch.randperm(len(truth)).split(BATCH):
            loss = nn.functional.cross_entropy(model(pixels[batch]), truth[batch])
            optimiser.zero_grad()
            loss.backward()
            optimiser.step()
        schedule.step()
    return model.eval()


if __name__ == "__main__":
    main()
