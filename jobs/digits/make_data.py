"""Write scikit-learn's 1,797 handwritten digits as PNG files, with one manifest for training and one for prediction.

Writes to the folder `out/digits` of this repository, or to `--out`:

    images/0000.png …    8×8 pixels, grey
    train.csv            columns path,truth of every second image, for train.py
    manifest.csv         columns path,truth of the others, the input of the job
"""

from __future__ import annotations

import argparse
import csv
from pathlib import Path

from PIL import Image
from sklearn.datasets import load_digits

__all__ = ["DATA_FOLDER", "main"]

DATA_FOLDER = Path(__file__).resolve().parents[2] / "out" / "digits"


def main() -> None:
    parser = argparse.ArgumentParser(description="Write the digits as PNG files with two manifests.")
    parser.add_argument("--out", type=Path, default=DATA_FOLDER, help="folder to fill (default: %(default)s)")
    folder: Path = parser.parse_args().out
    manifest = folder / "manifest.csv"
    # It is written last. A run may be reading it, and a rewritten file counts as a changed input.
    if manifest.exists():
        print(f"{manifest} is there already")
        return
    digits = load_digits()
    (folder / "images").mkdir(parents=True, exist_ok=True)
    rows = []
    for number, (pixels, truth) in enumerate(zip(digits.images, digits.target, strict=True)):
        path = f"images/{number:04d}.png"
        # scikit-learn states grey levels from 0 to 16.
        Image.fromarray((pixels * 255 / 16).round().astype("uint8")).save(folder / path)
        rows.append((path, int(truth)))
    write_manifest(folder / "train.csv", rows[0::2])
    write_manifest(manifest, rows[1::2])
    print(f"{len(rows)} images in {folder}: {len(rows[0::2])} to train on, {len(rows[1::2])} to predict")


def write_manifest(path: Path, rows: list[tuple[str, int]]) -> None:
    """Write a CSV file, under its own name only once it is complete."""
    unfinished = path.with_suffix(".unfinished")
    with unfinished.open("w", newline="") as file:
        writer = csv.writer(file, lineterminator="\n")
        writer.writerow(("path", "truth"))
        writer.writerows(rows)
    unfinished.rename(path)


if __name__ == "__main__":
    main()
