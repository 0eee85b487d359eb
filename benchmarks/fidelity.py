"""Comparison of `decode.mode: fast` with `exact` over each image set: same labels, and distance of the outputs.

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
_MIN_USED_LOGIT = -500  # classes that stand for no image have lower logits, see `make_weights`


def main() -> None:
    """Compare and print a table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--work", type=Path, default=ROOT / "out" / "bench", help="images and weights")
    parser.add_argument("--images", type=int, default=300, help="of each set; of the large ones a tenth")
    parser.add_argument("--crops", default="224,32", help="sides of what the model sees, comma between")
    options = parser.parse_args()
    options.work.mkdir(parents=True, exist_ok=True)
    print(f"{'images':<10}{'crop':>6}{'number':>8}{'same label':>12}{'furthest':>10}{'median':>10}{'spread':>9}")
    for name in IMAGE_SETS:
        images = max(8, options.images // (10 if name == "large" else 1))
        folder = make_images(options.work.resolve(), name, images)
        for crop in map(int, options.crops.split(",")):
            weights = make_weights(options.work.resolve(), "mobilenet", folder, crop)
            exact, fast = (_predict_logits(folder, weights, crop, mode) for mode in ("exact", "fast"))
            same = (exact.argmax(1) == fast.argmax(1)).mean()
            distances = np.abs(exact - fast).max(1)
            print(
                f"{name:<10}{crop:>6}{len(exact):>8,}{same:>12.1%}{distances.max():>10.3g}"
                f"{np.median(distances):>10.3g}{_median_margin(exact):>9.3g}",
                flush=True,
            )


def _predict_logits(images: Path, weights: Path, crop: int, mode: str) -> np.ndarray[Any, Any]:
    """Run a job; return the logits `[n, classes]` of the classes that stand for an image, in the images' order."""
    with tempfile.TemporaryDirectory() as output:
        params = {"images": str(images), "output": output, "weights": str(weights), "model": "mobilenet"}
        overrides = [
            "task={type: raw}",
            "runtime.pool=local",
            "runtime.precision=fp32",
            "runtime.tuning=off",
            f"decode.mode={mode}",
            f"preprocess.resize={crop * 8 // 7}",
            f"preprocess.crop={crop}",
        ]
        batchjob.run(Job.from_file(_JOB, params, overrides))
        predictions = ds.dataset(Path(output) / "predictions").to_table(columns=["position", "output"])
    logits = np.stack(predictions.sort_by("position").column("output").to_numpy())
    return logits[:, logits.min(0) > _MIN_USED_LOGIT]


def _median_margin(logits: np.ndarray[Any, Any]) -> float:
    """Compute the median margin between an image's best class and the next."""
    ordered = np.sort(logits, axis=1)
    return float(np.median(ordered[:, -1] - ordered[:, -2]))


if __name__ == "__main__":
    main()
