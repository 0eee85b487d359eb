"""What brings a worker its batches: a loader as large as cores and memory allow, and a device's decoder beside it."""

from __future__ import annotations

from dataclasses import replace
from multiprocessing import get_context

from batchjob.inference.engine import Engine
from batchjob.inference.gpu_decode import GpuDecodingLoader, JpegDecoder, create_jpeg_decoder
from batchjob.job.job import Job
from batchjob.loader.gpu_share import GpuShare, GpuShareController, GpuSplitTransform
from batchjob.loader.loader import Loader
from batchjob.loader.settings import LoaderConfig, resolve_loader_settings
from batchjob.storage.reader import Reader
from batchjob.system import available_memory, free_shared_memory
from batchjob.worker.watchdog import Watchdog

__all__ = ["LoaderSetup"]

_BATCH_SIZES = {"cuda": 128}
_BATCH_SIZE_ELSEWHERE = 32
_BATCH_SIZE_MOST = 1024


class LoaderSetup:
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
        self, job: Job, engine: Engine, reader: Reader, cores: int, small_input_bytes: int | None, watchdog: Watchdog
    ) -> None:
        self._job, self._engine, self._reader = job, engine, reader
        self._cores, self._few_bytes, self._stopwatch = cores, small_input_bytes, watchdog
        self._decode = create_jpeg_decoder(engine.device) if job.decode.device == "cuda" else None
        self._loader: Loader | None = None
        self.gpu_decoding: GpuDecodingLoader | None = None
        self.batch_size = self._first_batch_size()
        self.image_shape = tuple(engine.example_image.shape)

    @property
    def loader(self) -> Loader:
        """Once started."""
        assert self._loader is not None, "start comes before"
        return self._loader

    @property
    def batch_source(self) -> Loader | GpuDecodingLoader:
        """Where whole batches come from."""
        return self.gpu_decoding or self.loader

    @property
    def decodes_on_gpu(self) -> bool:
        """Whether a share of the images is decoded on a device."""
        return self._decode is not None

    @property
    def images_in_flight(self) -> int:
        """Images under way at most."""
        plan = self.loader.config
        return plan.processes * plan.prefetch * self.batch_size

    @property
    def chooses_batch_size(self) -> bool:
        """Whether neither job nor model says how many images make a batch."""
        return self._job.runtime.batch_size == "auto" and self._engine.model.batch_size is None

    @property
    def max_batch_size(self) -> int:
        """Images that a batch may have for all under way to find room in shared memory."""
        free, batches = free_shared_memory(), self.loader.config.processes * self.loader.config.prefetch
        if free is None or not batches:
            return _BATCH_SIZE_MOST
        return max(1, min(_BATCH_SIZE_MOST, free // 2 // (batches * self._engine.example_image.nbytes)))

    def start(self, image_shape: tuple[int, ...] | None = None) -> None:
        """Start loading images of this size, or of the engine's example, in place of those of another."""
        self.close()
        self.image_shape = image_shape or self.image_shape
        chosen = resolve_loader_settings(
            self._job.runtime.loader,
            cores=self._cores,
            small_input_bytes=self._few_bytes,
            cuda=self._engine.device.type == "cuda",
            memory_bytes=available_memory(),
            max_pixels=self._job.decode.max_pixels,
            batch_bytes=self.batch_size * self._engine.example_image.nbytes,
            shared_memory_bytes=free_shared_memory(),
        )
        self._loader = self._made(chosen) if self._decode is None else self._divided(chosen, self._decode)
        self._loader.start()

    def set_batch_size(self, batch_size: int) -> None:
        """So many images a batch from now on."""
        self.batch_size = self.loader.batch_size = batch_size

    def close(self) -> None:
        """End processes and threads. It may be started again."""
        for one in (self.gpu_decoding, self._loader):
            if one is not None:
                one.close()

    def _first_batch_size(self) -> int:
        asked = self._job.runtime.batch_size
        if asked != "auto":
            return asked
        own = self._engine.model.batch_size
        return own or _BATCH_SIZES.get(self._engine.device.type, _BATCH_SIZE_ELSEWHERE)

    def _divided(self, chosen: LoaderConfig, decode: JpegDecoder) -> Loader:
        """A loader that leaves a share of the images to the device, and beside it what decodes them there."""
        share = GpuShare(get_context("forkserver"))
        loader = self._made(chosen, GpuSplitTransform(self._engine.image_transform, share))
        alone = replace(chosen, processes=min(chosen.processes, 1), prefetch=1, pin_memory=False)
        self.gpu_decoding = GpuDecodingLoader(
            loader=loader,
            cpu_loader=self._made(alone),
            decode=decode,
            geometry=self._engine.image_transform.resize_crop,
            device=self._engine.device,
            share_controller=GpuShareController(share, max(1, chosen.processes) * chosen.prefetch),
            step=self._stopwatch.step,
        )
        return loader

    def _made(self, chosen: LoaderConfig, divided: GpuSplitTransform | None = None) -> Loader:
        return Loader(
            reader=self._reader,
            transform=self._engine.image_transform,
            batch_size=self.batch_size,
            config=chosen,
            size=self.image_shape,
            variable_size=self._engine.variable_size,
            max_bytes=self._job.decode.max_bytes,
            retries=self._job.errors.retries,
            split_transform=divided,
        )
