"""`decode.mode: fast` against `exact`, over each image set: the same labels? How far are the outputs apart?

    python -m benchmarks.fidelity [--work out/bench] [--images 300] [--crops 224,32]

Both are whole jobs on the `local` pool, with the task `raw`; the weights are those of `benchmarks.compare`.
"""

from __future__ import annotations

import argparse
import tempfile
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.dataset as ds

import batchjob
from batchjob import Job
from benchmarks.image_sets import IMAGE_SETS, make_images, make_weights
from benchmarks.system_run import ROOT

_JOB = Path(__file__).with_name("job.yaml")


def main() -> None:
    asked = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    asked.add_argument("--work", type=Path, default=ROOT / "out" / "bench", help="images and weights")
    asked.add_argument("--images", type=int, default=300, help="of each set; of the large ones a tenth")
    asked.add_argument("--crops", default="224,32", help="sides of what the model sees, comma between")
    given = asked.parse_args()
    given.work.mkdir(parents=True, exist_ok=True)
    print(f"{'images':<10}{'crop':>6}{'number':>8}{'same label':>12}{'furthest':>10}{'median':>10}{'spread':>9}")
    for name in IMAGE_SETS:
        images = max(8, given.images // (10 if name == "large" else 1))
        folder = make_images(given.work.resolve(), name, images)
        for crop in map(int, given.crops.split(",")):
            weights = make_weights(given.work.resolve(), "mobilenet", folder, crop)
            exact, fast = (_outputs(folder, weights, crop, mode) for mode in ("exact", "fast"))
            same = (exact.argmax(1) == fast.argmax(1)).mean()
            apart = np.abs(exact - fast).max(1)
            print(
                f"{name:<10}{crop:>6}{len(exact):>8,}{same:>12.1%}{apart.max():>10.3g}{np.median(apart):>10.3g}"
                f"{_spread(exact):>9.3g}",
                flush=True,
            )


def _outputs(images: Path, weights: Path, crop: int, mode: str) -> np.ndarray[Any, Any]:
    """The model's logits, `[n, classes]`, in the images' order; those that stand for a class."""
    with tempfile.TemporaryDirectory() as out:
        params = {"images": str(images), "output": out, "weights": str(weights), "model": "mobilenet"}
        settings = [
            "task={type: raw}",
            "runtime.pool=local",
            "runtime.precision=fp32",
            "runtime.tuning=off",
            f"decode.mode={mode}",
            f"preprocess.resize={crop * 8 // 7}",
            f"preprocess.crop={crop}",
        ]
        batchjob.run(Job.from_file(_JOB, params, settings))
        table = ds.dataset(Path(out) / "predictions").to_table(columns=["position", "output"]).sort_by("position")
    logits = np.stack(table.column("output").to_numpy())
    return logits[:, logits.min(0) > -500]


def _spread(logits: np.ndarray[Any, Any]) -> float:
    """By how much an image's likeliest class leads the next, at the median."""
    ordered = np.sort(logits, axis=1)
    return float(np.median(ordered[:, -1] - ordered[:, -2]))


if __name__ == "__main__":
    main()
