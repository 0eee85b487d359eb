"""A few images prepared one by one, to look at before a run; in a process of their own, since one may be deadly."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import replace

import pyarrow as pa
import torch

from batchjob.errors import Unavailable
from batchjob.loader.dataset import TransformFn
from batchjob.loader.loader import Loader
from batchjob.loader.settings import LoaderConfig
from batchjob.loader.shard_queue import ShardQueue
from batchjob.storage.reader import Reader
from batchjob.types import ErrorRecord, ImageRef, Shard, ShardKey

__all__ = ["load_samples"]


def load_samples(
    reader: Reader,
    transform: TransformFn,
    locations: Iterable[str],
    config: LoaderConfig,
    max_bytes: int | None = None,
) -> Iterator[torch.Tensor | ErrorRecord]:
    """Load images one by one, prepared for a batch; an image that fails gives the error that its row would hold.

    Args:
        reader: Reader of the locations.
        transform: Decode, resize and crop of one image; picklable.
        locations: URIs of images.
        config: Loader settings; at most one process is used.
        max_bytes: Images that are larger, in bytes, are not read, as in the run; None for no limit.

    Raises:
        Unavailable: The store cannot be reached.
        AttemptFailed: Processes die and no image is to blame.
    """
    refs = tuple(ImageRef(position, location, location) for position, location in enumerate(locations))
    one_process = replace(config, processes=min(config.processes, 1), prefetch=1, pin_memory=False)
    loader = Loader(
        reader=reader, transform=transform, batch_size=1, config=one_process, size=None, max_bytes=max_bytes
    )
    shard = Shard(ShardKey(0, "", len(refs), 0, 0), refs, pa.table({}))
    try:
        for batch in loader.batches(ShardQueue.of([shard])):
            if batch.attempt_error is not None:
                raise Unavailable(batch.attempt_error)
            if batch.pixels is not None:
                yield batch.pixels[0]
            elif batch.image_infos and (error := batch.image_infos[0].error) is not None:
                yield error
    finally:
        loader.close()
