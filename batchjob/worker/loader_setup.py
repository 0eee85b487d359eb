"""Loader of one worker, as large as its cores and memory allow."""

from __future__ import annotations

import math

from batchjob.errors import InvalidJob
from batchjob.inference.engine import Engine
from batchjob.job.job import Job
from batchjob.loader.loader import Loader
from batchjob.loader.settings import LoaderConfig, LoaderSettings, resolve_loader_settings
from batchjob.storage.reader import Reader
from batchjob.system import SHARED_MEMORY, available_memory, free_shared_memory, is_shared_memory_writable

__all__ = ["LoaderSetup"]

_CPU_BATCH_SIZE = 32
_GPU_BATCH_SIZE = 128
_MAX_BATCH_SIZE = 1024
# Rather fewer processes than still smaller batches.
_MIN_BATCH_SIZE = 8


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
        notes: Lines for the user about what limits the loader.

    Raises:
        InvalidJob: The job asks for loader processes, and shared memory is read-only.
    """

    def __init__(self, job: Job, engine: Engine, reader: Reader, cores: int, small_input_bytes: int | None) -> None:
        self._job, self._engine, self._reader = job, engine, reader
        self._cores, self._small_input_bytes = cores, small_input_bytes
        self.notes: tuple[str, ...] = ()
        self._settings = self._writable_settings()
        self._usual_batch_size = _GPU_BATCH_SIZE if engine.device.type == "cuda" else _CPU_BATCH_SIZE
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
        self.start()

    def set_batch_size(self, batch_size: int) -> None:
        """Make batches of so many images from the next shard on."""
        self.batch_size = self.loader.batch_size = batch_size

    def close(self) -> None:
        """End processes and threads. Calling it again does nothing."""
        self.loader.close()

    def _initial_batch_size(self) -> int:
        requested = self._job.runtime.batch_size
        if requested != "auto":
            return requested
        return self._engine.model.batch_size or self._fit_batch_size(self._usual_batch_size)

    def _fit_batch_size(self, wanted: int) -> int:
        """Make batches smaller where shared memory is small, so that each process has room for one.

        Example: Docker's 64 MiB and 16 processes, half of the memory and 150,528 bytes per image leave room for 13
        images in each batch. With batches of 128 there would be one process.
        """
        free, config = free_shared_memory(), self._resolve(wanted, None)
        if free is None or not config.processes:
            return wanted
        prefetch = 1 if self._settings.prefetch == "auto" else config.prefetch
        fitting = free // 2 // (config.processes * prefetch * self._engine.example_image.nbytes)
        return min(wanted, max(fitting, _MIN_BATCH_SIZE))

    def _writable_settings(self) -> LoaderSettings:
        """Return the job's settings; without loader processes, which share memory, where that is read-only."""
        settings = self._job.runtime.loader
        if is_shared_memory_writable() or settings.processes == 0:
            return settings
        if settings.processes != "auto":
            raise InvalidJob(
                f"runtime.loader.processes is {settings.processes}, but {SHARED_MEMORY} is read-only here; mount it "
                f"writable (`docker run --tmpfs {SHARED_MEMORY}`), or write runtime.loader.processes=0"
            )
        line = (
            f"{SHARED_MEMORY} is read-only, so images are loaded in the worker itself, without processes of their own; "
            f"mount it writable to have them (`docker run --tmpfs {SHARED_MEMORY}`)"
        )
        self.notes = (line,)
        return settings.model_copy(update={"processes": 0})

    def _resolve(self, batch_size: int, shared_memory_bytes: int | None) -> LoaderConfig:
        return resolve_loader_settings(
            self._settings,
            cores=self._cores,
            small_input_bytes=self._small_input_bytes,
            cuda=self._engine.device.type == "cuda",
            memory_bytes=available_memory(),
            max_pixels=self._job.decode.max_pixels,
            batch_bytes=batch_size * self._engine.example_image.nbytes,
            shared_memory_bytes=shared_memory_bytes,
        )

    def _describe_limit(self, config: LoaderConfig, free: int | None) -> tuple[str, ...]:
        """Say how shared memory limits the loader, if it does, and which flag gives more of it."""
        batch_size = self._usual_batch_size if self.chooses_batch_size else self.batch_size
        wanted = self._resolve(batch_size, None)
        if free is None or (config.processes >= wanted.processes and self.batch_size >= batch_size):
            return ()
        needed = 2 * wanted.processes * wanted.prefetch * batch_size * self._engine.example_image.nbytes
        gib = math.ceil(needed / (1 << 30))
        line = (
            f"{SHARED_MEMORY} has {free >> 20:,} MiB free, which limits the loader to {config.processes} of "
            f"{wanted.processes} processes and batches of {self.batch_size} images; give it {gib} GiB (`docker run "
            f"--shm-size={gib}g` or `--ipc=host`; on Kubernetes an emptyDir with `medium: Memory` at {SHARED_MEMORY})"
        )
        return (line,)

    def _build_loader(self) -> Loader:
        free = free_shared_memory()
        config = self._resolve(self.batch_size, free)
        if config.processes:
            self.notes = self._describe_limit(config, free)
        return Loader(
            reader=self._reader,
            transform=self._engine.image_transform,
            batch_size=self.batch_size,
            config=config,
            size=self.image_shape,
            variable_size=self._engine.variable_size,
            max_bytes=self._job.decode.max_bytes,
            retries=self._job.errors.retries,
            device=self._engine.device.index,
        )
