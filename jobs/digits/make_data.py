"""Write scikit-learn's 1,797 handwritten digits as PNG files, with one manifest per half: one to train, one to predict.

Leaves in the folder (default `out/digits` of this repository):

    images/0000.png …    8x8, grey
    train.csv            path,truth of every second image, for train.py
    manifest.csv         path,truth of the others: the job's input
"""

from __future__ import annotations

import argparse
import csv
from pathlib import Path

from PIL import Image
from sklearn.datasets import load_digits

__all__ = ["OUT", "main"]

OUT = Path(__file__).resolve().parents[2] / "out" / "digits"


def main() -> None:
    parser = argparse.ArgumentParser(description="Write the digits as PNG files with two manifests.")
    parser.add_argument("--out", type=Path, default=OUT, help="folder to fill (default: %(default)s)")
    out: Path = parser.parse_args().out
    manifest = out / "manifest.csv"
    if manifest.exists():  # written last: a run may be using it, and a rewritten file counts as a changed one
        print(f"{manifest} is there already")
        return
    digits = load_digits()
    (out / "images").mkdir(parents=True, exist_ok=True)
    rows = []
    for number, (pixels, truth) in enumerate(zip(digits.images, digits.target, strict=True)):
        path = f"images/{number:04d}.png"
        Image.fromarray((pixels * 255 / 16).round().astype("uint8")).save(out / path)
        rows.append((path, int(truth)))
    write(out / "train.csv", rows[0::2])
    write(manifest, rows[1::2])
    print(f"{len(rows)} images in {out}: {len(rows[0::2])} to train on, {len(rows[1::2])} to predict")


def write(path: Path, rows: list[tuple[str, int]]) -> None:
    unfinished = path.with_suffix(".unfinished")
    with unfinished.open("w", newline="") as file:
        writer = csv.writer(file, lineterminator="\n")
        writer.writerow(("path", "truth"))
        writer.writerows(rows)
    unfinished.rename(path)


if __name__ == "__main__":
    main()
