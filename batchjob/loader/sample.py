"""A few images prepared one by one, to look at them: in a process of their own, for one of them may be deadly."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import replace
from typing import TYPE_CHECKING

import pyarrow as pa

from batchjob.errors import Unavailable
from batchjob.loader.dataset import TransformFn
from batchjob.loader.loader import Loader
from batchjob.loader.settings import LoaderConfig
from batchjob.loader.shard_queue import ShardQueue
from batchjob.storage.reader import Reader
from batchjob.types import ImageRef, Shard, ShardKey

if TYPE_CHECKING:
    import torch

__all__ = ["load_samples"]


def load_samples(
    reader: Reader, transform: TransformFn, locations: Iterable[str], config: LoaderConfig
) -> Iterator[torch.Tensor]:
    """The images there as they go into a batch; those that cannot be read or decoded are left out.

    Args:
        reader: of the locations.
        prepare: decode and geometry; picklable.
        locations: of images.
        plan: from `settle`; no more than one process is used.

    Raises:
        Unavailable: the store cannot be reached.
        AttemptFailed: processes die, and no image is to blame.
    """
    refs = tuple(ImageRef(at, location, location) for at, location in enumerate(locations))
    one = replace(config, processes=min(config.processes, 1), prefetch=1, pin_memory=False)
    loader = Loader(reader=reader, transform=transform, batch_size=1, config=one, size=None)
    shard = Shard(ShardKey(0, "", len(refs), 0, 0), refs, pa.table({}))
    try:
        for batch in loader.batches(ShardQueue.of([shard])):
            if batch.attempt_error is not None:
                raise Unavailable(batch.attempt_error)
            if batch.pixels is not None:
                yield batch.pixels[0]
    finally:
        loader.close()
