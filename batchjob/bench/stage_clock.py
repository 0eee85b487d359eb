"""Clock that adds up wall-clock, CPU and GPU time of one stage."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager

import torch

from batchjob.bench.results import StageMeasurement
from batchjob.errors import InvalidJob

__all__ = ["StageClock"]


class StageClock:
    """Sum of the time that a stage takes for all images measured so far.

    Example:
        >>> clock = StageClock(process=False)
        >>> for image in images:
        ...     with clock.measure(1):
        ...         decode(image)
        >>> clock.to_measurement("decode", None).images_per_second

    Args:
        device: Device whose time is measured with CUDA events, if it is a CUDA device.
        process: True counts the CPU time of all threads of this process, False that of the calling thread.

    Attributes:
        seconds: Wall-clock time.
        cpu_seconds: CPU time.
        gpu_ms: Time of the GPU in milliseconds.
        images: Images measured.
    """

    def __init__(self, device: torch.device | None = None, *, process: bool = True) -> None:
        self._cuda = device if device is not None and device.type == "cuda" else None
        self._read_cpu_clock = time.process_time if process else time.thread_time
        self.seconds = self.cpu_seconds = self.gpu_ms = 0.0
        self.images = 0

    @contextmanager
    def measure(self, images: int) -> Iterator[None]:
        """Measure the work of the `with` block for so many images; on CUDA, until the device has finished it."""
        if self._cuda is not None:
            # Blocking events let the thread sleep while it waits: other work of this process counts, waiting does not.
            before, after = (torch.cuda.Event(enable_timing=True, blocking=True) for _ in range(2))
            before.record(torch.cuda.current_stream(self._cuda))
        started, cpu_started = time.perf_counter(), self._read_cpu_clock()
        yield
        if self._cuda is not None:
            after.record(torch.cuda.current_stream(self._cuda))
            after.synchronize()
            self.gpu_ms += before.elapsed_time(after)
        self.seconds += time.perf_counter() - started
        self.cpu_seconds += self._read_cpu_clock() - cpu_started
        self.images += images

    def to_measurement(self, name: str, size: float | None, note: str = "") -> StageMeasurement:
        """Return the figures of the stage.

        Args:
            name: Name of the stage.
            size: Bytes per image that the stage puts out; None if unknown.
            note: Conditions of the measurement.

        Raises:
            InvalidJob: If nothing was measured.
        """
        if not self.images or self.seconds <= 0:
            raise InvalidJob(f"{name}: no image came that far, so there is nothing to measure; `batchjob run` says why")
        gpu_ms = self.gpu_ms / self.images if self._cuda is not None else None
        cpu_ms = self.cpu_seconds / self.images * 1e3
        return StageMeasurement(name, self.images / self.seconds, cpu_ms, gpu_ms, size, note)
