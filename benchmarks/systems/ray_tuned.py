"""Ray Data tuned to win: nothing but names and labels travels through the object store.

One actor for each core reads, decodes and predicts whole batches: uint8 until the model, normalised in one step for the
batch, compiled with frozen weights, one thread each. The head node starts without its dashboard and with enough memory.
"""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import ray
import simplejpeg
import torch

from benchmarks.workload import Workload, normalize


class ImagePredictor:
    """Decoder and model, once in each actor."""

    def __init__(self, workload: Workload) -> None:
        torch.set_num_threads(1)
        self.workload, self.transform = workload, workload.make_fast_transform()
        self.model = torch.compile(workload.load_model(), dynamic=False, options={"freezing": True})

    def __call__(self, batch: dict[str, Any]) -> dict[str, Any]:
        uris = batch["uri"]
        pixels = torch.stack([self.load(uri) for uri in uris])
        short = self.workload.batch - len(uris)
        with torch.inference_mode():  # a short last batch is padded, else it would be compiled for its own shape
            filled = torch.cat([pixels, pixels[:1].expand(short, -1, -1, -1)]) if short else pixels
            best = self.model(normalize(filled)).softmax(dim=1).max(dim=1)
        self.workload.log_progress(len(uris))
        n = len(uris)
        return {"uri": uris, "label_id": best.indices[:n].numpy(), "score": best.values[:n].numpy()}

    def load(self, uri: str) -> torch.Tensor:
        """Load an image as uint8 `[3, h, w]`, in the size that the model takes."""
        image = simplejpeg.decode_jpeg(Path(uri).read_bytes(), colorspace="RGB")
        pixels: torch.Tensor = self.transform(torch.from_numpy(image).permute(2, 0, 1))
        return pixels


def main() -> None:
    workload = Workload.parse()
    cores = os.cpu_count() or 1
    ray.init(include_dashboard=False, object_store_memory=2 << 30, log_to_driver=False)
    ray.data.DataContext.get_current().enable_progress_bars = False
    # Reading names and writing rows take a moment each: a tenth of a core, so that the actors get whole cores.
    names = ray.data.from_items([{"uri": uri} for uri in workload.list_uris()], override_num_blocks=4 * cores)
    predictions = names.map_batches(
        ImagePredictor,
        fn_constructor_args=(workload,),
        compute=ray.data.ActorPoolStrategy(size=cores),
        batch_size=workload.batch,
        num_cpus=0.9,
    )
    predictions.write_parquet(workload.output, ray_remote_args={"num_cpus": 0.1})


if __name__ == "__main__":
    main()
