"""Loop of PyTorch's tutorials: a Dataset, a DataLoader of two workers, `inference_mode`, Parquet at the end.

Images are decoded and prepared as https://docs.pytorch.org/vision/stable/models.html shows: `decode_image`, and the
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
    """Dataset of images by their place in the list, prepared for the model."""

    def __init__(self, workload: Workload) -> None:
        self.uris = workload.list_uris()
        self.transform = transforms.Compose(
            [workload.make_transform(), transforms.ConvertImageDtype(torch.float), transforms.Normalize(MEAN, STD)]
        )

    def __len__(self) -> int:
        return len(self.uris)

    def __getitem__(self, index: int) -> tuple[str, Any]:
        uri = self.uris[index]
        return uri, self.transform(decode_image(read_encoded(uri), mode="RGB"))


def read_encoded(uri: str) -> Any:
    """Return an input for `decode_image`: a path, or the bytes."""
    if "://" not in uri:
        return uri
    with fsspec.open(uri, "rb") as file:
        return torch.from_numpy(np.frombuffer(file.read(), dtype=np.uint8).copy())


def main() -> None:
    workload = Workload.parse()
    context = "spawn" if "://" in workload.images else None  # S3 clients do not survive a fork
    loader = DataLoader(ImageFiles(workload), workload.batch, num_workers=2, multiprocessing_context=context)
    model = workload.load_model()
    uris: list[str] = []
    labels: list[int] = []
    scores: list[float] = []
    with torch.inference_mode():
        for names, pixels in loader:
            best = model(pixels).softmax(dim=1).max(dim=1)
            uris += names
            labels += best.indices.tolist()
            scores += best.values.tolist()
            workload.log_progress(len(names))
    if "://" not in workload.output:
        Path(workload.output).mkdir(parents=True, exist_ok=True)
    table = pd.DataFrame({"uri": uris, "label_id": labels, "score": scores})
    table.to_parquet(f"{workload.output}/predictions.parquet")


if __name__ == "__main__":
    main()
