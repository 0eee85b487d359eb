"""Ray Data as its documentation shows it: `read_images`, `map` with transforms, `map_batches` with a class.

Follows https://docs.ray.io/en/latest/data/working-with-images.html, "Performing inference on images", and with
its `write_parquet`. Its two actors would take both cores of a small machine and leave none to read: one core is left.
"""

from __future__ import annotations

import os
from typing import Any

import ray
import torch
from torchvision import transforms

from benchmarks.workload import MEAN, STD, Workload


class ImageClassifier:
    """Model, loaded once in each actor."""

    def __init__(self, workload: Workload) -> None:
        self.workload = workload
        self.model = workload.load_model()

    def __call__(self, batch: dict[str, Any]) -> dict[str, Any]:
        with torch.inference_mode():
            best = self.model(torch.from_numpy(batch["image"])).softmax(dim=1).max(dim=1)
        self.workload.log_progress(len(batch["path"]))
        return {"uri": batch["path"], "label_id": best.indices.numpy(), "score": best.values.numpy()}


def main() -> None:
    workload = Workload.parse()
    steps: list[Any] = [transforms.ToTensor()]
    if workload.crop:
        steps += [transforms.Resize(workload.resize), transforms.CenterCrop(workload.crop)]
    transform = transforms.Compose([*steps, transforms.Normalize(MEAN, STD)])

    def transform_image(row: dict[str, Any]) -> dict[str, Any]:
        row["image"] = transform(row["image"])
        return row

    actors = max(1, min(2, (os.cpu_count() or 2) - 1))
    images = ray.data.read_images(workload.list_uris(), mode="RGB", include_paths=True).map(transform_image)
    predictions = images.map_batches(
        ImageClassifier,
        fn_constructor_args=(workload,),
        compute=ray.data.ActorPoolStrategy(size=actors),
        batch_size=workload.batch,
    )
    predictions.write_parquet(workload.output)


if __name__ == "__main__":
    main()
