"""Loader: shards in, batches out, in order, from processes that a bad image may kill without harm."""

from __future__ import annotations

import time
from collections.abc import Generator, Iterator, Sequence
from contextlib import closing
from operator import itemgetter

import torch
from torch.utils.data import DataLoader, Dataset, Sampler

from batchjob.errors import AttemptFailed, BatchjobError
from batchjob.loader.dataset import BatchRequest, ImageDataset, LoadResult, TransformFn
from batchjob.loader.fetch import Fetcher
from batchjob.loader.isolation import IsolatedLoader
from batchjob.loader.quarantine import Quarantine
from batchjob.loader.settings import LoaderConfig
from batchjob.loader.shard_queue import ShardQueue
from batchjob.storage.reader import Reader
from batchjob.types import Batch

__all__ = ["Loader"]


class Loader:
    """Loader of batches ahead of their use, in order, in replaceable processes.

    An image that kills the process which decodes it (by a crash, by taking too long or too much memory), and kills
    another one when it is tried alone, gets an error row like any other bad image.

    Args:
        reader: Reader of encoded images; copied to the loader processes.
        transform: Decode, resize and crop of one image; picklable.
        batch_size: Images in a batch; the last batch of a shard may have fewer.
        config: Loader settings. With 0 processes, batches are loaded in the thread that asks for them, and nothing is
            isolated.
        size: Last dimensions that every prepared image must have; None takes those of each batch's first good image.
        variable_size: True if images may differ in size; `size` is then ignored.
        max_bytes: Images known to be larger, in bytes, are not fetched; None for no limit.
        retries: Further reads of an image that cannot be read while its store answers.
        device: Index of the GPU for which batches are pinned; None for the current one.

    Attributes:
        config: Loader settings, without `auto`.
        batch_size: Images in a batch; a new value counts from the next shard on.
        quarantine: Images that are known to kill a process. The initial one lasts as long as the loader.
    """

    def __init__(  # noqa: PLR0913 - keyword only, and called in few places
        self,
        *,
        reader: Reader,
        transform: TransformFn,
        batch_size: int,
        config: LoaderConfig,
        size: tuple[int, ...] | None,
        variable_size: bool = False,
        max_bytes: int | None = None,
        retries: int = 2,
        device: int | None = None,
    ) -> None:
        fetcher = Fetcher(reader, max_bytes, retries)
        self._dataset = ImageDataset(fetcher, transform, size, variable_size)
        self.config, self._device = config, device
        self._isolated: IsolatedLoader | None = None
        self._deaths_before, self._callback = 0, _TimestampCallback()
        self.batch_size = batch_size
        self.quarantine = Quarantine()

    def collate(self, images: Sequence[torch.Tensor]) -> torch.Tensor | None:
        """Collate prepared images to the pixels of one batch; images that do not fit to the first are left out."""
        collator = self._dataset.make_collator(len(images), shared=self.config.processes > 0)
        for image in images:
            collator.add(image)
        return collator.to_tensor()

    @property
    def process_deaths(self) -> int:
        """Processes that have died so far, those of trials included."""
        isolated = self._isolated
        return self._deaths_before + (0 if isolated is None else isolated.process_deaths)

    def last_progress(self) -> float:
        """Return the time of the last step of loading, on the monotonic clock; 0 before the first."""
        isolated = self._isolated
        return self._callback.last_progress if isolated is None else isolated.last_progress

    def start(self) -> None:
        """Start the processes in the background. Repeated calls do nothing."""
        if self.config.processes and self._isolated is None:
            self._isolated = IsolatedLoader(self._dataset, self.config, self.quarantine, self._device)

    def batches(self, queue: ShardQueue) -> Iterator[Batch]:
        """Load one epoch: the batches of the queue's shards, in order, until it returns None.

        The next shard is taken as soon as all batches of the last one are requested. A shard without images has no
        batch; a shard that the queue does not want any more gets no further batches. A batch may have fewer images
        than `batch_size` where a process died over it. The processes stay for the next epoch.

        Raises:
            AttemptFailed: Loader processes die and no image is to blame; the next call starts new ones.
            Unavailable: The output, in which a deadly image has to be recorded, cannot be reached.
            InvalidJob: The images cannot be read with this job, for one because an extra is missing.
        """
        with closing(self._load_in_processes(queue) if self.config.processes else self._load_here(queue)) as results:
            for result in results:
                if isinstance(result, BatchjobError):
                    raise result
                yield result

    def close(self) -> None:
        """End the processes. The loader may be started again."""
        isolated, self._isolated = self._isolated, None
        if isolated is not None:
            isolated.close()
            self._deaths_before += isolated.process_deaths

    def _load_here(self, queue: ShardQueue) -> Generator[LoadResult, None, None]:
        yield from DataLoader(
            _DatasetHere(self._dataset, self._callback),
            batch_sampler=_QueueSampler(self._make_requests(queue)),
            collate_fn=itemgetter(0),
            pin_memory=self.config.pin_memory,
            generator=torch.Generator(),
        )

    def _load_in_processes(self, queue: ShardQueue) -> Generator[LoadResult, None, None]:
        if self._isolated is not None and not self._isolated.healthy:
            self.close()
        self.start()
        assert self._isolated is not None
        self._isolated.quarantine = self.quarantine
        try:
            yield from self._isolated.batches(
                self._make_requests(queue), lambda request: queue.is_wanted(request.attempt_number)
            )
        except BatchjobError:
            self.close()
            raise
        except Exception as error:
            self.close()
            raise AttemptFailed(f"the loader failed and is started anew: {type(error).__name__}: {error}") from error

    def _make_requests(self, queue: ShardQueue) -> Iterator[BatchRequest]:
        while (shard := queue.next_shard()) is not None:
            batch_size = self.batch_size
            for start in range(0, len(shard.refs), batch_size):
                if not queue.is_wanted(shard.attempt_number):
                    break
                refs = shard.refs[start : start + batch_size]
                known_errors = self.quarantine.errors_by_row(ref.position for ref in refs)
                yield BatchRequest(shard.key.index, shard.attempt_number, start, refs, known_errors)


class _TimestampCallback:
    """Callback that keeps the time of the last step, where batches are loaded in this process."""

    last_progress = 0.0

    def on_fetch(self) -> None:
        self.last_progress = time.monotonic()

    def on_image(self, row: int, etag: str | None) -> None:  # noqa: ARG002 - required by LoadCallback
        self.last_progress = time.monotonic()

    def on_send(self) -> None:
        self.last_progress = time.monotonic()


class _DatasetHere(Dataset[LoadResult]):
    """Dataset of a DataLoader without processes: an index is a request, an item a whole batch."""

    def __init__(self, images: ImageDataset, callback: _TimestampCallback) -> None:
        self._images, self._callback = images, callback

    def __getitems__(self, requests: Sequence[BatchRequest]) -> list[LoadResult]:
        return [self._images.load_batch(request, self._callback) for request in requests]


class _QueueSampler(Sampler[list[BatchRequest]]):
    """Batch sampler of a DataLoader without processes: one request after the other."""

    def __init__(self, requests: Iterator[BatchRequest]) -> None:
        self._requests = requests

    def __iter__(self) -> Iterator[list[BatchRequest]]:
        return ([request] for request in self._requests)
