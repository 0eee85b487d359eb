"""Loader of one worker, as large as its cores and memory allow, with the GPU's JPEG decoder in front if asked for."""

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
from batchjob.types import StepMonitor, no_monitor

__all__ = ["LoaderSetup"]

_DEFAULT_BATCH_SIZES = {"cuda": 128}
_DEFAULT_BATCH_SIZE = 32
_MAX_BATCH_SIZE = 1024


class LoaderSetup:
    """Loader for one engine. It is built again if the workers of a plan agree on another image shape.

    Args:
        job: The job.
        engine: The loaded engine that the batches are for.
        reader: Reader of the images.
        cores: Cores that the worker may use, in this process and in loader processes.
        small_input_bytes: See `resolve_loader_settings`.
        step: Wraps decoding on the GPU, so that a decoder that hangs is noticed.

    Attributes:
        batch_size: Images per batch.
        image_shape: `(c, h, w)` of an image as the model gets it.
        loader: The loader.
        gpu_decoding: Decodes a share of the images on the engine's GPU; None unless `decode.device` is cuda.

    Raises:
        InvalidJob: `decode.device` is cuda, and this GPU or torchvision cannot decode there.
    """

    def __init__(
        self,
        job: Job,
        engine: Engine,
        reader: Reader,
        cores: int,
        small_input_bytes: int | None,
        step: StepMonitor = no_monitor,
    ) -> None:
        self._job, self._engine, self._reader = job, engine, reader
        self._cores, self._small_input_bytes, self._step = cores, small_input_bytes, step
        self._decoder = create_jpeg_decoder(engine.device) if job.decode.device == "cuda" else None
        self._is_closed = False
        self.batch_size = self._initial_batch_size()
        self.image_shape = tuple(engine.example_image.shape)
        self.loader, self.gpu_decoding = self._build()

    @property
    def batch_source(self) -> Loader | GpuDecodingLoader:
        """The loader, or the GPU decoding in front of it: its batches hold the pixels of all images."""
        return self.gpu_decoding or self.loader

    @property
    def images_in_flight(self) -> int:
        """Upper bound for the images that are being loaded or wait to be used."""
        config = self.loader.config
        return config.processes * config.prefetch * self.batch_size

    @property
    def chooses_batch_size(self) -> bool:
        """True if neither the job nor the model fixes the batch size."""
        return self._job.runtime.batch_size == "auto" and self._engine.model.batch_size is None

    @property
    def max_batch_size(self) -> int:
        """Largest batch size with which all batches in flight fit into half of the free shared memory.

        Example:
            4 processes of 2 batches each, 600 KB per image, 12 GB free: 6 GB / (8 * 600 KB) = 1250, limited to 1024.
        """
        free, batches = free_shared_memory(), self.loader.config.processes * self.loader.config.prefetch
        if free is None or not batches:
            return _MAX_BATCH_SIZE
        return max(1, min(_MAX_BATCH_SIZE, free // 2 // (batches * self._engine.example_image.nbytes)))

    def start(self) -> None:
        """Begin to start the loader processes, in the background."""
        self.loader.start()

    def restart(self, image_shape: tuple[int, ...]) -> None:
        """Load images of another shape from now on.

        Args:
            image_shape: `(c, h, w)`.
        """
        self.close()
        self.image_shape = image_shape
        self.loader, self.gpu_decoding = self._build()
        self._is_closed = False
        self.start()

    def set_batch_size(self, batch_size: int) -> None:
        """Make batches of so many images from the next shard on."""
        self.batch_size = self.loader.batch_size = batch_size

    def close(self) -> None:
        """End processes and threads. Calling it again does nothing."""
        if self._is_closed:
            return
        self._is_closed = True
        if self.gpu_decoding is not None:
            self.gpu_decoding.close()
        self.loader.close()

    def _initial_batch_size(self) -> int:
        requested = self._job.runtime.batch_size
        if requested != "auto":
            return requested
        fixed_by_model = self._engine.model.batch_size
        return fixed_by_model or _DEFAULT_BATCH_SIZES.get(self._engine.device.type, _DEFAULT_BATCH_SIZE)

    def _build(self) -> tuple[Loader, GpuDecodingLoader | None]:
        config = resolve_loader_settings(
            self._job.runtime.loader,
            cores=self._cores,
            small_input_bytes=self._small_input_bytes,
            cuda=self._engine.device.type == "cuda",
            memory_bytes=available_memory(),
            max_pixels=self._job.decode.max_pixels,
            batch_bytes=self.batch_size * self._engine.example_image.nbytes,
            shared_memory_bytes=free_shared_memory(),
        )
        if self._decoder is None:
            return self._build_loader(config), None
        return self._build_gpu_decoding(config, self._decoder)

    def _build_gpu_decoding(self, config: LoaderConfig, decoder: JpegDecoder) -> tuple[Loader, GpuDecodingLoader]:
        """Build a loader that leaves a share of the images encoded, and the GPU decoding that completes its batches."""
        share = GpuShare(get_context("forkserver"))
        loader = self._build_loader(config, GpuSplitTransform(self._engine.image_transform, share))
        # Decodes the few files that the GPU refuses, one batch at a time.
        cpu_config = replace(config, processes=min(config.processes, 1), prefetch=1, pin_memory=False)
        decoding = GpuDecodingLoader(
            loader=loader,
            cpu_loader=self._build_loader(cpu_config),
            decode=decoder,
            geometry=self._engine.image_transform.resize_crop,
            device=self._engine.device,
            share_controller=GpuShareController(share, max(1, config.processes) * config.prefetch),
            step=self._step,
        )
        return loader, decoding

    def _build_loader(self, config: LoaderConfig, split_transform: GpuSplitTransform | None = None) -> Loader:
        return Loader(
            reader=self._reader,
            transform=self._engine.image_transform,
            batch_size=self.batch_size,
            config=config,
            size=self.image_shape,
            variable_size=self._engine.variable_size,
            max_bytes=self._job.decode.max_bytes,
            retries=self._job.errors.retries,
            split_transform=split_transform,
        )
