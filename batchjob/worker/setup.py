"""Set-up of a worker: load the model, start its loader, warm up, measure."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import ExitStack, closing, contextmanager
from dataclasses import dataclass

import torch

from batchjob.errors import DeviceFault, describe_error
from batchjob.inference.autotune.cache import use_compile_cache
from batchjob.inference.cpu_parallelism import (
    CpuParallelism,
    choose_cpu_parallelism,
    release_freed_memory,
    retain_freed_memory,
)
from batchjob.inference.device_errors import classify_device_error
from batchjob.inference.devices import identify_device
from batchjob.inference.engine import Engine
from batchjob.job.job import Job
from batchjob.output.scratch import ScratchFolder
from batchjob.storage.probe import check_visibility
from batchjob.storage.reader import Reader
from batchjob.storage.store import Store, open_store
from batchjob.system import available_memory
from batchjob.worker.loader_forkserver import start_loader_forkserver
from batchjob.worker.loader_setup import LoaderSetup
from batchjob.worker.messages import WorkerInfo, WorkerSetup
from batchjob.worker.monitored_store import MonitoredStore
from batchjob.worker.watchdog import Watchdog

__all__ = ["LoadedWorker", "load", "report_device_faults"]

_WARM_UP_ROWS = 8
# Estimated seconds for the images of a small input from which on tuning may pay. The estimate rests on the first call,
# which is the slowest.
_TUNING_WORTH_SECONDS = 60.0


@dataclass(frozen=True)
class LoadedWorker:
    """A worker that has loaded: everything that stays the same from plan to plan.

    Attributes:
        job: The job, with paths as they are on this machine.
        setup: Message of the driver that it was loaded for.
        reader: Reader of the images.
        store: Store of the output; each call is a step that the watchdog sees.
        watchdog: Steps of all threads of this worker.
        scratch: Local folder of the parts under construction.
        engine: The model with its preprocessing and postprocessing.
        loader_setup: The loader, and the batch size.
        cpu_parallelism: Batches that are computed at the same time, and threads for each.
        seconds_per_image: Time that an image takes in the plain execution config; 0 if the input is too small to tune.
        info: Facts for the driver.
    """

    job: Job
    setup: WorkerSetup
    reader: Reader
    store: Store
    watchdog: Watchdog
    scratch: ScratchFolder
    engine: Engine
    loader_setup: LoaderSetup
    cpu_parallelism: CpuParallelism
    seconds_per_image: float
    info: WorkerInfo
    _resources: ExitStack

    def close(self) -> None:
        """End loader processes, delete scratch files, give memory back, and restore torch's number of threads."""
        self._resources.close()


def load(job: Job, setup: WorkerSetup, cores: int, started: float | None = None) -> LoadedWorker:
    """Load the model, start the loader processes, and warm up on the device.

    Args:
        job: The job, with paths as they are on this machine.
        setup: Message of the driver.
        cores: Cores that the worker may use, loader processes included.
        started: Monotonic time from which the loading time counts, if torch was imported for this worker; by default
            now.

    Raises:
        InvalidJob: Model, labels, preprocessing, precision or device do not fit together.
        DeviceFault: The device is broken.
    """
    started = time.monotonic() if started is None else started
    # Before the user's code may import torch's compiler, which makes a folder of its own otherwise.
    use_compile_cache()
    start_loader_forkserver(job)
    watchdog = Watchdog()
    reader = Reader(job.storage, outage_timeout=job.errors.outage_seconds, within=job.input.prefixes)
    # Images and output share one outage clock if they lie in one bucket.
    outage = reader.outage(job.output.uri)
    store = MonitoredStore(open_store(job.output.uri, job.storage, outage=outage), watchdog)
    with ExitStack() as resources:
        resources.callback(torch.set_num_threads, torch.get_num_threads())
        torch.set_num_threads(choose_cpu_parallelism("cpu", cores).threads_per_batch)
        resources.callback(release_freed_memory)
        retain_freed_memory()
        scratch = resources.enter_context(closing(ScratchFolder()))
        check_visibility(store, setup.visibility_check)
        with report_device_faults(job.runtime.device):
            engine = Engine(job, reader, setup.sample, setup.reserved_gpus)
            engine.adopt(setup.decisions)
        device = identify_device(engine.device)
        with report_device_faults(device):
            loader_setup = resources.enter_context(
                closing(LoaderSetup(job, engine, reader, cores, setup.small_input_bytes))
            )
            loader_setup.start()
            engine.check_task()
            parallelism, seconds_per_image = _warm_up(engine, loader_setup, cores, setup)
            # Before the plan is made, which would stay behind if the job has to be changed.
            engine.check_requested_config(loader_setup.batch_size)
            info = _describe(engine, loader_setup, device, f"{job.model.title}@{engine.digest[:12]}", started)
        return LoadedWorker(
            job=job,
            setup=setup,
            reader=reader,
            store=store,
            watchdog=watchdog,
            scratch=scratch,
            engine=engine,
            loader_setup=loader_setup,
            cpu_parallelism=parallelism,
            seconds_per_image=seconds_per_image,
            info=info,
            _resources=resources.pop_all(),
        )


@contextmanager
def report_device_faults(device: str) -> Iterator[None]:
    """Raise DeviceFault in place of an error that shows that the device is broken.

    Args:
        device: The device in words.
    """
    try:
        yield
    except DeviceFault:
        raise
    except Exception as error:
        if classify_device_error(error) is None:
            raise
        raise DeviceFault(f"{device} failed: {describe_error(error)}; the same command resumes", device) from error


def _warm_up(engine: Engine, loader_setup: LoaderSetup, cores: int, setup: WorkerSetup) -> tuple[CpuParallelism, float]:
    """Run the plain execution config; find the batch size and measure how long an image takes."""
    example, kind = engine.example_image, engine.device.type
    predictor = engine.build_predictor(engine.build_forward(engine.loaded_config))
    rows = min(loader_setup.batch_size, _WARM_UP_ROWS)
    # On a CPU, memory is virtual: a batch that does not fit gets the process killed instead of an error.
    if kind != "cpu":
        if loader_setup.chooses_batch_size:
            limit = loader_setup.max_batch_size
            start = min(loader_setup.batch_size, limit)
            loader_setup.set_batch_size(predictor.find_largest_batch(example.shape, start, limit, example.dtype))
        rows = loader_setup.batch_size
    seconds_per_image = predictor.warm_up(example.shape, rows, example.dtype) / rows
    parallelism = choose_cpu_parallelism(
        kind, cores, sequential=kind == "cpu" and engine.is_stateful(), memory=available_memory()
    )
    torch.set_num_threads(parallelism.threads_per_batch)
    is_small = setup.small_input_bytes is not None
    if is_small and seconds_per_image * len(setup.sample) <= _TUNING_WORTH_SECONDS:
        return parallelism, 0.0
    seconds = predictor.warm_up(example.shape, loader_setup.batch_size, example.dtype)
    return parallelism, seconds / loader_setup.batch_size / parallelism.parallel_batches


def _describe(engine: Engine, loader_setup: LoaderSetup, device: str, model: str, started: float) -> WorkerInfo:
    return WorkerInfo(
        device=device,
        precision=engine.requested_config.precision,
        model=model,
        columns=tuple(column.name for column in engine.postprocess.fields),
        batch_size=loader_setup.batch_size,
        seconds=time.monotonic() - started,
        ahead=loader_setup.images_in_flight,
        decisions=dict(engine.decisions),
        notes=(*engine.notes, *loader_setup.notes),
    )
