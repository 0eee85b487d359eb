"""Loader of one worker, as large as its cores and memory allow."""

from __future__ import annotations

from batchjob.inference.engine import Engine
from batchjob.job.job import Job
from batchjob.loader.loader import Loader
from batchjob.loader.settings import resolve_loader_settings
from batchjob.storage.reader import Reader
from batchjob.system import available_memory, free_shared_memory

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

    Attributes:
        batch_size: Images per batch.
        image_shape: `(c, h, w)` of an image as the model gets it.
        loader: The loader.
    """

    def __init__(
        self,
        job: Job,
        engine: Engine,
        reader: Reader,
        cores: int,
        small_input_bytes: int | None,
    ) -> None:
        self._job, self._engine, self._reader = job, engine, reader
        self._cores, self._small_input_bytes = cores, small_input_bytes
        self._is_closed = False
        self.batch_size = self._initial_batch_size()
        self.image_shape = tuple(engine.example_image.shape)
        self.loader = self._build_loader()

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
        self.loader = self._build_loader()
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
        self.loader.close()

    def _initial_batch_size(self) -> int:
        requested = self._job.runtime.batch_size
        if requested != "auto":
            return requested
        fixed_by_model = self._engine.model.batch_size
        return fixed_by_model or _DEFAULT_BATCH_SIZES.get(self._engine.device.type, _DEFAULT_BATCH_SIZE)

    def _build_loader(self) -> Loader:
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
        return Loader(
            reader=self._reader,
            transform=self._engine.image_transform,
            batch_size=self.batch_size,
            config=config,
            size=self.image_shape,
            variable_size=self._engine.variable_size,
            max_bytes=self._job.decode.max_bytes,
            retries=self._job.errors.retries,
        )
