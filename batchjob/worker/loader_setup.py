"""What brings a worker its batches: a loader as large as cores and memory allow, and a device's decoder beside it."""

from __future__ import annotations

from dataclasses import replace
from multiprocessing import get_context

from batchjob.inference.engine import Engine
from batchjob.inference.gpu_decode import Decode, DeviceDecoding, device_decoder
from batchjob.job.job import Job
from batchjob.loader.gpu_share import Balance, Divided, Share
from batchjob.loader.loader import Loader
from batchjob.loader.settings import LoaderPlan, settle
from batchjob.storage.reader import Reader
from batchjob.system import memory_given, shared_memory_free
from batchjob.worker.watchdog import Stopwatch

__all__ = ["Loading"]

_BATCH_SIZES = {"cuda": 128}
_BATCH_SIZE_ELSEWHERE = 32
_BATCH_SIZE_MOST = 1024


class Loading:
    """Loads for one engine; started once, and again where images turn out to have another size.

    Args:
        job: what to load.
        engine: for which, loaded.
        reader: of images.
        cores: that the worker may use.
        few_bytes: see `settle`.
        stopwatch: on which decoding on a device shows its steps.

    Attributes:
        batch_size: images a batch.
        size: `[c, h, w]` of an image.
        on_device: decodes a share of the images on the engine's device, where the job asks for it.
    """

    def __init__(
        self, job: Job, engine: Engine, reader: Reader, cores: int, few_bytes: int | None, stopwatch: Stopwatch
    ) -> None:
        self._job, self._engine, self._reader = job, engine, reader
        self._cores, self._few_bytes, self._stopwatch = cores, few_bytes, stopwatch
        self._decode = device_decoder(engine.device) if job.decode.device == "cuda" else None
        self._loader: Loader | None = None
        self.on_device: DeviceDecoding | None = None
        self.batch_size = self._first_batch_size()
        self.size = tuple(engine.example.shape)

    @property
    def loader(self) -> Loader:
        """Once started."""
        assert self._loader is not None, "start comes before"
        return self._loader

    @property
    def source(self) -> Loader | DeviceDecoding:
        """Where whole batches come from."""
        return self.on_device or self.loader

    @property
    def divides(self) -> bool:
        """Whether a share of the images is decoded on a device."""
        return self._decode is not None

    @property
    def ahead(self) -> int:
        """Images under way at most."""
        plan = self.loader.plan
        return plan.processes * plan.prefetch * self.batch_size

    @property
    def may_grow(self) -> bool:
        """Whether neither job nor model says how many images make a batch."""
        return self._job.runtime.batch_size == "auto" and self._engine.model.batch_size is None

    @property
    def most(self) -> int:
        """Images that a batch may have for all under way to find room in shared memory."""
        free, batches = shared_memory_free(), self.loader.plan.processes * self.loader.plan.prefetch
        if free is None or not batches:
            return _BATCH_SIZE_MOST
        return max(1, min(_BATCH_SIZE_MOST, free // 2 // (batches * self._engine.example.nbytes)))

    def start(self, size: tuple[int, ...] | None = None) -> None:
        """Start loading images of this size, or of the engine's example, in place of those of another."""
        self.close()
        self.size = size or self.size
        chosen = settle(
            self._job.runtime.loader,
            cores=self._cores,
            few_bytes=self._few_bytes,
            cuda=self._engine.device.type == "cuda",
            memory=memory_given(),
            max_pixels=self._job.decode.max_pixels,
            batch_bytes=self.batch_size * self._engine.example.nbytes,
            shared=shared_memory_free(),
        )
        self._loader = self._made(chosen) if self._decode is None else self._divided(chosen, self._decode)
        self._loader.start()

    def resize(self, batch_size: int) -> None:
        """So many images a batch from now on."""
        self.batch_size = self.loader.batch_size = batch_size

    def close(self) -> None:
        """End processes and threads. It may be started again."""
        for one in (self.on_device, self._loader):
            if one is not None:
                one.close()

    def _first_batch_size(self) -> int:
        asked = self._job.runtime.batch_size
        if asked != "auto":
            return asked
        own = self._engine.model.batch_size
        return own or _BATCH_SIZES.get(self._engine.device.type, _BATCH_SIZE_ELSEWHERE)

    def _divided(self, chosen: LoaderPlan, decode: Decode) -> Loader:
        """A loader that leaves a share of the images to the device, and beside it what decodes them there."""
        share = Share(get_context("forkserver"))
        loader = self._made(chosen, Divided(self._engine.prepare, share))
        alone = replace(chosen, processes=min(chosen.processes, 1), prefetch=1, pin_memory=False)
        self.on_device = DeviceDecoding(
            loader=loader,
            host=self._made(alone),
            decode=decode,
            geometry=self._engine.prepare.geometry,
            device=self._engine.device,
            balance=Balance(share, max(1, chosen.processes) * chosen.prefetch),
            stopwatch=self._stopwatch,
        )
        return loader

    def _made(self, chosen: LoaderPlan, divided: Divided | None = None) -> Loader:
        return Loader(
            reader=self._reader,
            prepare=self._engine.prepare,
            batch_size=self.batch_size,
            plan=chosen,
            size=self.size,
            varying=self._engine.varying,
            max_bytes=self._job.decode.max_bytes,
            retries=self._job.errors.retries,
            divided=divided,
        )
