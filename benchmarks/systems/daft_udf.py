"""Daft: `download` and `decode_image` of its own engine, then a class that holds the model, in batches.

Follows https://docs.daft.ai/en/stable/modalities/images/ and https://docs.daft.ai/en/stable/custom-code/cls/. Its own
`resize` neither keeps proportions nor antialiases as torchvision does, so the class resizes and crops.
"""

from __future__ import annotations

from typing import Any

import daft
import torch
from daft import DataType, col

from benchmarks.workload import Workload, normalize

FIELDS = DataType.struct({"label_id": DataType.int64(), "score": DataType.float32()})


def main() -> None:
    workload = Workload.parse()

    @daft.cls(cpus=1, max_concurrency=1)
    class Classifier:
        def __init__(self) -> None:
            self.transform, self.model = workload.make_transform(), workload.load_model()

        @daft.method.batch(return_dtype=FIELDS, unnest=True, batch_size=workload.batch)  # type: ignore[untyped-decorator]
        def classify(self, images: daft.Series) -> list[dict[str, Any]]:
            prepared = [self.transform(torch.from_numpy(image).permute(2, 0, 1)) for image in images.to_pylist()]
            with torch.inference_mode():
                best = self.model(normalize(torch.stack(prepared))).softmax(dim=1).max(dim=1)
            workload.log_progress(len(prepared))
            results = zip(best.indices.tolist(), best.values.tolist(), strict=True)
            return [{"label_id": label, "score": score} for label, score in results]

    frame = daft.from_pydict({"uri": workload.list_uris()})
    frame = frame.with_column("image", col("uri").download().decode_image(mode="RGB"))
    frame.select(col("uri"), Classifier().classify(col("image"))).write_parquet(workload.output)


if __name__ == "__main__":
    main()
