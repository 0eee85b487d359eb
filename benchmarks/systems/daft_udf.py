"""Daft: `download` and `decode_image` by its own engine, then a class that holds the model, in batches.

After https://docs.daft.ai/en/stable/modalities/images/ and https://docs.daft.ai/en/stable/custom-code/cls/. Its own
`resize` neither keeps proportions nor smooths as torchvision does, so the geometry is done in the class.
"""

from __future__ import annotations

from typing import Any

import daft
import torch
from daft import DataType, col

from benchmarks.workload import Workload, normalise

FIELDS = DataType.struct({"label_id": DataType.int64(), "score": DataType.float32()})


def main() -> None:
    given = Workload.parse()

    @daft.cls(cpus=1, max_concurrency=1)
    class Classifier:
        def __init__(self) -> None:
            self.geometry, self.model = given.make_transform(), given.load_model()

        @daft.method.batch(return_dtype=FIELDS, unnest=True, batch_size=given.batch)  # type: ignore[untyped-decorator]
        def classify(self, images: daft.Series) -> list[dict[str, Any]]:
            prepared = [self.geometry(torch.from_numpy(image).permute(2, 0, 1)) for image in images.to_pylist()]
            with torch.inference_mode():
                best = self.model(normalise(torch.stack(prepared))).softmax(dim=1).max(dim=1)
            given.log_progress(len(prepared))
            found = zip(best.indices.tolist(), best.values.tolist(), strict=True)
            return [{"label_id": label, "score": score} for label, score in found]

    frame = daft.from_pydict({"uri": given.list_uris()})
    frame = frame.with_column("image", col("uri").download().decode_image(mode="RGB"))
    frame.select(col("uri"), Classifier().classify(col("image"))).write_parquet(given.output)


if __name__ == "__main__":
    main()
