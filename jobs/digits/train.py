"""Train the example network on half of the digits; save its weights as safetensors, print its accuracy on the others.

This is plain PyTorch, as users bring it, without batchjob. The job file digits.yaml repeats its preprocessing.
"""

from __future__ import annotations

import argparse
import csv
from pathlib import Path

import numpy as np
import torch
from make_data import DATA_FOLDER
from net import digits_cnn
from PIL import Image
from safetensors.torch import save_file
from torch import Tensor, nn

__all__ = ["main"]

MEAN, STD = 0.3, 0.38  # as in digits.yaml
EPOCHS, BATCH_SIZE = 15, 32


def main() -> None:
    parser = argparse.ArgumentParser(description="Train on train.csv, save digits_cnn.safetensors.")
    parser.add_argument(
        "--data", type=Path, default=DATA_FOLDER, help="folder that make_data.py filled (default: %(default)s)"
    )
    data: Path = parser.parse_args().data
    weights = data / "digits_cnn.safetensors"
    # New weights would change the job's fingerprint, and its existing output would refuse it.
    if weights.exists():
        print(f"{weights} is there already")
        return
    torch.manual_seed(0)
    model = train(digits_cnn(), *load_images(data / "train.csv"))
    pixels, truth = load_images(data / "manifest.csv")
    with torch.inference_mode():
        correct = int((model(pixels).argmax(1) == truth).sum())
    unfinished = weights.with_suffix(".unfinished")
    save_file(model.state_dict(), unfinished)
    unfinished.rename(weights)
    print(f"held-out accuracy {correct / len(truth):.4f} ({correct} of {len(truth)}); weights in {weights}")


def load_images(manifest: Path) -> tuple[Tensor, Tensor]:
    """Load the images of a manifest as normalised float32 `[n, 1, 8, 8]`, and their digits as int64 `[n]`."""
    with manifest.open(newline="") as file:
        rows = list(csv.DictReader(file))
    images = [np.asarray(Image.open(manifest.parent / row["path"])) for row in rows]
    pixels = torch.from_numpy(np.stack(images)).unsqueeze(1).float() / 255
    return (pixels - MEAN) / STD, torch.tensor([int(row["truth"]) for row in rows])


def train(model: nn.Module, pixels: Tensor, truth: Tensor) -> nn.Module:
    """Train a model, and return it in eval mode."""
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, EPOCHS)
    for _ in range(EPOCHS):
        for indices in torch.randperm(len(truth)).split(BATCH_SIZE):
            loss = nn.functional.cross_entropy(model(pixels[indices]), truth[indices])
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
        schedule.step()
    return model.eval()


if __name__ == "__main__":
    main()
