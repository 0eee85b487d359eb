"""The loop of PyTorch's tutorials: a Dataset, a DataLoader of two workers, `inference_mode`, Parquet at the end.

Images are decoded and prepared as https://docs.pytorch.org/vision/stable/models.html does it: `decode_image`, and the
transforms of the weights. Remote images are read through fsspec.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import fsspec
import numpy as np
import pandas as pd
import torch
from torch.utils.data import DataLoader, Dataset
from torchvision import transforms
from torchvision.io import decode_image

from benchmarks.workload import MEAN, STD, Workload


class ImageFiles(Dataset[Any]):
    """Images by their place in the list, as the model wants them."""

    def __init__(self, given: Workload) -> None:
        self.uris = given.list_uris()
        self.transform = transforms.Compose(
            [given.make_transform(), transforms.ConvertImageDtype(torch.float), transforms.Normalize(MEAN, STD)]
        )

    def __len__(self) -> int:
        return len(self.uris)

    def __getitem__(self, index: int) -> tuple[str, Any]:
        uri = self.uris[index]
        return uri, self.transform(decode_image(read_encoded(uri), mode="RGB"))


def read_encoded(uri: str) -> Any:
    """What `decode_image` takes: a path, or the bytes."""
    if "://" not in uri:
        return uri
    with fsspec.open(uri, "rb") as file:
        return torch.from_numpy(np.frombuffer(file.read(), dtype=np.uint8).copy())


def main() -> None:
    given = Workload.parse()
    context = "spawn" if "://" in given.images else None  # S3 clients do not survive a fork
    loader = DataLoader(ImageFiles(given), given.batch, num_workers=2, multiprocessing_context=context)
    model = given.load_model()
    uris: list[str] = []
    labels: list[int] = []
    scores: list[float] = []
    with torch.inference_mode():
        for names, pixels in loader:
            best = model(pixels).softmax(dim=1).max(dim=1)
            uris += names
            labels += best.indices.tolist()
            scores += best.values.tolist()
            given.log_progress(len(names))
    if "://" not in given.output:
        Path(given.output).mkdir(parents=True, exist_ok=True)
    table = pd.DataFrame({"uri": uris, "label_id": labels, "score": scores})
    table.to_parquet(f"{given.output}/predictions.parquet")


if __name__ == "__main__":
    main()
