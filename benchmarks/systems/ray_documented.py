"""Ray Data as its documentation shows it: `read_images`, `map` with transforms, `map_batches` with a class.

After https://docs.ray.io/en/latest/data/working-with-images.html, "Performing inference on images", and with
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
    """The model, once an actor."""

    def __init__(self, given: Workload) -> None:
        self.given = given
        self.model = given.load_model()

    def __call__(self, batch: dict[str, Any]) -> dict[str, Any]:
        with torch.inference_mode():
            best = self.model(torch.from_numpy(batch["image"])).softmax(dim=1).max(dim=1)
        self.given.log_progress(len(batch["path"]))
        return {"uri": batch["path"], "label_id": best.indices.numpy(), "score": best.values.numpy()}


def main() -> None:
    given = Workload.parse()
    steps: list[Any] = [transforms.ToTensor()]
    if given.crop:
        steps += [transforms.Resize(given.resize), transforms.CenterCrop(given.crop)]
    transform = transforms.Compose([*steps, transforms.Normalize(MEAN, STD)])

    def transform_image(row: dict[str, Any]) -> dict[str, Any]:
        row["image"] = transform(row["image"])
        return row

    actors = max(1, min(2, (os.cpu_count() or 2) - 1))
    images = ray.data.read_images(given.list_uris(), mode="RGB", include_paths=True).map(transform_image)
    predictions = images.map_batches(
        ImageClassifier,
        fn_constructor_args=(given,),
        compute=ray.data.ActorPoolStrategy(size=actors),
        batch_size=given.batch,
    )
    predictions.write_parquet(given.output)


if __name__ == "__main__":
    main()
