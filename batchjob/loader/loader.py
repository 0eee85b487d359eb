"""The face of the loader: shards in, batches out, in order, whatever becomes of the processes behind it."""

from __future__ import annotations

import time
from collections.abc import Generator, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import closing
from typing import TYPE_CHECKING

from batchjob.concurrency import start_forkserver
from batchjob.errors import AttemptFailed, BatchjobError
from batchjob.loader.dataset import BatchRequest, ImageDataset, TransformFn
from batchjob.loader.fetch import Fetcher
from batchjob.loader.isolation import LoaderProcessPool
from batchjob.loader.quarantine import Quarantine
from batchjob.loader.settings import LoaderConfig
from batchjob.loader.shard_queue import ShardQueue
from batchjob.storage.reader import Reader
from batchjob.types import Batch

if TYPE_CHECKING:
    import torch

__all__ = ["Loader"]


class Loader:
    """Fetches and decodes batches ahead of their use, in order, in processes that are cheap to replace.

    An image that kills the process which decodes it, by a crash, by taking too long or too much memory, and does so
    again when it is tried alone, is a fault in its place like any other.

    Args:
        reader: reads encoded images; goes to the loader processes.
        prepare: decode and geometry; picklable.
        batch_size: images in a batch; the last of a shard may have fewer.
        plan: from `settle`; with 0 processes this one works, as the batches are asked for, and nothing is isolated.
        size: the last dimensions every prepared image must have; None takes the first good image of each batch.
        varying: images may differ in size; `size` says nothing then.
        max_bytes: images known to be larger are not fetched.
        retries: how often an image that cannot be read is asked for again while its store answers.
        divided: in place of `prepare`, where a device decodes a part of the images; likewise picklable.

    Attributes:
        batch_size: images in a batch; another one counts from the next shard on.
        quarantine: of deadly images; until another one is given, it lasts as long as the loader.
    """

    def __init__(  # noqa: PLR0913 - all by keyword, from the few places that put a loader together
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
        split_transform: TransformFn | None = None,
    ) -> None:
        self._images = ImageDataset(
            Fetcher(reader, max_bytes, retries), transform, size, variable_size, split_transform
        )
        self._plan = config
        self._running: Future[LoaderProcessPool] | None = None
        self._lost, self._own = 0, _TimestampCallback()
        self.batch_size = batch_size
        self.quarantine = Quarantine()

    @property
    def config(self) -> LoaderConfig:
        """As it was given."""
        return self._plan

    def collate(self, images: Sequence[torch.Tensor]) -> torch.Tensor | None:
        """Prepared images as the pixels of one batch; what does not go with the first of them is left out."""
        room = self._images.make_collator(len(images), shared=self._plan.processes > 0)
        for image in images:
            room.add(image)
        return room.to_tensor()

    @property
    def process_deaths(self) -> int:
        """Processes that died so far, those in which suspects were tried alone included."""
        crew = self._crew_at_work()
        return self._lost + (crew.process_deaths if crew is not None else 0)

    def last_progress(self) -> float:
        """When loading was last seen to have come a step further, on the monotonic clock; 0 before it began."""
        crew = self._crew_at_work()
        return self._own.last_progress if crew is None else crew.last_progress

    def start(self) -> None:
        """Begin starting the processes in the background. Calling it again does nothing."""
        if self._plan.processes and self._running is None:
            starter = ThreadPoolExecutor(1, thread_name_prefix="batchjob-loader")
            self._running = starter.submit(self._start_crew)
            starter.shutdown(wait=False)

    def batches(self, queue: ShardQueue) -> Iterator[Batch]:
        """One epoch: batches of the shards that the feed gives, in order, until it gives None.

        A new shard is asked for as soon as the last one's batches are all under way. A shard of no images has no
        batch, and one that the feed no longer wants no further ones. A batch may have fewer images than asked for
        where a process was lost over it. The processes stay for the next epoch.

        Raises:
            AttemptFailed: loader processes die, and no image is to blame; the next call starts new ones.
            Unavailable: the output, where a deadly image has to be remembered, cannot be reached.
            InvalidJob: the images cannot be read as the job stands (a missing extra, for one).
        """
        with closing(self._in_processes(queue) if self._plan.processes else self._in_this_process(queue)) as items:
            for item in items:
                if isinstance(item, BatchjobError):
                    raise item
                yield item

    def close(self) -> None:
        """End the processes. The loader may be started again."""
        running, self._running = self._running, None
        if running is not None and running.exception() is None:
            crew = running.result()
            crew.close()
            self._lost += crew.process_deaths

    def _start_crew(self) -> LoaderProcessPool:
        start_forkserver(__name__)
        return LoaderProcessPool(self._images, self._plan, self.quarantine)

    def _in_this_process(self, feed: ShardQueue) -> Generator[Batch | BatchjobError, None, None]:
        for request in self._requests(feed):
            item = self._images.load_batch(request, self._own)
            yield item.pin_memory() if self._plan.pin_memory and isinstance(item, Batch) else item

    def _in_processes(self, feed: ShardQueue) -> Generator[Batch | BatchjobError, None, None]:
        crew = self._started()
        crew.quarantine = self.quarantine
        try:
            yield from crew.batches(self._requests(feed))
        except BatchjobError:
            self.close()
            raise
        except Exception as error:
            self.close()
            raise AttemptFailed(f"the loader failed and is started anew: {type(error).__name__}: {error}") from error

    def _requests(self, feed: ShardQueue) -> Iterator[BatchRequest]:
        while (shard := feed.next_shard()) is not None:
            size = self.batch_size
            for start in range(0, len(shard.refs), size):
                if not feed.is_wanted(shard):
                    break
                refs = shard.refs[start : start + size]
                known = self.quarantine.errors_by_row(ref.position for ref in refs)
                yield BatchRequest(shard.key.index, shard.attempt_number, start, refs, known, shard.decode_on_cpu)

    def _started(self) -> LoaderProcessPool:
        try:
            crew = self._crew_at_work()
            if crew is not None and not crew.healthy:
                self.close()
            self.start()
            assert self._running is not None
            return self._running.result()
        except Exception:  # they could not be started: the next call tries again
            self._running = None
            raise

    def _crew_at_work(self) -> LoaderProcessPool | None:
        """The one that has been started, if that is so by now."""
        running = self._running
        return running.result() if running is not None and running.done() and running.exception() is None else None


class _TimestampCallback:
    """Told what is at work where this process loads."""

    last_progress = 0.0

    def on_fetch(self) -> None:
        self.last_progress = time.monotonic()

    def on_image(self, row: int, etag: str | None) -> None:  # noqa: ARG002 - the face of who is told
        self.last_progress = time.monotonic()

    def on_send(self) -> None:
        self.last_progress = time.monotonic()
