"""The face of the loader: shards in, batches out, in order, whatever becomes of the processes behind it."""

from __future__ import annotations

import time
from collections.abc import Generator, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import closing
from typing import TYPE_CHECKING, Protocol

from batchjob.concurrency import preload
from batchjob.errors import AttemptFailed, BatchjobError
from batchjob.loader.dataset import Images, Prepare, Request
from batchjob.loader.fetch import Fetcher
from batchjob.loader.isolation import Crew
from batchjob.loader.quarantine import Quarantine
from batchjob.loader.settings import LoaderPlan
from batchjob.storage.reader import Reader
from batchjob.types import Batch, Shard

if TYPE_CHECKING:
    import torch

__all__ = ["Loader", "ShardFeed"]


class ShardFeed(Protocol):
    """Where the loader gets its next shard from."""

    def take(self) -> Shard | None:
        """The next shard if one is there now, else None, which ends the epoch. Never blocks, never raises."""

    def wants(self, shard: Shard) -> bool:
        """Whether more batches of a shard that was taken are of use; asked before each. Never blocks, never raises."""


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
        prepare: Prepare,
        batch_size: int,
        plan: LoaderPlan,
        size: tuple[int, ...] | None,
        varying: bool = False,
        max_bytes: int | None = None,
        retries: int = 2,
        divided: Prepare | None = None,
    ) -> None:
        self._images = Images(Fetcher(reader, max_bytes, retries), prepare, size, varying, divided)
        self._plan = plan
        self._running: Future[Crew] | None = None
        self._lost, self._own = 0, _Own()
        self.batch_size = batch_size
        self.quarantine = Quarantine()

    @property
    def plan(self) -> LoaderPlan:
        """As it was given."""
        return self._plan

    def collated(self, images: Sequence[torch.Tensor]) -> torch.Tensor | None:
        """Prepared images as the pixels of one batch; what does not go with the first of them is left out."""
        room = self._images.collation(len(images), shared=self._plan.processes > 0)
        for image in images:
            room.add(image)
        return room.filled()

    @property
    def deaths(self) -> int:
        """Processes that died so far, those in which suspects were tried alone included."""
        crew = self._crew_at_work()
        return self._lost + (crew.deaths if crew is not None else 0)

    def last_sign(self) -> float:
        """When loading was last seen to have come a step further, on the monotonic clock; 0 before it began."""
        crew = self._crew_at_work()
        return self._own.last_sign if crew is None else crew.last_sign

    def start(self) -> None:
        """Begin starting the processes in the background. Calling it again does nothing."""
        if self._plan.processes and self._running is None:
            starter = ThreadPoolExecutor(1, thread_name_prefix="batchjob-loader")
            self._running = starter.submit(self._start_crew)
            starter.shutdown(wait=False)

    def batches(self, feed: ShardFeed) -> Iterator[Batch]:
        """One epoch: batches of the shards that the feed gives, in order, until it gives None.

        A new shard is asked for as soon as the last one's batches are all under way. A shard of no images has no
        batch, and one that the feed no longer wants no further ones. A batch may have fewer images than asked for
        where a process was lost over it. The processes stay for the next epoch.

        Raises:
            AttemptFailed: loader processes die, and no image is to blame; the next call starts new ones.
            Unavailable: the output, where a deadly image has to be remembered, cannot be reached.
            InvalidJob: the images cannot be read as the job stands (a missing extra, for one).
        """
        with closing(self._in_processes(feed) if self._plan.processes else self._in_this_process(feed)) as items:
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
            self._lost += crew.deaths

    def _start_crew(self) -> Crew:
        preload(__name__)
        return Crew(self._images, self._plan, self.quarantine)

    def _in_this_process(self, feed: ShardFeed) -> Generator[Batch | BatchjobError, None, None]:
        for request in self._requests(feed):
            item = self._images.load(request, self._own)
            yield item.pin_memory() if self._plan.pin_memory and isinstance(item, Batch) else item

    def _in_processes(self, feed: ShardFeed) -> Generator[Batch | BatchjobError, None, None]:
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

    def _requests(self, feed: ShardFeed) -> Iterator[Request]:
        while (shard := feed.take()) is not None:
            size = self.batch_size
            for start in range(0, len(shard.refs), size):
                if not feed.wants(shard):
                    break
                refs = shard.refs[start : start + size]
                known = self.quarantine.among(ref.position for ref in refs)
                yield Request(shard.key.index, shard.take, start, refs, known, shard.on_host)

    def _started(self) -> Crew:
        try:
            crew = self._crew_at_work()
            if crew is not None and not crew.well:
                self.close()
            self.start()
            assert self._running is not None
            return self._running.result()
        except Exception:  # they could not be started: the next call tries again
            self._running = None
            raise

    def _crew_at_work(self) -> Crew | None:
        """The one that has been started, if that is so by now."""
        running = self._running
        return running.result() if running is not None and running.done() and running.exception() is None else None


class _Own:
    """Told what is at work where this process loads."""

    last_sign = 0.0

    def fetch(self) -> None:
        self.last_sign = time.monotonic()

    def image(self, row: int, etag: str | None) -> None:  # noqa: ARG002 - the face of who is told
        self.last_sign = time.monotonic()

    def send(self) -> None:
        self.last_sign = time.monotonic()
