"""Shards to batches through one persistent `DataLoader`; a bad image stays in its place as a fault, never dropped."""

from __future__ import annotations

import contextlib
import multiprocessing
import signal
import threading
import time
from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from typing import TYPE_CHECKING, Annotated, Any, Literal, Protocol

from pydantic import Field

from batchjob.errors import AttemptFailed, BatchjobError, ImageFault, Unavailable
from batchjob.fetch import Fetcher, oversized, together
from batchjob.forkserver import end_with_parent, preload, starting
from batchjob.records import Batch, Blob, Fault, ImageFacts, ImageRef, Prepared, Shard
from batchjob.settings import Settings

if TYPE_CHECKING:
    import torch

    from batchjob.storage import Reader

__all__ = ["Loader", "LoaderPlan", "LoaderSettings", "Prepare", "ShardFeed", "preload", "settle"]

Prepare = Callable[[bytes], Prepared]
"""An encoded image to what goes into the batch. Raises ImageFault."""

FEW_IMAGES = 256  # for so few, starting processes takes longer than decoding in this one
MOST_PROCESSES = 32
CLOSE_SECONDS = 5.0  # what a loader process is given to finish its batch before it is killed


class LoaderSettings(Settings):
    """How images reach the model.

    Attributes:
        processes: that fetch and decode; 0 does it in the worker itself.
        prefetch: batches each process keeps ready.
        pin_memory: page-locked batches, for faster copies to a GPU.
    """

    processes: Annotated[int, Field(ge=0, le=1024)] | Literal["auto"] = "auto"
    prefetch: Annotated[int, Field(ge=1, le=1024)] | Literal["auto"] = "auto"
    pin_memory: bool | Literal["auto"] = "auto"


@dataclass(frozen=True)
class LoaderPlan:
    """Loader settings with nothing left open."""

    processes: int
    prefetch: int
    pin_memory: bool


def settle(settings: LoaderSettings, *, cores: int, images: int | None = None, cuda: bool = False) -> LoaderPlan:
    """The rule behind `auto`: a process per core, none for a job of a few images; pinned where there is a CUDA device.

    Args:
        settings: what the job says.
        cores: that this worker may use.
        images: in the whole job, where it is known.
        cuda: whether batches go to a CUDA device.
    """
    few = images is not None and images <= FEW_IMAGES
    processes = 0 if few else max(1, min(cores, MOST_PROCESSES))
    return LoaderPlan(
        processes=processes if settings.processes == "auto" else settings.processes,
        prefetch=2 if settings.prefetch == "auto" else settings.prefetch,
        pin_memory=cuda and settings.pin_memory in {True, "auto"},
    )


class ShardFeed(Protocol):
    """Where the loader gets its next shard from."""

    def take(self) -> Shard | None:
        """The next shard if one is there now, else None, which ends the epoch. Never blocks, never raises."""

    def wants(self, shard: Shard) -> bool:
        """Whether more batches of a shard that was taken are of use; asked before each. Never blocks, never raises."""


class Loader:
    """Fetches and decodes batches ahead of their use, in order, in processes that are cheap to replace.

    Args:
        reader: reads encoded images; goes to the loader processes.
        prepare: decode and geometry; picklable.
        batch_size: images in a batch; the last of a shard may have fewer.
        plan: from `settle`; with 0 processes this one works, as the batches are asked for.
        size: the last dimensions every prepared image must have; None takes the first good image of each batch.
        varying: images may differ in size; `size` says nothing then.
        max_bytes: images known to be larger are not fetched.
    """

    def __init__(
        self,
        *,
        reader: Reader,
        prepare: Prepare,
        batch_size: int,
        plan: LoaderPlan,
        size: tuple[int, ...] | None,
        varying: bool = False,
        max_bytes: int | None = None,
    ) -> None:
        self._images = _Images(Fetcher(reader, max_bytes), prepare, batch_size, size, varying)
        self._requests = _Requests(batch_size)
        self._plan = plan
        self._running: Future[_Processes] | None = None

    @property
    def batch_size(self) -> int:
        """Images in a batch; another one counts from the next shard on."""
        return self._requests.batch_size

    @batch_size.setter
    def batch_size(self, images: int) -> None:
        self._requests.batch_size = images

    def start(self) -> None:
        """Begin starting the processes in the background. Calling it again does nothing."""
        if self._plan.processes and self._running is None:
            starter = ThreadPoolExecutor(1, thread_name_prefix="batchjob-loader")
            self._running = starter.submit(_Processes, self._images, self._requests, self._plan)
            starter.shutdown(wait=False)

    def batches(self, feed: ShardFeed) -> Iterator[Batch]:
        """One epoch: batches of the shards that the feed gives, in order, until it gives None.

        A new shard is asked for as soon as the last one's batches are all under way. A shard of no images has no
        batch, and one that the feed no longer wants no further ones. The processes stay for the next epoch.

        Raises:
            AttemptFailed: a loader process died; the next call starts new ones.
            InvalidJob: the images cannot be read as the job stands (a missing extra, for one).
        """
        items = self._in_processes(feed) if self._plan.processes else self._in_this_process(feed)
        for item in items:
            if isinstance(item, BatchjobError):
                raise item
            yield item

    def close(self) -> None:
        """End the processes. The loader may be started again."""
        running, self._running = self._running, None
        if running is not None and running.exception() is None:
            running.result().close()

    def _in_this_process(self, feed: ShardFeed) -> Iterator[Batch | BatchjobError]:
        for request in _requested(feed, self._requests.batch_size):
            item = self._images.load(request)
            yield item.pin_memory() if self._plan.pin_memory and isinstance(item, Batch) else item

    def _in_processes(self, feed: ShardFeed) -> Iterator[Batch | BatchjobError]:
        processes = self._started()
        try:
            yield from processes.epoch(feed)
        except Exception as error:
            cause = processes.obituary() or f"{type(error).__name__}: {error}"
            self.close()
            raise AttemptFailed(f"the loader failed and is started anew: {cause}") from error

    def _started(self) -> _Processes:
        try:
            if self._running is not None and self._running.done() and not self._running.result().alive():
                self.close()
            self.start()
            assert self._running is not None
            return self._running.result()
        except Exception:  # they could not be started: the next call tries again
            self._running = None
            raise


@dataclass(frozen=True)
class _Request:
    """One batch to load."""

    shard: int
    take: int
    start: int
    refs: tuple[ImageRef, ...]


class _NoShards:
    def take(self) -> None:
        return None

    def wants(self, shard: Shard) -> bool:  # noqa: ARG002 - the face of a feed
        return False


class _Requests:
    """The batch sampler: whatever feed is set when an epoch begins."""

    def __init__(self, batch_size: int) -> None:
        self.batch_size = batch_size
        self.feed: ShardFeed = _NoShards()

    def __iter__(self) -> Iterator[_Request]:
        return _requested(self.feed, self.batch_size)


def _requested(feed: ShardFeed, batch_size: int) -> Iterator[_Request]:
    while (shard := feed.take()) is not None:
        for start in range(0, len(shard.refs), batch_size):
            if not feed.wants(shard):
                break
            yield _Request(shard.key.index, shard.take, start, shard.refs[start : start + batch_size])


class _Processes:
    """A running DataLoader. Made in the background; everything else from the thread that iterates."""

    def __init__(self, images: _Images, requests: _Requests, plan: LoaderPlan) -> None:
        import torch
        from torch.utils.data import DataLoader

        preload(__name__)
        self._requests = requests
        self._loader: DataLoader[Any] = DataLoader(
            images,  # type: ignore[arg-type]
            batch_sampler=requests,  # type: ignore[arg-type]
            num_workers=plan.processes,
            prefetch_factor=plan.prefetch,
            persistent_workers=True,
            pin_memory=plan.pin_memory,
            collate_fn=_as_it_is,
            worker_init_fn=_settle_in,
            multiprocessing_context=multiprocessing.get_context("forkserver"),
            generator=torch.Generator(),  # its seeds must not come from the program's own generator
        )
        with starting():
            self._iterator: Any = iter(self._loader)  # starts the processes; there are no shards yet

    def epoch(self, feed: ShardFeed) -> Iterator[Batch | BatchjobError]:
        self._requests.feed = feed
        try:
            yield from self._loader
        finally:
            self._requests.feed = _NoShards()

    def alive(self) -> bool:
        return all(process.is_alive() for process in self._iterator._workers)

    def obituary(self) -> str:
        """Which processes died of what; empty if none did."""
        dead = [process for process in self._iterator._workers if not process.is_alive()]
        return "; ".join(f"loader process {process.pid} {_cause(process.exitcode)}" for process in dead)

    def close(self) -> None:
        # Asked to end, each finishes its batch; one that is stuck in a decoder or a slow read is killed.
        killer = threading.Timer(CLOSE_SECONDS, self._kill)
        killer.start()
        try:
            self._iterator._shutdown_workers()
        finally:
            killer.cancel()
            self._kill()

    def _kill(self) -> None:
        for process in self._iterator._workers:
            if process.is_alive():
                process.kill()
                process.join(CLOSE_SECONDS)


def _cause(exitcode: int | None) -> str:
    if exitcode is None or exitcode >= 0:
        return f"ended with exit code {exitcode}"
    try:
        name = signal.Signals(-exitcode).name
    except ValueError:
        name = f"signal {-exitcode}"
    hints = {
        "SIGKILL": " (out of memory? lower runtime.batch_size or runtime.loader.processes)",
        "SIGBUS": " (shared memory is full: enlarge /dev/shm, or lower runtime.batch_size or runtime.loader.prefetch)",
        "SIGSEGV": " (a decoder crashed)",
    }
    return f"was ended by {name}{hints.get(name, '')}"


def _as_it_is(batch: Any) -> Any:
    return batch


def _settle_in(worker: int) -> None:  # noqa: ARG001 - DataLoader numbers its processes
    """Runs first in a loader process (where DataLoader has set torch to one thread)."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is for the driver; it ends us in order
    threading.Thread(target=end_with_parent, name="parent-watch", daemon=True).start()


@dataclass(frozen=True)
class _Images:
    """The dataset: a request in, a batch out."""

    fetcher: Fetcher
    prepare: Prepare
    batch_size: int
    size: tuple[int, ...] | None
    varying: bool

    def __getitems__(self, request: _Request) -> Batch | BatchjobError:
        return self.load(request)

    def load(self, request: _Request) -> Batch | BatchjobError:
        """The batch, or what ends the job (given, not raised: DataLoader cannot carry such exceptions)."""
        seconds: dict[str, float] = defaultdict(float)
        pixels = _Ragged() if self.varying else _Pixels(len(request.refs), self.size)
        facts: list[ImageFacts] = []
        try:
            for refs in together(request.refs):
                with _timed(seconds, "fetch"):
                    found = self.fetcher.fetch(refs)[::-1]  # so that each can be let go once it is decoded
                with _timed(seconds, "decode"):
                    while found:
                        facts.append(self._prepared(found.pop(), pixels))
        except Unavailable as trouble:
            return Batch(request.shard, request.start, (), None, trouble.message, dict(seconds), take=request.take)
        except BatchjobError as error:
            return error
        return Batch(
            shard=request.shard,
            start=request.start,
            facts=tuple(facts),
            pixels=pixels.filled(),
            seconds=dict(seconds),
            shapes=pixels.shapes(),
            take=request.take,
        )

    def _prepared(self, found: Blob | Fault, pixels: _Pixels | _Ragged) -> ImageFacts:
        if isinstance(found, Fault):
            return ImageFacts(fault=found)
        etag = found.etag
        fault = oversized(len(found.data), self.fetcher.max_bytes)
        if fault is not None:
            return ImageFacts(etag, fault=fault)
        try:
            made = self.prepare(found.data)
            return ImageFacts(etag, made.width, made.height, pixels.add(made.pixels), made.turned)
        except ImageFault as error:
            fault = Fault(error.stage, error.type, error.message)
        except MemoryError:
            fault = Fault("decode", "memory", "there was not enough memory to decode it")
        except Exception as error:  # noqa: BLE001 - one image's fault is that image's row
            fault = Fault("transform", type(error).__name__, str(error) or type(error).__name__)
        return ImageFacts(etag, fault=fault)


class _Pixels:
    """The batch's tensor, made for the first good image and filled in place, in shared memory where it must travel."""

    def __init__(self, rows: int, size: tuple[int, ...] | None) -> None:
        self._rows, self._size = rows, size
        self._tensor: torch.Tensor | None = None
        self._used = 0

    def add(self, image: torch.Tensor) -> Fault | None:
        """Put one image behind the others, or say why it does not go with them."""
        shape = tuple(image.shape)
        size = self._size or (shape if self._tensor is None else tuple(self._tensor.shape[1:]))
        if shape[-len(size) :] != size or (self._tensor is not None and shape != self._tensor.shape[1:]):
            message = f"comes out as {_shape(shape)}, the others as {_shape(size)}: give resize and crop in preprocess"
            return Fault("transform", "size", message)
        if self._tensor is None:
            self._tensor = _room((self._rows, *shape), image.dtype)
        if image.dtype != self._tensor.dtype:
            return Fault("transform", "type", f"comes out as {image.dtype}, the others as {self._tensor.dtype}")
        self._tensor[self._used] = image
        self._used += 1
        return None

    def filled(self) -> torch.Tensor | None:
        return None if self._tensor is None else self._tensor[: self._used]

    def shapes(self) -> None:
        """All alike."""


class _Ragged:
    """Images of different sizes, one behind the other in one flat tensor."""

    def __init__(self) -> None:
        self._images: list[torch.Tensor] = []

    def add(self, image: torch.Tensor) -> Fault | None:
        """Put one image behind the others, or say why it does not go with them."""
        if self._images and image.dtype != self._images[0].dtype:
            return Fault("transform", "type", f"comes out as {image.dtype}, the others as {self._images[0].dtype}")
        if image.ndim != 3:
            return Fault("transform", "size", f"comes out as {_shape(image.shape)}, not as channels x height x width")
        self._images.append(image)
        return None

    def filled(self) -> torch.Tensor | None:
        import torch

        if not self._images:
            return None
        room = _room((sum(image.numel() for image in self._images),), self._images[0].dtype)
        return torch.cat([image.reshape(-1) for image in self._images], out=room)

    def shapes(self) -> tuple[tuple[int, ...], ...]:
        return tuple(tuple(image.shape) for image in self._images)


def _room(shape: tuple[int, ...], dtype: torch.dtype) -> torch.Tensor:
    import torch
    from torch.utils.data import get_worker_info

    room = torch.empty(shape, dtype=dtype)
    return room if get_worker_info() is None else room.share_memory_()


def _shape(shape: Sequence[int]) -> str:
    return "x".join(map(str, shape))


@contextlib.contextmanager
def _timed(seconds: dict[str, float], stage: str) -> Iterator[None]:
    begun = time.perf_counter()
    try:
        yield
    finally:
        seconds[stage] += time.perf_counter() - begun
